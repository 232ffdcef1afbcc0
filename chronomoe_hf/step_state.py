"""The stacked device state of all wrapped layers, and the arithmetic of one optimizer step on it. No host sync.

Shape suffixes: L layers, E experts (padded to the widest layer), C clocks, R numbers of one accumulator row, N the
two numbers about the loss (loss tokens, forwards that were given labels).
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chronomoe_hf.coherence import ALPHAS, CoherenceBuffer, read_clocks, update_clocks_
from chronomoe_hf.config import BetaConfig, VetoConfig
from chronomoe_hf.errors import StepError
from chronomoe_hf.recording.columns import Row
from chronomoe_hf.recording.role_sums import RoleState
from chronomoe_hf.router.laws import (
    balance_error,
    balance_step,
    centre_and_clamp,
    coherence_law,
    next_gain,
    relevance_of,
    zone_bounds,
    zone_error,
)
from chronomoe_hf.router.state import LOGIT_STD_ALPHA, RouterState

# Names of the stacked tensors that share one storage, so that one operation or one copy serves all of them.
_WIDE = ("beta_LE", "beta_full_LE", "beta_applied_LE")
_NARROW = ("logit_std_L", "relevance_L", "js_L", "flip_L", "overlap_L")


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


class StepState:
    """Stacked state of L layers; every tensor is plain and listed in :attr:`NAMES`.

    Args:
        num_experts: E of each layer.
        takes_beta: whether a law on beta acts on each layer; None = on all.
        top_k: k of each layer, for the ceiling of its shares; None = not known.
        roles: of the experts, where they are kept; not stacked, since widths differ and each lies with its layer.
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
        "loss_N",
    )

    def __init__(
        self,
        num_experts: list[int],
        takes_beta: list[bool] | None = None,
        top_k: list[int] | None = None,
        roles: RoleState | None = None,
    ) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.roles = roles
        self._zones: dict[Any, tuple[Tensor, Tensor]] = {}
        self._num_choices = list(num_experts)  # without what was cut
        num_layers, width = len(num_experts), max(num_experts)
        self.row = Row(width)
        wide = (num_layers, width)
        self.mask_LE = torch.arange(width)[None, :] < torch.tensor(num_experts)[:, None]
        self.untouched_L = torch.tensor([not takes for takes in takes_beta or [True] * num_layers])
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
        self.loss_N = torch.zeros(2, dtype=torch.float64)
        self.closed_2L = torch.zeros(2, num_layers, dtype=torch.float64)
        # Constants: the raw phi is a clock that forgets at once; what each expert's count is divided by, and so on.
        self._rate_C = torch.tensor([*(1.0 - alpha for alpha in ALPHAS), 1.0], dtype=torch.float64)
        self._std_rate = torch.full((1,), 1.0 - LOGIT_STD_ALPHA, dtype=torch.float64)
        self._num_L1 = torch.tensor(num_experts, dtype=torch.float64)[:, None]
        self._mask64_LE = self.mask_LE.double()
        self._some_beta = takes_beta is None or any(takes_beta)
        self._even = len(set(num_experts)) == 1
        self.mirrors: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._pack()

    def _pack(self) -> None:
        """Put tensors that are updated or copied together into one storage each; the attributes become views of it."""
        self._clocks_CLE = torch.cat([self.ema_CLE, self.phi_raw_LE[None]])
        self.ema_CLE, self.phi_raw_LE = self._clocks_CLE[:-1], self._clocks_CLE[-1]
        self._wide_3LE = torch.stack([getattr(self, name) for name in _WIDE])
        self._narrow_5L = torch.stack([getattr(self, name) for name in _NARROW])
        for packed, names in ((self._wide_3LE, _WIDE), (self._narrow_5L, _NARROW)):
            for at, name in enumerate(names):
                setattr(self, name, packed[at])
        self._gate_LE = (self.mask_LE & ~self.untouched_L[:, None]).double()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pack()  # copying separates views from their storage
        self.mirrors = {}

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self.beta_LE.device

    def to_(self, device: torch.device) -> None:
        """Move every tensor; views held by RouterStates must be bound again."""
        if device == self.device:
            return
        constants = ("mask_LE", "closed_2L", "untouched_L", "_rate_C", "_std_rate", "_num_L1", "_mask64_LE")
        for name in {*self.NAMES, *_WIDE, *constants}:
            setattr(self, name, getattr(self, name).to(device))
        self._zones.clear()
        self._pack()

    def bind(self, state: RouterState, device: torch.device | None = None) -> None:
        """Make `state`'s tensors views of these stacked tensors, or, on another device, of a mirror of them.

        Args:
            state: of one layer.
            device: where its router runs; None = here.
        """
        wide_3LE, narrow_5L = self._wide_3LE, self._narrow_5L
        if device is not None and device != self.device:
            if device not in self.mirrors:
                self.mirrors[device] = (wide_3LE.to(device), narrow_5L.to(device))
            wide_3LE, narrow_5L = self.mirrors[device]
        layer, num = state.layer_id, state.num_experts
        fields = ("beta_coeff", "beta_full", "beta_applied")
        for at, name in enumerate(fields):
            setattr(state, name, wide_3LE[at, layer, :num])
        shown = ("logit_std_ema", "relevance", "disagreement_js", "disagreement_flip", "overlap_only")
        for at, name in enumerate(shown):
            setattr(state, name, narrow_5L[at, layer])
        state.logit_std_updates = self.std_updates_L[layer]

    def publish(self) -> None:
        """Bring the mirrors on other devices in line; nothing on one device."""
        for wide_3LE, narrow_5L in self.mirrors.values():
            wide_3LE.copy_(self._wide_3LE)
            narrow_5L.copy_(self._narrow_5L)

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

    def cut(self, dropped: Sequence[Sequence[int]]) -> None:
        """Leave experts out of every law: their beta is 0, and the fair share is that of the others.

        Args:
            dropped: ids per layer; those of an earlier call are forgotten, so that empty lists bring all back.
        """
        width = self.mask_LE.shape[-1]
        mask_LE = torch.arange(width)[None, :] < torch.tensor(self.num_experts)[:, None]
        for layer, ids in enumerate(dropped):
            mask_LE[layer, list(ids)] = False
        self.mask_LE = mask_LE.to(self.device)
        self._mask64_LE = self.mask_LE.double()
        self._num_L1 = self._mask64_LE.sum(-1, keepdim=True)
        self._num_choices = [int(num) for num in mask_LE.sum(-1)]
        self._zones.clear()
        self._even = bool(mask_LE.all())
        self.beta_LE.mul_(self.mask_LE)
        self.gain_LE.mul_(self.mask_LE)
        self._gate_LE = (self.mask_LE & ~self.untouched_L[:, None]).double()

    def set_top_k(self, top_k: list[int]) -> None:
        """Tokens get another number of experts from now on: the edges of the balance law's zone follow."""
        self.top_k = top_k
        self._zones.clear()

    def checksum(self) -> Tensor:
        """What must be equal on all ranks, float64 ``(4,)``."""
        return torch.stack([self.beta_LE.double().sum(), self.ema_CLE.sum(), self.window_LR.sum(), self.std_L.sum()])

    def close_window(self) -> None:
        """Start a new window; of the old one, keep how many tokens steering sent to other experts."""
        self.closed_2L.copy_(self._steered())
        self.drop_window()

    def drop_window(self) -> None:
        """Forget the open window."""
        self.window_LR.zero_()
        self.loss_N.zero_()
        if self.roles is not None:
            self.roles.drop_window()

    def _steered(self) -> Tensor:
        return torch.stack([self.row.layer(self.window_LR, name) for name in ("topk_differs", "steered_tokens")])

    def topk_disagreement(self) -> list[float | None]:
        """Per layer, the share of real tokens whose experts are not those of the plain router; one transfer.

        Measured over the last closed window and the open one, on tokens routed while beta or a lens was steering.
        None for a layer where there were none. Counts start afresh when a state is loaded.
        """
        differs, steered = (self.closed_2L + self._steered()).cpu().tolist()
        return [d / s if s > 0.0 else None for d, s in zip(differs, steered, strict=True)]

    def remember_disagreement(self, shares: Sequence[float | None]) -> None:
        """Take over what a saved state knew of :meth:`topk_disagreement`, until windows of this run say more.

        Args:
            shares: per layer; anything but one a layer forgets what was known.
        """
        self.closed_2L.zero_()
        if len(shares) != self.closed_2L.shape[1]:
            return
        known = torch.tensor([[share or 0.0, float(share is not None)] for share in shares])
        self.closed_2L.copy_(known.T.to(self.closed_2L.dtype))

    def host(self) -> dict[str, Any]:
        """Everything a snapshot reads, as numpy arrays: one transfer."""
        clocks_CLE = read_clocks(self.ema_CLE, self.updates_LE)
        parts: dict[str, Tensor] = {
            "window": self.window_LR,
            "loss": self.loss_N,
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

    # ---- an optimizer step, and what the laws do to it -------------------------------------------------------------

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
        """The EMA of the logit standard deviation, and its bias-corrected value."""
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
