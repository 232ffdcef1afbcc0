"""Where sums are kept between steps, on the device of each router.

Shape suffixes: L layers, R numbers of one row, G layers of a chunk, C some columns, N the two numbers about the loss
(loss tokens, forwards that were given labels).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from chronomoe_hf.recording.columns import Row
from chronomoe_hf.recording.expert_sums import Reading
from chronomoe_hf.recording.faults import Faults
from chronomoe_hf.recording.role_sums import RoleState
from chronomoe_hf.recording.rows import IGNORED, PadToken

Recorded = Literal["train", "eval"]


class Sums:
    """The sums of all layers since the last step: one float64 ``[L, R]`` for training and one for evaluation.

    Where routers lie on several devices, each device has such a pair and holds the rows of its own layers.

    Args:
        num_layers: L.
        width: experts of the widest layer.
        roles: where training adds what roles need; None = nowhere.

    Attributes:
        labels: of the running forward, aligned with what is predicted; None where it was given none.
        tokens: ids ``(B, S)`` that the model around the owners was given, and its padding token; None where it was not.
        faults: what has failed in a forward, of all layers.
    """

    def __init__(self, num_layers: int, width: int, roles: RoleState | None = None) -> None:
        self.num_layers = num_layers
        self.roles = roles
        self.row = Row(width)
        self.parts: dict[Recorded, dict[torch.device, Tensor]] = {"train": {}, "eval": {}}
        self.loss_parts: dict[Recorded, dict[torch.device, Tensor]] = {"train": {}, "eval": {}}
        self.labels: Tensor | None = None
        self.tokens: tuple[Tensor, PadToken] | None = None
        self.faults = Faults()

    def on(self, mode: Recorded, device: torch.device) -> Tensor:
        """The sums on `device`, ``(L, R)``; made when first asked for."""
        part = self.parts[mode].get(device)
        if part is None:
            part = torch.zeros(self.num_layers, self.row.size, dtype=torch.float64, device=device)
            self.parts[mode][device] = part
        return part

    def more(self, mode: Recorded, layer_ids: Sequence[int]) -> Callable[[Reading], None] | None:
        """What else a reading of these layers' outputs is shown to."""
        if self.roles is None or mode != "train":
            return None
        return functools.partial(self.roles.add, layer_ids)

    def settle(self, devices: set[torch.device], home: torch.device) -> None:
        """Have a pair on each of `devices`, and move what lies elsewhere to `home`."""
        for mode, parts in self.parts.items():
            for device in devices:
                self.on(mode, device)
            for device in set(parts) - devices:
                self.on(mode, home).add_(parts.pop(device).to(home))
            for device in set(self.loss_parts[mode]) - devices - {home}:
                self._loss_on(mode, home).add_(self.loss_parts[mode].pop(device).to(home))

    def _loss_on(self, mode: Recorded, device: torch.device) -> Tensor:
        if device not in self.loss_parts[mode]:
            self.loss_parts[mode][device] = torch.zeros(2, dtype=torch.float64, device=device)
        return self.loss_parts[mode][device]

    def count_labels(self, mode: Recorded) -> None:
        """Add the loss tokens of the running forward, once, however many scopes are in it."""
        labels, self.labels = self.labels, None
        if labels is not None:
            loss_N = self._loss_on(mode, labels.device)
            loss_N[0].add_((labels != IGNORED).sum())
            loss_N[1].add_(1.0)

    def loss(self, mode: Recorded, home: torch.device) -> Tensor:
        """Loss tokens and forwards that were given labels, float64 ``(2,)`` on `home`; `zero` leaves it as it is."""
        parts = [part_N.to(home) for part_N in self.loss_parts[mode].values()]
        if len(parts) == 1:
            return parts[0]
        return sum(parts, torch.zeros(2, dtype=torch.float64, device=home))

    def add(self, mode: Recorded, layer_ids: Sequence[int], columns: slice, value_GC: Tensor) -> None:
        """Add to some columns of distinct layers."""
        target_LC = self.on(mode, value_GC.device)[:, columns]
        first, num = layer_ids[0], len(layer_ids)
        if tuple(layer_ids) == tuple(range(first, first + num)):
            target_LC[first : first + num].add_(value_GC)
        else:
            target_LC.index_add_(0, _index(tuple(layer_ids), value_GC.device), value_GC.double())

    def total(self, mode: Recorded, home: torch.device, graph_rows: Sequence[Tensor]) -> Tensor:
        """The sums of all layers, a new tensor ``(L, R)`` on `home`.

        Args:
            mode: of training or of evaluation.
            home: where they are wanted.
            graph_rows: float64 ``(R,)`` per layer: what compiled graphs have added.
        """
        total_LR = torch.stack([row_R.to(home) for row_R in graph_rows])
        for part_LR in self.parts[mode].values():
            total_LR.add_(part_LR.to(home))
        return total_LR

    def zero(self, mode: Recorded, more: Sequence[Tensor]) -> None:
        """Start at zero again, with all of `more`: one launch for all tensors of one device and dtype."""
        alike: dict[Any, list[Tensor]] = {}
        for tensor in (*self.parts[mode].values(), *more):
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        for tensors in alike.values():
            torch._foreach_zero_(tensors)
        self.loss_parts[mode].clear()  # the next labels start a new one


_INDEX: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def _index(layer_ids: tuple[int, ...], device: torch.device) -> Tensor:
    """The ids on a device; kept, so that they are moved there once."""
    key = (layer_ids, device)
    if key not in _INDEX:
        _INDEX[key] = torch.tensor(layer_ids, device=device)
    return _INDEX[key]
