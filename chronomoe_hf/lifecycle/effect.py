"""What a plan costs, as numbers on the host."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MaskEffect:
    """What one set of masked experts does.

    Args:
        delta_loss: mean rise of the cross-entropy, nats per predicted token, paired over the same tokens.
        delta_loss_error: its standard error over sequences; None with a single sequence.
        kl: mean KL(full || masked) of the next-token distributions, nats.
        overlap: mean over tokens of sum_v min(p_full, p_masked), in [0, 1]; 1 = the same distribution.
        expert_overlap: share of the experts chosen by the full model that the masked one chooses too.
    """

    delta_loss: float
    delta_loss_error: float | None
    kl: float
    overlap: float
    expert_overlap: float


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What a plan costs, beside its controls.

    Args:
        plan: the whole plan.
        random: as many experts of every layer and group, drawn at random.
        worst: the highest scores instead of the lowest; None if not asked for.
        leave_one_out: ``(layer_id, expert)`` -> that expert alone.
        loss: cross-entropy of the full model, nats per predicted token.
        sequences, tokens: what was read, summed over ranks; tokens are those with a label.
        rank: of the plan.
        num_kept: survivors per layer.
    """

    plan: MaskEffect
    random: tuple[MaskEffect, ...]
    worst: MaskEffect | None
    leave_one_out: dict[tuple[int, int], MaskEffect]
    loss: float
    sequences: int
    tokens: int
    rank: str
    num_kept: int

    @property
    def random_delta_loss(self) -> float | None:
        """Mean rise of the loss under the random plans."""
        return sum(each.delta_loss for each in self.random) / len(self.random) if self.random else None

    def to_record(self) -> dict[str, Any]:
        """Strict-JSON dictionary."""
        return {
            "rank": self.rank,
            "num_kept": self.num_kept,
            "loss": self.loss,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "plan": asdict(self.plan),
            "random": [asdict(each) for each in self.random],
            "worst": None if self.worst is None else asdict(self.worst),
            "leave_one_out": [
                {"layer_id": layer, "expert_id": expert, **asdict(each)}
                for (layer, expert), each in self.leave_one_out.items()
            ],
        }

    def __str__(self) -> str:
        error = self.plan.delta_loss_error
        parts = [f"{self.rank}, {self.num_kept} experts a layer: loss {self.plan.delta_loss:+.4f}"]
        parts[0] += f" (standard error {error:.4f})" if error is not None else ""
        if self.random:
            parts.append(f"random {self.random_delta_loss:+.4f}")
        if self.worst is not None:
            parts.append(f"worst {self.worst.delta_loss:+.4f}")
        parts.append(f"KL {self.plan.kl:.4f}, on {self.tokens} tokens")
        return "; ".join(parts)
