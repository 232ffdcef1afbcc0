"""Phase coherence of experts: one step's estimate, three clocks, and the buffer that keeps them on the device.

Shape suffixes: E experts, C clocks (3: fast, mid, slow), R rows read, D model width; L layers may lead any shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from chronomoe_hf.errors import ConfigError
from chronomoe_hf.metrics import expert_name

ALPHAS = (0.9, 0.99, 0.999)
"""EMA decay of the fast, mid and slow clock: half-lives of about 7, 69 and 693 updates."""


STALE_AFTER = 1000
"""Optimizer steps without a token after which an expert no longer counts as being observed."""


@dataclass(frozen=True, kw_only=True)
class CoherenceState:
    """One expert's coherence, on the host.

    Args:
        expert_id: ``"L3_E7"``, see :func:`chronomoe_hf.metrics.expert_name`.
        layer_id: MoE layer of the expert.
        phi_fast, phi_mid, phi_slow: bias-corrected clocks, cosines in [-1, 1]; None before the first update.
        last_update_step: optimizer step in which the expert was last seen, -1 = never.
        total_tokens_seen: evidence tokens over the whole run.
        is_being_observed: seen in the last `stale_after` steps before the snapshot.
        phi_raw: estimate of the last step in which the expert was seen, a cosine; None before that.
        updates: steps that updated the clocks.
        step: optimizer step of the snapshot.
    """

    expert_id: str
    layer_id: int
    phi_fast: float | None
    phi_mid: float | None
    phi_slow: float | None
    last_update_step: int
    total_tokens_seen: int
    is_being_observed: bool = True
    phi_raw: float | None = None
    updates: int = 0
    step: int | None = None

    @property
    def delta(self) -> float | None:
        """Fast minus slow clock: positive while an expert is becoming more coherent."""
        return None if self.phi_fast is None or self.phi_slow is None else self.phi_fast - self.phi_slow


def phase_coherence(output_ED: Tensor, reference_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine between each expert's summed (or mean) output and its reference.

    Args:
        output_ED: sum over the expert's tokens of its unweighted output, shape ``(E, D)``, fp32.
        reference_ED: sum over the same tokens of the routed mixture without the expert's own weighted part
            (leave-one-out), or the mean mixture of the layer. Scale does not matter to a cosine.

    Returns:
        ``phi_E`` fp32 in [-1, 1], and ``valid_E`` bool: False (and phi 0) where either norm is zero or not finite.

    Source: docs/concepts.md, "Coherence": phi_e = cos(ybar_e, reference).
    """
    dot_E, (output_E, reference_E) = cosine_parts(output_ED, reference_ED)
    return cosine(dot_E, output_E * reference_E)


