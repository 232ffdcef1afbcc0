"""The device state of all wrapped layers, stacked: what there is of it, where it lies, and how it gets to the host.

Shape suffixes: L layers, E experts (padded to the widest layer), C clocks, R numbers of one accumulator row, N the
two numbers about the loss (loss tokens, forwards that were given labels).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chronomoe_hf.coherence import ALPHAS, CoherenceBuffer, read_clocks
from chronomoe_hf.recording.columns import Row
from chronomoe_hf.recording.role_sums import RoleState
from chronomoe_hf.router.state import LOGIT_STD_ALPHA, RouterState

# Names of the stacked tensors that share one storage, so that one operation or one copy serves all of them.
_CLOCKS = ("ema_CLE", "phi_raw_LE")
_WIDE = ("beta_LE", "beta_full_LE", "beta_applied_LE")
_NARROW = ("logit_std_L", "relevance_L", "js_L", "flip_L", "overlap_L")


class StackedState:
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
