"""The arithmetic of one optimizer step on the stacked state of all wrapped layers. No host sync.

Shape suffixes: L layers, E experts (padded to the widest layer), R numbers of one accumulator row, N the two numbers
about the loss (loss tokens, forwards that were given labels).
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from chronomoe_hf.coherence import read_clocks, update_clocks_
from chronomoe_hf.config import BetaConfig, VetoConfig
from chronomoe_hf.errors import StepError
from chronomoe_hf.router.dead_zone import zone_bounds, zone_error
from chronomoe_hf.router.laws import (
    balance_error,
    balance_step,
    centre_and_clamp,
    coherence_law,
    next_gain,
    relevance_of,
)
from chronomoe_hf.router.state import LOGIT_STD_ALPHA
from chronomoe_hf.step_state.storage import StackedState


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


class StepState(StackedState):
    """Stacked state of L layers and what an optimizer step and the laws do to it; see :class:`StackedState`."""

    def update(
        self, row_LR: Tensor, step: int, veto: VetoConfig, compared: bool = True, loss_N: Tensor | None = None
    ) -> None:
        """Add one optimizer step's sums (already summed over ranks) into window, clocks, logit std and veto.

        Args:
            row_LR: float64, see :class:`Row`.
            step: optimizer step just finished.
            veto: thresholds of the bridge veto.
            compared: disagreement was measured; without, its columns are empty.
            loss_N: float64 ``(2,)``, see ``Taken``; None = no labels were seen.
        """
        row = self.row
        if loss_N is None:
            self.window_LR.add_(row_LR)
        else:
            torch._foreach_add_([self.window_LR, self.loss_N], [row_LR, loss_N])
        count_LE = row.count(row_LR)
        self.tokens_LE.add_(count_LE.long())
        self.last_step_LE.masked_fill_(count_LE > 0, step)
        weight_LE = row.expert(row_LR, "phi_weight")
        phi_LE = (row.expert(row_LR, "phi_weighted") / weight_LE).nan_to_num_(0.0)
        update_clocks_(self._clocks_CLE, self.updates_LE, phi_LE, weight_LE > 0, self._rate_C)
        self._update_std(row.layer(row_LR, "logit_var"), row.meta(row_LR, "tokens"))
        if compared:
            compared_L = row.layer(row_LR, "compared")
            measured_3L = row.disagreement(row_LR).T / compared_L.clamp_min(1.0)
            # A step without a comparison (beta still zero, or no token) says nothing new.
            shown_3L = self._narrow_5L[2:]
            shown_3L.copy_(torch.where(compared_L > 0, measured_3L, shown_3L))
        if veto.enabled:
            signal_L = self.js_L if veto.signal == "js" else self.overlap_L
            self.relevance_L.copy_(relevance_of(signal_L, veto.threshold))

    def _update_std(self, var_L: Tensor, tokens_L: Tensor) -> None:
        """The EMA of the logit standard deviation, and its value corrected for its youth."""
        std_L = (var_L / tokens_L.clamp_min(1.0)).sqrt_()
        seen_L = std_L > 0
        self.std_L.lerp_(std_L, seen_L * self._std_rate)
        self.std_updates_L.add_(seen_L)
        # Before the first update this is 0 / 0, which reads as 1.
        corrected_L = self.std_L / (1.0 - LOGIT_STD_ALPHA ** self.std_updates_L.double())
        self.logit_std_L.copy_(corrected_L.nan_to_num_(1.0))

    def refresh(self, cap: float) -> None:
        """Recompute what the forward adds: relevance * clamp(beta, +-cap) * logit std."""
        if not self._some_beta:
            return  # every layer has a native bias that moves instead
        torch.clamp(self.beta_LE, -cap, cap, out=self.beta_full_LE)
        self.beta_full_LE.mul_(self.logit_std_L[:, None])
        torch.mul(self.beta_full_LE, self.relevance_L[:, None], out=self.beta_applied_LE)

    def apply_balance(self, count_LE: Tensor, beta: BetaConfig, frozen_L: Tensor | None = None) -> Tensor:
        """One step of the balance law on beta, except for layers in `frozen_L` (their native bias is updated).

        The step is centred and the result clamped. A clamp that acts leaves a part that is common to all experts, which
        no choice depends on; :meth:`recentre` takes it away when a window closes.

        Args:
            count_LE: the step's assignments.
            beta: the law.
            frozen_L: bool; None = the layers that take no beta.

        Returns:
            The step of every layer in units of the rate, centred, float64 ``(L, E)``, for the native biases.
        """
        error_LE = self._error(count_LE, beta)
        if not self._even:
            error_LE.mul_(self._mask64_LE)  # padding is no idle expert
        if beta.rule == "quadratic":
            self.gain_LE.copy_(next_gain(self.gain_LE, error_LE))
            step_LE = self.gain_LE * error_LE.square()  # the law's gain * e |e|: a gain has the sign of its last error
        else:
            step_LE = balance_step(error_LE, beta.rule)
        mean_L1 = step_LE.mean(-1, keepdim=True) if self._even else step_LE.sum(-1, keepdim=True) / self._num_L1
        step_LE = step_LE - mean_L1
        if not self._even:
            step_LE.mul_(self._mask64_LE)
        if self._some_beta:
            gate_LE = self._gate_LE if frozen_L is None else self._mask64_LE * ~frozen_L[:, None]
            self.beta_LE.addcmul_(step_LE, gate_LE, value=beta.rate).clamp_(-beta.balance_cap, beta.balance_cap)
        return step_LE

    def _error(self, count_LE: Tensor, beta: BetaConfig) -> Tensor:
        """How far each expert is off, with the dead zone and the first layer's own rule where the law has them."""
        if beta.dead_zone is None and beta.first_layer == "same":
            return balance_error(count_LE, self._num_L1)
        zone = (beta.dead_zone, beta.first_layer, beta.first_floor)
        if zone not in self._zones:
            low_L1, high_L1 = zone_bounds(self._num_choices, self.top_k, *zone)
            self._zones[zone] = (low_L1.to(self.device), high_L1.to(self.device))
        return zone_error(count_LE, self._num_L1, *self._zones[zone])

    def recentre(self, cap: float) -> None:
        """Zero-centre the betas within +-cap, exactly, but for layers that take no beta."""
        moved_LE = centre_and_clamp(self.beta_LE.double(), cap, self.mask_LE)
        self.beta_LE.copy_(torch.where(self.untouched_L[:, None], self.beta_LE.double(), moved_LE))

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
