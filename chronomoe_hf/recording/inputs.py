"""Router inputs on the tape: what the lens's reader is fitted on, for layers of one shape together.

In a forward each layer leaves the sum of its inputs, which of its rows are real, and a copy of the sampled rows (the
inputs themselves may be gone when the scope closes). Fitting waits for a full buffer, or for the end.

Shape suffixes: G layers of a chunk, T router rows (tokens), D router input width, N rows that the reader is fitted on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from chronomoe_hf.config import ReaderName
from chronomoe_hf.lens.direction import Folds, reader_sums, sum_real
from chronomoe_hf.recording.faults import guarded
from chronomoe_hf.recording.rows import TokenSample


class InputLayer(Protocol):
    """What must be known of a layer's recorder."""

    reader: ReaderName
    inputs: Tensor | None

    def fail(self, error: Exception) -> None:
        """Summing its inputs has failed."""


@dataclass
class _Chunk:
    """Room for G layers of one shape."""

    rows_GND: Tensor
    sum_GD: Tensor
    folds: Folds
    layers: list[InputLayer] = field(default_factory=list)
    real: list[Tensor] = field(default_factory=list)


class InputTape:
    """Router inputs of the running forward, until they are summed.

    Args:
        num_layers: most layers that there are.
        limit: bytes that summing a chunk may take.
    """

    def __init__(self, num_layers: int, limit: int) -> None:
        self.num_layers = num_layers
        self.limit = limit
        self.chunks: dict[Any, _Chunk] = {}
        self.folds: dict[Any, Folds] = {}

    def clear(self) -> None:
        """Forget everything."""
        self.chunks.clear()
        self.folds.clear()

    def held(self, device: torch.device) -> int:
        """Bytes that router inputs take on a device, summing them included."""
        return sum(self.limit for chunk in self.chunks.values() if chunk.rows_GND.device == device)

    def add(self, layer: InputLayer, x_TD: Tensor, real_T: Tensor, sample: TokenSample) -> None:
        """One call of a router.

        Args:
            layer: whose call.
            x_TD: its inputs, detached.
            real_T: bool, real tokens.
            sample: of the tokens that the reader is fitted on.
        """
        key = (x_TD.shape, x_TD.dtype, x_TD.device, layer.reader)
        chunk = self.chunks.get(key)
        if chunk is not None and any(each is layer for each in chunk.layers):  # called twice in a forward
            self._sum(self.chunks.pop(key))
            chunk = None
        if chunk is None:
            chunk = self.chunks[key] = self._chunk(x_TD, sample)
        at = len(chunk.layers)
        torch.index_select(x_TD, 0, chunk.folds.position_N, out=chunk.rows_GND[at])
        sum_real(x_TD, real_T, out=chunk.sum_GD[at])
        chunk.layers.append(layer)
        chunk.real.append(real_T)
        if at + 1 == chunk.rows_GND.shape[0]:
            self._sum(self.chunks.pop(key))

    def sum_up(self) -> None:
        """Add everything to the sums of the layers and forget it."""
        while self.chunks:
            self._sum(self.chunks.popitem()[1])
        self.clear()

    def _chunk(self, x_TD: Tensor, sample: TokenSample) -> _Chunk:
        num_rows, width = x_TD.shape
        at = (num_rows, x_TD.device)
        if at not in self.folds:
            self.folds[at] = Folds.of(num_rows, sample.position_S, sample.valid_S, x_TD.device)
        folds = self.folds[at]
        num = folds.position_N.shape[0]
        working = num * width * (2 * x_TD.element_size() + 4) + 4 * num * num + num_rows
        size = max(1, min(self.num_layers, self.limit // max(1, working)))
        return _Chunk(x_TD.new_empty(size, num, width), x_TD.new_empty(size, width, dtype=torch.float32), folds)

    def _sum(self, chunk: _Chunk) -> None:
        def failed(error: Exception) -> None:
            for layer in chunk.layers:
                layer.fail(error)

        guarded(failed, self._add, chunk)

    def _add(self, chunk: _Chunk) -> None:
        num, layers = len(chunk.layers), chunk.layers
        with torch.no_grad(), torch.autocast(chunk.rows_GND.device.type, enabled=False):
            real_GT = chunk.real[0][None] if num == 1 else torch.stack(chunk.real)
            value_GC = reader_sums(chunk.sum_GD[:num], chunk.rows_GND[:num], real_GT, chunk.folds, layers[0].reader)
            values: list[Tensor] = list(value_GC.unbind())
            torch._foreach_add_([layer.inputs for layer in layers if layer.inputs is not None], values)
