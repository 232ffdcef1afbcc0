"""The device state of all wrapped layers, stacked, and the arithmetic of one optimizer step. No host sync.

Shape suffixes: L layers, E experts (padded to the widest layer), C clocks, R numbers of one accumulator row.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from chronomoe_hf.coherence import ALPHAS, CoherenceBuffer, read_clocks, update_clocks_
from chronomoe_hf.config import BetaConfig, VetoConfig
from chronomoe_hf.errors import StepError
from chronomoe_hf.recording.sums import META, PER_EXPERT, PER_LAYER
from chronomoe_hf.router.beta_laws import (
    balance_error,
    balance_step,
    centre_and_clamp,
    coherence_law,
    next_gain,
    relevance_of,
)
from chronomoe_hf.router.state import LOGIT_STD_ALPHA, RouterState


def check_step(step: Any) -> int:
    """`step` as an int, if it is the number of an optimizer step: an integer of 1 or more, and no bool.

    Raises:
        StepError: It is something else.
    """
    if isinstance(step, bool) or not isinstance(step, numbers.Integral) or step < 1:
        raise StepError(
            f"system.step takes the number of optimizer steps done, an integer of 1 or more (1 after the first), got "
            f"{step!r:.80}"
        )
    return int(step)


class Row:
    """Names the columns of a flat accumulator row ``[..., R]`` (counts, META, PER_EXPERT, PER_LAYER)."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.size = width + len(META) + len(PER_EXPERT) * width + len(PER_LAYER)

    def count(self, row: Any) -> Any:
        """Assignments per expert."""
        return row[..., : self.width]

    def meta(self, row: Any, name: str) -> Any:
        """One of META."""
        return row[..., self.width + META.index(name)]

    def expert(self, row: Any, name: str) -> Any:
        """One of PER_EXPERT."""
        start = self.width + len(META) + PER_EXPERT.index(name) * self.width
        return row[..., start : start + self.width]

    def layer(self, row: Any, name: str) -> Any:
        """One of PER_LAYER."""
        return row[..., self.size - len(PER_LAYER) + PER_LAYER.index(name)]


