"""What `plan_split` found: which idle experts become copies of which busy ones, and how the router tells them apart.

Shape suffixes: E experts, D router input width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from chronomoe_hf.lifecycle.evidence.spec import LayerSpec
from chronomoe_hf.lifecycle.live.model import Batch
from chronomoe_hf.metrics import effective_experts


@dataclass(frozen=True, kw_only=True)
class ExpertCopy:
    """One idle expert that gets the weights of a busy one.

    Args:
        donor: whose weights are copied.
        target: the idle expert that they replace.
        row_of: k = 1: the expert whose router row was split for it, which may itself be a copy of `donor`; -1 where
            rows stay (k > 1).
    """

    donor: int
    target: int
    row_of: int = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSplit:
    """What changes in one layer.

    Args:
        spec: the layer.
        copies: in the order in which they were found; donors keep their weights.
        rows: k = 1: new router rows by expert, fp32 ``(D,)``, of donors and of copies.
        shift_E: k > 1: what is added to the router's logits to choose experts, fp32 ``(E,)`` in logits; None else.
        logit_std: standard deviation of the layer's logits over its experts, mean over tokens.
        share_before, share_after: share of the assignments per expert in fair shares (1 = fair), on the batches read.
        reason: why nothing changes, in plain words; empty otherwise.
    """

    spec: LayerSpec
    copies: tuple[ExpertCopy, ...] = ()
    rows: Mapping[int, Tensor] = field(default_factory=dict)
    shift_E: Tensor | None = None
    logit_std: float = 1.0
    share_before: tuple[float, ...] = ()
    share_after: tuple[float, ...] = ()
    reason: str = ""

    @property
    def changes(self) -> bool:
        """Whether anything changes in this layer."""
        return bool(self.copies) or self.shift_E is not None

    def to_record(self) -> dict[str, Any]:
        """Strict-JSON dictionary, without the vectors."""
        return {
            "layer_id": self.spec.layer_id,
            "name": self.spec.name,
            "copies": [{"donor": one.donor, "target": one.target} for one in self.copies],
            "share_before": [round(value, 4) for value in self.share_before],
            "share_after": [round(value, 4) for value in self.share_after],
            "neff_before": neff_fraction(self.share_before),
            "neff_after": neff_fraction(self.share_after),
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitPlan:
    """Which idle experts of a model are to be rewritten. Made by ``plan_split``; ``apply`` carries it out.

    A plan belongs to the model and the weights that it was made for. It holds vectors of the router's width and the
    batches it was made from, and has no file; :meth:`to_record` is what a run writes down.

    Args:
        layers: one entry per MoE layer of the model.
        tokens: real tokens read.
        batches: the batches read; the refit of :func:`~chronomoe_hf.lifecycle.apply` reads them again.
    """

    layers: tuple[LayerSplit, ...]
    tokens: int
    batches: tuple[Batch, ...] = field(default=(), repr=False)

    @property
    def num_copies(self) -> int:
        """Experts that are rewritten, over all layers."""
        return sum(len(layer.copies) for layer in self.layers)

    @property
    def changes(self) -> bool:
        """False where no expert is idle: then ``apply`` does nothing."""
        return any(layer.changes for layer in self.layers)

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """The model's layer table."""
        return tuple(layer.spec for layer in self.layers)

    def to_record(self) -> dict[str, Any]:
        """Strict-JSON dictionary, without vectors and batches."""
        layers = [layer.to_record() for layer in self.layers]
        return {"tokens": self.tokens, "copies": self.num_copies, "layers": layers}

    def __str__(self) -> str:
        experts = sum(layer.spec.num_experts for layer in self.layers)
        if not self.changes:
            return f"no expert of {experts} is idle on {self.tokens} tokens: nothing to do"
        before = min(neff_fraction(layer.share_before) for layer in self.layers)
        after = min(neff_fraction(layer.share_after) for layer in self.layers)
        return (
            f"{self.num_copies} idle experts of {experts} become copies of busy ones; effective experts of the worst "
            f"layer {before:.0%} -> {after:.0%} of its experts (on {self.tokens} tokens)"
        )


def neff_fraction(share_E: tuple[float, ...]) -> float:
    """exp(entropy) / E of shares in fair shares."""
    effective = effective_experts(share_E) if share_E else None
    return 0.0 if effective is None else round(effective / len(share_E), 4)