def cosine_parts(output_ED: Tensor, reference_ED: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Dot products of the rows, and the norms of both, each ``(E,)``: what :func:`phase_coherence` is made of."""
    norms = output_ED.norm(dim=-1), reference_ED.norm(dim=-1)
    return (output_ED * reference_ED).sum(dim=-1), norms


def cosine(dot_E: Tensor, norm_E: Tensor) -> tuple[Tensor, Tensor]:
    """``dot / norm`` in [-1, 1], and where it is one: 0 and False where the norm is zero or not finite.

    Args:
        dot_E: dot products, any shape.
        norm_E: products of the norms, the same shape.
    """
    valid_E = (norm_E > 0) & (norm_E < math.inf)
    phi_E = (dot_E / norm_E).masked_fill(~valid_E, 0.0)
    return phi_E.clamp(-1.0, 1.0), valid_E


def update_clocks_(
    ema_CE: Tensor, updates_E: Tensor, phi_E: Tensor, active_E: Tensor, rate_C: Tensor | None = None
) -> None:
    """Advance the EMAs in place for the active experts only.

    Args:
        ema_CE: raw (uncorrected) EMAs, shape ``(C, ..., E)``, floating.
        updates_E: updates so far, shape ``(..., E)``, int64.
        phi_E: this step's phi, shape ``(..., E)``, finite everywhere.
        active_E: experts with evidence in this step, shape ``(..., E)``, bool.
        rate_C: 1 - alpha of each clock, in the dtype and on the device of `ema_CE`; None = the three of ALPHAS.

    Source: Phi <- alpha Phi + (1 - alpha) phi; docs/concepts.md, "Coherence".
    """
    if rate_C is None:
        rate_C = torch.tensor([1.0 - alpha for alpha in ALPHAS], dtype=ema_CE.dtype, device=ema_CE.device)
    weight_CE = active_E * rate_C.view(-1, *([1] * active_E.dim()))  # a rate of exactly 0 leaves an EMA as it is
    ema_CE.lerp_(phi_E.to(ema_CE.dtype).expand_as(ema_CE), weight_CE)
    updates_E.add_(active_E)


def read_clocks(ema_CE: Tensor, updates_E: Tensor) -> Tensor:
    """Bias-corrected clocks, shape of `ema_CE`: EMA / (1 - alpha^n); 0 where n = 0."""
    alpha_C = torch.tensor(ALPHAS, dtype=ema_CE.dtype, device=ema_CE.device)
    alpha_C = alpha_C.view(-1, *([1] * updates_E.dim()))
    weight_CE = 1.0 - alpha_C ** updates_E.to(ema_CE.dtype)
    return torch.where(updates_E > 0, ema_CE / weight_CE.clamp_min(1e-30), 0.0)


class CoherenceBuffer:
    """Three bias-corrected clocks of one layer, kept on the device; only :meth:`snapshot` talks to the host.

    Args:
        num_experts: E.
        layer_id: for messages and records.
        device: where the state lives.

    Attributes:
        ema_CE: the clocks as they are stored, without bias correction, float64.
        phi_raw: last estimate of each expert, shape ``(E,)``, float64.
        updates: steps that updated each expert's clocks, shape ``(E,)``, int64.
        total_tokens_seen: evidence tokens of each expert, shape ``(E,)``, int64.
        last_update_step: optimizer step in which each expert was last seen, shape ``(E,)``, int64, -1 = never.

    Raises:
        ConfigError: `num_experts` is not positive.
    """

    def __init__(self, num_experts: int, layer_id: int = 0, device: torch.device | str = "cpu") -> None:
        if num_experts < 1:
            raise ConfigError(f"num_experts must be at least 1, got {num_experts}")
        self.num_experts = num_experts
        self.layer_id = layer_id
        self.ema_CE = torch.zeros(len(ALPHAS), num_experts, dtype=torch.float64, device=device)
        self.phi_raw = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self.updates = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.total_tokens_seen = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.last_update_step = torch.full((num_experts,), -1, dtype=torch.int64, device=device)

    @classmethod
    def view(
        cls,
        layer_id: int,
        ema_CE: Tensor,
        phi_raw_E: Tensor,
        updates_E: Tensor,
        total_tokens_seen_E: Tensor,
        last_update_step_E: Tensor,
    ) -> CoherenceBuffer:
        """A buffer over tensors that somebody else owns (the system's stacked state)."""
        buffer = cls.__new__(cls)
        buffer.num_experts, buffer.layer_id = updates_E.shape[-1], layer_id
        buffer.ema_CE, buffer.phi_raw, buffer.updates = ema_CE, phi_raw_E, updates_E
        buffer.total_tokens_seen, buffer.last_update_step = total_tokens_seen_E, last_update_step_E
        return buffer

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self.ema_CE.device

    @property
    def phi_fast(self) -> Tensor:
        """The fast clock of every expert, bias-corrected, shape ``(E,)``, float64; 0 before the first update."""
        return read_clocks(self.ema_CE, self.updates)[0]

    @property
    def phi_mid(self) -> Tensor:
        """The mid clock, as :attr:`phi_fast`."""
        return read_clocks(self.ema_CE, self.updates)[1]

    @property
    def phi_slow(self) -> Tensor:
        """The slow clock, as :attr:`phi_fast`."""
        return read_clocks(self.ema_CE, self.updates)[2]

    def update(
        self, phi_raw: Tensor, active_expert_ids: Tensor | Iterable[int], step: int, num_tokens: Tensor | Iterable[int]
    ) -> None:
        """Add one step's phi to the clocks, without a transfer to the host.

        Args:
            phi_raw: shape ``(E,)`` (all experts) or ``(A,)`` (one value per active id).
            active_expert_ids: the A experts with evidence in this step, distinct, in [0, E).
            step: optimizer step.
            num_tokens: evidence tokens, shape ``(E,)`` or ``(A,)``.

        Raises:
            ConfigError: another shape.
        """
        ids_A = torch.as_tensor(active_expert_ids, dtype=torch.int64, device=self.device)
        active_E = torch.zeros(self.num_experts, dtype=torch.bool, device=self.device)
        active_E.index_fill_(0, ids_A, True)
        phi_E = self._scatter(torch.as_tensor(phi_raw, dtype=torch.float64, device=self.device), ids_A, "phi_raw")
        count_E = self._scatter(torch.as_tensor(num_tokens, dtype=torch.int64, device=self.device), ids_A, "num_tokens")
        phi_E = torch.where(active_E, phi_E, 0.0)
        update_clocks_(self.ema_CE, self.updates, phi_E, active_E)
        self.phi_raw.copy_(torch.where(active_E, phi_E, self.phi_raw))
        self.total_tokens_seen.add_(torch.where(active_E, count_E, 0))
        self.last_update_step.masked_fill_(active_E, step)

    def _scatter(self, values: Tensor, ids_A: Tensor, name: str) -> Tensor:
        if values.shape == (self.num_experts,):
            return values
        if values.shape != ids_A.shape:
            raise ConfigError(
                f"{name} has shape {tuple(values.shape)}; expected ({self.num_experts},) or {tuple(ids_A.shape)}"
            )
        return torch.zeros(self.num_experts, dtype=values.dtype, device=values.device).index_copy_(0, ids_A, values)

    def snapshot(self, step: int, stale_after: int = STALE_AFTER) -> dict[int, CoherenceState]:
        """All experts' state on the host, by index in the layer: the only transfer.

        Args:
            step: optimizer step now.
            stale_after: steps without a token after which an expert no longer counts as being observed.
        """
        clocks_CE = read_clocks(self.ema_CE, self.updates)
        counts = torch.stack([self.updates, self.total_tokens_seen, self.last_update_step]).double()
        table = torch.cat([clocks_CE, self.phi_raw[None], counts]).cpu().tolist()
        out = {}
        for expert, (fast, mid, slow, raw, updates, tokens, last) in enumerate(zip(*table, strict=True)):
            known = updates > 0
            out[expert] = CoherenceState(
                expert_id=expert_name(self.layer_id, expert),
                layer_id=self.layer_id,
                phi_fast=fast if known else None,
                phi_mid=mid if known else None,
                phi_slow=slow if known else None,
                last_update_step=int(last),
                total_tokens_seen=int(tokens),
                is_being_observed=known and step - last <= stale_after,
                phi_raw=raw if known else None,
                updates=int(updates),
                step=step,
            )
        return out