class StepState:
    """Stacked state of L layers; every tensor is plain and listed in :attr:`NAMES`.

    Args:
        num_experts: E of each layer.
        takes_beta: whether a law on beta acts on each layer; None = on all.
    """

    NAMES = (
        "beta_LE",
        "gain_LE",
        "ema_CLE",
        "phi_raw_LE",
        "updates_LE",
        "tokens_LE",
        "last_step_LE",
        "std_L",
        "std_updates_L",
        "logit_std_L",
        "relevance_L",
        "js_L",
        "flip_L",
        "overlap_L",
        "window_LR",
    )

    def __init__(self, num_experts: list[int], takes_beta: list[bool] | None = None) -> None:
        self.num_experts = num_experts
        num_layers, width = len(num_experts), max(num_experts)
        self.row = Row(width)
        wide = (num_layers, width)
        self.mask_LE = torch.arange(width)[None, :] < torch.tensor(num_experts)[:, None]
        self.beta_LE = torch.zeros(wide)
        self.gain_LE = torch.zeros(wide)
        self.beta_full_LE = torch.zeros(wide)
        self.beta_applied_LE = torch.zeros(wide)
        self.ema_CLE = torch.zeros(len(ALPHAS), *wide, dtype=torch.float64)
        self.phi_raw_LE = torch.zeros(wide, dtype=torch.float64)
        self.updates_LE = torch.zeros(wide, dtype=torch.int64)
        self.tokens_LE = torch.zeros(wide, dtype=torch.int64)
        self.last_step_LE = torch.full(wide, -1, dtype=torch.int64)
        self.std_L = torch.zeros(num_layers, dtype=torch.float64)
        self.std_updates_L = torch.zeros(num_layers, dtype=torch.int64)
        self.logit_std_L = torch.ones(num_layers)
        self.relevance_L = torch.ones(num_layers)
        self.js_L = torch.zeros(num_layers)
        self.flip_L = torch.zeros(num_layers)
        self.overlap_L = torch.zeros(num_layers)
        self.window_LR = torch.zeros(num_layers, self.row.size, dtype=torch.float64)
        self.closed_2L = torch.zeros(2, num_layers, dtype=torch.float64)
        self.untouched_L = torch.tensor([not takes for takes in takes_beta or [True] * num_layers])

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self.beta_LE.device

    def to_(self, device: torch.device) -> None:
        """Move every tensor; views held by RouterStates must be bound again."""
        for name in (*self.NAMES, "mask_LE", "beta_full_LE", "beta_applied_LE", "closed_2L", "untouched_L"):
            setattr(self, name, getattr(self, name).to(device))

    def bind(self, state: RouterState) -> None:
        """Make `state`'s tensors views of these stacked tensors."""
        layer, num = state.layer_id, state.num_experts
        state.beta_coeff = self.beta_LE[layer, :num]
        state.beta_full = self.beta_full_LE[layer, :num]
        state.beta_applied = self.beta_applied_LE[layer, :num]
        state.logit_std_ema = self.logit_std_L[layer]
        state.logit_std_updates = self.std_updates_L[layer]
        state.relevance = self.relevance_L[layer]
        state.disagreement_js = self.js_L[layer]
        state.disagreement_flip = self.flip_L[layer]
        state.overlap_only = self.overlap_L[layer]

    def coherence(self, layer: int) -> CoherenceBuffer:
        """The layer's clocks as a CoherenceBuffer over these stacked tensors."""
        num = self.num_experts[layer]
        return CoherenceBuffer.view(
            layer,
            self.ema_CLE[:, layer, :num],
            self.phi_raw_LE[layer, :num],
            self.updates_LE[layer, :num],
            self.tokens_LE[layer, :num],
            self.last_step_LE[layer, :num],
        )

    def update(self, row_LR: Tensor, step: int, veto: VetoConfig) -> None:
        """Add one optimizer step's sums (already summed over ranks) into window, clocks, logit std and veto.

        Args:
            row_LR: float64, see :class:`Row`.
            step: optimizer step just finished.
            veto: thresholds of the bridge veto.
        """
        row = self.row
        self.window_LR.add_(row_LR)
        count_LE = row.count(row_LR)
        self.tokens_LE.add_(count_LE.long())
        self.last_step_LE.masked_fill_(count_LE > 0, step)

        weight_LE = row.expert(row_LR, "phi_weight")
        active_LE = weight_LE > 0
        phi_LE = torch.where(active_LE, row.expert(row_LR, "phi_weighted") / weight_LE.clamp_min(1e-12), 0.0)
        update_clocks_(self.ema_CLE, self.updates_LE, phi_LE, active_LE)
        self.phi_raw_LE.copy_(torch.where(active_LE, phi_LE, self.phi_raw_LE))

        tokens_L = row.meta(row_LR, "tokens")
        std_L = (row.layer(row_LR, "logit_var") / tokens_L.clamp_min(1.0)).sqrt()
        seen_L = (tokens_L > 0) & (std_L > 0)
        self.std_L.copy_(
            torch.where(seen_L, self.std_L * LOGIT_STD_ALPHA + std_L * (1.0 - LOGIT_STD_ALPHA), self.std_L)
        )
        self.std_updates_L.add_(seen_L)
        corrected_L = self.std_L / (1.0 - LOGIT_STD_ALPHA ** self.std_updates_L.double()).clamp_min(1e-12)
        self.logit_std_L.copy_(torch.where(self.std_updates_L > 0, corrected_L, 1.0))

        compared_L = row.layer(row_LR, "compared")
        for target_L, name in ((self.js_L, "js"), (self.flip_L, "flip"), (self.overlap_L, "overlap")):
            measured_L = row.layer(row_LR, name) / compared_L.clamp_min(1.0)
            # A step without a comparison (beta still zero, or no token) says nothing new.
            target_L.copy_(torch.where(compared_L > 0, measured_L, target_L))
        if veto.enabled:
            signal_L = self.js_L if veto.signal == "js" else self.overlap_L
            self.relevance_L.copy_(relevance_of(signal_L, veto.threshold))

    def refresh(self, cap: float) -> None:
        """Recompute what the forward adds: relevance * clamp(beta, +-cap) * logit std."""
        self.beta_full_LE.copy_(self.beta_LE.clamp(-cap, cap) * self.logit_std_L[:, None])
        self.beta_applied_LE.copy_(self.beta_full_LE * self.relevance_L[:, None])

    def apply_balance(self, count_LE: Tensor, beta: BetaConfig, frozen_L: Tensor) -> Tensor:
        """One step of the balance law on beta, except for layers in `frozen_L` (their native bias is updated).

        Returns:
            The step of every layer in units of the rate, float64 ``(L, E)``, for the native biases.
        """
        error_LE = torch.where(self.mask_LE, balance_error(count_LE, self.mask_LE.sum(-1, keepdim=True)), 0.0)
        if beta.rule == "quadratic":
            self.gain_LE.copy_(next_gain(self.gain_LE, error_LE))
        step_LE = balance_step(error_LE, beta.rule, self.gain_LE)
        moved_LE = centre_and_clamp(self.beta_LE.double() + beta.rate * step_LE, beta.balance_cap, self.mask_LE)
        self.beta_LE.copy_(torch.where(frozen_L[:, None], self.beta_LE.double(), moved_LE))
        return step_LE

    def apply_coherence(self, step: int, beta: BetaConfig, frozen_L: Tensor | None = None) -> None:
        """The coherence law on all layers, except for those in `frozen_L` (bool)."""
        seen_LE = (self.updates_LE > 0) & (step - self.last_step_LE <= beta.stale_after) & self.mask_LE
        slow_LE = read_clocks(self.ema_CLE, self.updates_LE)[2]
        moved_LE = coherence_law(
            self.beta_LE,
            slow_LE,
            seen_LE,
            self.tokens_LE,
            eta=beta.eta,
            tau=beta.tau,
            k_max=beta.k_max,
            mask_LE=self.mask_LE,
            centred=beta.centred,
        )
        self.beta_LE.copy_(moved_LE if frozen_L is None else torch.where(frozen_L[:, None], self.beta_LE, moved_LE))

    def forget(self, keep_L: Tensor) -> None:
        """Multiply each layer's beta by `keep_L` (1 - forgetting)."""
        self.beta_LE.mul_(keep_L.to(self.beta_LE)[:, None])

    def checksum(self) -> Tensor:
        """What must be equal on all ranks, float64 ``(4,)``."""
        return torch.stack([self.beta_LE.double().sum(), self.ema_CLE.sum(), self.window_LR.sum(), self.std_L.sum()])

    def close_window(self) -> None:
        """Start a new window; of the old one, keep how many tokens steering sent to other experts."""
        self.closed_2L.copy_(self._steered())
        self.window_LR.zero_()

    def _steered(self) -> Tensor:
        return torch.stack([self.row.layer(self.window_LR, name) for name in ("topk_differs", "steered_tokens")])

    def topk_disagreement(self) -> list[float | None]:
        """Per layer, the share of real tokens whose experts are not those of the plain router; one transfer.

        Measured over the last closed window and the open one, on tokens routed while beta or a lens was steering.
        None for a layer where there were none. Counts start afresh when a state is loaded.
        """
        differs, steered = (self.closed_2L + self._steered()).cpu().tolist()
        return [d / s if s > 0.0 else None for d, s in zip(differs, steered, strict=True)]

    def host(self) -> dict[str, Any]:
        """Everything a snapshot reads, as numpy arrays: one transfer."""
        clocks_CLE = read_clocks(self.ema_CLE, self.updates_LE)
        parts: dict[str, Tensor] = {
            "window": self.window_LR,
            "phi_fast": clocks_CLE[0],
            "phi_mid": clocks_CLE[1],
            "phi_slow": clocks_CLE[2],
            "updates": self.updates_LE,
            "tokens": self.tokens_LE,
            "last_step": self.last_step_LE,
            "beta": self.beta_LE,
            "logit_std": self.logit_std_L,
            "relevance": self.relevance_L,
        }
        flat = torch.cat([value.double().reshape(-1) for value in parts.values()]).cpu().numpy()
        out, start = {}, 0
        for name, value in parts.items():
            out[name] = flat[start : start + value.numel()].reshape(value.shape)
            start += value.numel()
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of every tensor, by name."""
        return {name: getattr(self, name).detach().clone() for name in self.NAMES}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copy in place; shapes must agree (checked by the checkpoint room)."""
        for name in self.NAMES:
            getattr(self, name).copy_(tensors[name])
