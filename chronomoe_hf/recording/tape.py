"""The tape of a running forward: routers and experts only leave references here; closing the scope sums them up.

Layers of one shape are summed together, in chunks of as many as fit into a limit (``recording/budget.py``). Expert rows
are the one thing that is copied (the backend's own are too large to keep), into a buffer for as many layers as fit. A
full chunk, of expert rows or of router calls, is summed at once, the rest when the scope closes. Only then are the few
numbers an expert that are left put into their columns, once for all chunks, and added: a forward that fails before it
is in no sum. On a device, where it is launches that cost, the tokens on which beta's effect is measured are kept till
then too, and compared in as few chunks as fit.

Shape suffixes: L layers, E experts, T router rows (tokens), K experts per token, S tokens read, D width, R numbers of
one row, G layers of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chronomoe_hf.recording.budget import limit_of, sizes
from chronomoe_hf.recording.calls import (
    Compared,
    Layerlike,
    Masker,
    OutputCall,
    OutputChunk,
    RoutedCall,
    Sampler,
    Waiting,
    compared_later,
    distinct_runs,
    groups_of,
    layers_of,
    output_batch,
    row_pieces,
    runs_of,
    sums_of,
    telling,
    waiting_bytes,
)
from chronomoe_hf.recording.expert_sums import OutputParts, output_parts, output_table
from chronomoe_hf.recording.faults import guarded
from chronomoe_hf.recording.inputs import InputTape
from chronomoe_hf.recording.reduce import DISAGREEMENT_SAMPLE, RoutingParts, routing_table
from chronomoe_hf.recording.rows import TokenSample
from chronomoe_hf.recording.totals import Recorded, Sums

LIMIT: int | None = None
"""Bytes that layers may take together; None = as ``recording/budget.py`` says of the device."""


class Tape:
    """References kept until the forward ends, when they are summed.

    Args:
        sums: where it goes.
    """

    def __init__(self, sums: Sums) -> None:
        self.sums = sums
        self.calls: list[RoutedCall] = []
        self.chunks: dict[Any, OutputChunk] = {}
        self.inputs = InputTape(sums.num_layers, 32 * 2**20)
        self._waiting: dict[Any, Waiting] = {}  # calls by key
        # What was summed, by layers alone: a call would keep its logits alive to the end of the forward.
        self._routed: dict[Any, list[tuple[list[Layerlike], RoutingParts]]] = {}
        self._read: dict[Any, list[tuple[list[Layerlike], OutputParts]]] = {}
        self._pieces: list[tuple[list[int], slice, Tensor]] = []
        self._compared: dict[Any, list[Compared]] = {}

    def clear(self) -> None:
        """Forget everything."""
        held = (self.calls, self.chunks, self.inputs, self._waiting, self._routed, self._read, self._pieces)
        for each in (*held, self._compared):
            each.clear()

    def room(self, device: torch.device) -> int:
        """Bytes that router calls may take together, beside what holds expert rows and router inputs now."""
        limit = limit_of(device, self.sums.num_layers) if LIMIT is None else LIMIT
        if device.type == "cpu" or LIMIT is not None:
            return limit
        rows = sum(chunk.rows_GSKD.nbytes for chunk in self.chunks.values() if chunk.rows_GSKD.device == device)
        waiting = sum(each.logits_GSE.nbytes for group in self._compared.values() for each in group)
        return limit - rows - waiting - self.inputs.held(device)

    def remember(self, mode: Recorded, call: RoutedCall, mask: Masker, sample: Sampler) -> None:
        """One router call; sums those of its kind that are waiting if no more of them fit.

        Args:
            mode: of the forward.
            call: what it decided.
            mask: real tokens of so many rows on a device, from a row of the forward on.
            sample: of these.
        """
        key = call.key
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = Waiting(call.bytes + call.held)
        elif (waiting.num + 1) * waiting.size > self.room(call.logits_TE.device):
            due = [other for other in self.calls if other.key == key]
            self.calls = [other for other in self.calls if other.key != key]
            self._sum_calls(due, mask, sample)
            waiting.num = 0
        waiting.num += 1
        self.calls.append(call)

    def slot(
        self, mode: Recorded, shape: tuple[int, int, int], like: Tensor, sample: TokenSample, every: int, divided: bool
    ) -> OutputChunk:
        """A chunk with room for one more layer's rows of that shape; one of another sample is summed.

        Args:
            mode: of the forward.
            shape: (S, K, D).
            like: a tensor of the rows' dtype and device.
            sample: which tokens are read.
            every: of how many micro-batches this is the one that is read.
            divided: see ``OutputBatch``.
        """
        key = (shape, like.dtype, like.device, divided)
        chunk = self.chunks.get(key)
        if chunk is not None and chunk.sample is not sample:
            self._sum_outputs(mode, self.chunks.pop(key))
            chunk = None
        if chunk is None:
            scale = sample.scale if every == 1 else sample.scale * every
            chunk = OutputChunk(like.new_empty(self._layers(shape, like), *shape), sample, scale, divided)
            self.chunks[key] = chunk
        return chunk

    def _layers(self, shape: tuple[int, int, int], like: Tensor) -> int:
        """Layers whose rows are to share a chunk."""
        num_tokens, num_k, width = shape
        rows = num_tokens * num_k * width * like.element_size()
        # The larger of what comes one after the other: numbers of every slot and expert, coefficients and products.
        num_slots = num_tokens * num_k
        products = 2 * (num_slots * (like.element_size() + 1) + 4 * width)
        working = self.sums.row.width * max(17 * num_slots, products)
        working += 0 if self.sums.roles is None else rows + working
        limit = limit_of(like.device, self.sums.num_layers) if LIMIT is None else LIMIT
        if like.device.type == "cpu" or LIMIT is not None:
            return max(1, min(self.sums.num_layers, limit // (rows + working)))
        call = self.calls[-1] if self.calls and self.calls[-1].logits_TE.device == like.device else None
        routing = (0, 0) if call is None else (call.bytes, call.held)
        limit -= self.inputs.held(like.device) + (0 if call is None else self.sums.num_layers * waiting_bytes(call))
        return sizes(limit, self.sums.num_layers, (rows, working), routing)

    def added(self, mode: Recorded, chunk: OutputChunk, call: OutputCall) -> None:
        """The caller has written a layer's rows; sums the chunk if it is full."""
        chunk.calls.append(call)
        if chunk.full:
            self.chunks = {key: other for key, other in self.chunks.items() if other is not chunk}
            self._sum_outputs(mode, chunk)

    def sum_up(self, mode: Recorded, mask: Masker, sample: Sampler) -> None:
        """Add everything to the sums and forget it."""
        chunks, calls = list(self.chunks.values()), self.calls
        self.chunks, self.calls = {}, []
        while chunks:
            self._sum_outputs(mode, chunks.pop())
        self.inputs.sum_up()
        self._sum_calls(calls, mask, sample)
        for read in self._read.values():
            for outputs in distinct_runs(read):
                of_outputs = [layer for layers, _ in outputs for layer in layers]
                guarded(
                    telling(of_outputs, "fail_outputs"), self._add_outputs, mode, of_outputs, [p for _, p in outputs]
                )
        for key, routed in self._routed.items():
            later = {id(each.layers): each for each in self._compared.pop(key, [])}
            for routing in distinct_runs(routed):
                of_routing = [layer for layers, _ in routing for layer in layers]
                due = [later.pop(id(layers)) for layers, _ in routing if id(layers) in later]
                sums = [part for _, part in routing]
                guarded(telling(of_routing, "fail"), self._add_routing, mode, of_routing, sums, due)
        for layer_ids, columns, value in self._pieces:
            self.sums.add(mode, layer_ids, columns, value)
        self.clear()

    def _add_outputs(self, mode: Recorded, layers: list[Layerlike], parts: list[OutputParts]) -> None:
        layer_ids = [layer.layer_id for layer in layers]
        with torch.no_grad(), torch.autocast(parts[0].dot_GE.device.type, enabled=False):
            self.sums.add(mode, layer_ids, self.sums.row.outputs, output_table(parts, self.sums.row.width))

    def _add_routing(
        self, mode: Recorded, layers: list[Layerlike], parts: list[RoutingParts], due: list[Compared]
    ) -> None:
        layer_ids, row, device = [layer.layer_id for layer in layers], self.sums.row, parts[0].prob_GE.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            measured = compared_later(due, self.room(device))
            head, tail = routing_table(parts, row, measured)
            self.sums.add(mode, layer_ids, row.head, head)
            self.sums.add(mode, layer_ids, row.tail, tail)

    def _sum_calls(self, calls: list[RoutedCall], mask: Any, sample: Sampler) -> None:
        for group in groups_of(calls):
            room = self.room(group[0].logits_TE.device)
            size = max(1, room // max(1, group[0].bytes + group[0].held))
            for start in range(0, len(group), size):
                part = group[start : start + size]
                guarded(telling(layers_of(part), "fail"), self._sum_routing, part, mask, sample)

    def _sum_outputs(self, mode: Recorded, chunk: OutputChunk) -> None:
        with torch.no_grad(), torch.autocast(chunk.rows_GSKD.device.type, enabled=False):
            for calls, rows_GSKD in runs_of(chunk):
                guarded(telling(layers_of(calls), "fail_outputs"), self._sum_run, mode, chunk, calls, rows_GSKD)

    def _sum_run(self, mode: Recorded, chunk: OutputChunk, calls: list[OutputCall], rows_GSKD: Tensor) -> None:
        parts = output_parts(
            output_batch(calls, rows_GSKD, chunk.sample, chunk.scale, chunk.divided),
            calls[0].layer.num_experts,
            calls[0].layer.reference,
            self.sums.more(mode, [call.layer.layer_id for call in calls]),
        )
        scale = chunk.scale if isinstance(chunk.scale, float) else id(chunk.sample)
        key = (calls[0].layer.num_experts, calls[0].layer.reference, rows_GSKD.device, scale)
        self._read.setdefault(key, []).append((layers_of(calls), parts))

    def _sum_routing(self, calls: list[RoutedCall], mask: Any, sample: Sampler) -> None:
        device, num_rows = calls[0].logits_TE.device, calls[0].logits_TE.shape[0]
        row = self.sums.row
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            mask_T = mask(num_rows, device, calls[0].at)
            compared = None if calls[0].beta_E is None else sample(num_rows, DISAGREEMENT_SAMPLE, device, calls[0].at)
            layers = layers_of(calls)
            most = limit_of(device, self.sums.num_layers, whole=True) if LIMIT is None else LIMIT
            for rows in row_pieces(calls, num_rows, most):
                part_T = mask_T if mask_T is None or rows is None else mask_T[rows]
                later: list[Compared] | None = [] if rows is None and device.type != "cpu" else None
                parts = sums_of(calls, row, part_T, compared, rows, later)
                compared = None
                if rows is None:
                    self._routed.setdefault(calls[0].key, []).append((layers, parts))
                    for each in later or []:
                        self._compared.setdefault(calls[0].key, []).append(each._replace(layers=layers))
                    return
                layer_ids = [layer.layer_id for layer in layers]
                head, tail = routing_table([parts], row)
                if rows.start > 0:
                    head[:, row.width + 3] = 0.0  # one call, however many pieces
                self._pieces += [(layer_ids, row.head, head), (layer_ids, row.tail, tail)]
