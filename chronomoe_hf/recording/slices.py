"""Blocks that are called in slices of a forward's rows (tiled MLPs), each time with the next rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

UNKNOWN = -1
"""Where a call begins that may be a slice, and nothing says so yet: all its rows are read."""


class Slices:
    """Where each call begins among the rows of a forward.

    That calls were slices is known once the forward ends, so what is read at a call goes by the forward before. The
    slices of a batch of several rows may be cut in more than one way: those are not told apart.

    Attributes:
        found: the running forward calls a block several times with a part of its rows.
        lately: the last forward did, and its slices covered all rows.
    """

    def __init__(self) -> None:
        self.lately = self.found = False
        self._num_rows = 0
        self._taken: dict[tuple[str, int], int] = {}

    def begin(self, named: Mapping[str, Any], mask_T: Tensor | None) -> None:
        """A forward with these arguments, whose real tokens are `mask_T`. A compiled one is not looked at."""
        if torch.compiler.is_compiling():
            return
        given = [named.get(name) for name in ("input_ids", "inputs_embeds")]
        batch = next((each.shape[0] for each in given if isinstance(each, Tensor) and each.dim() >= 2), None)
        self._num_rows = 0 if mask_T is None or batch != 1 else int(mask_T.shape[0])
        self._taken = {}
        self.found = False

    def place(self, kind: str, layer_id: int, num_rows: int) -> int | None:
        """The row of the forward where a call begins, if it may be a slice of the forward's rows; else None.

        Args:
            kind: of what is read, ``"routing"`` or another; each is counted for itself.
            layer_id: of the layer.
            num_rows: rows of the call.
        """
        if torch.compiler.is_compiling() or num_rows >= self._num_rows:
            return None
        begun = self._taken.get((kind, layer_id), 0)
        self._taken[kind, layer_id] = begun + num_rows
        if kind != "routing":
            return begun if self.lately else UNKNOWN
        self.found = self.found or begun > 0
        return begun

    def end(self) -> None:
        """The forward is over: whether the calls of each layer have covered its rows."""
        ends = {rows for (kind, _), rows in self._taken.items() if kind == "routing"}
        self.found = self.lately = self.found and ends == {self._num_rows}

    def part(self, mask_T: Tensor, at: int | None, num_rows: int) -> Tensor | None:
        """Real tokens of a call that begins at row `at`; None where it is no slice."""
        if at is None or at == UNKNOWN or not (self.found or self.lately) or at + num_rows > mask_T.shape[0]:
            return None
        return mask_T[at : at + num_rows]
