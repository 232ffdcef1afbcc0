"""The tape of a running forward: routers and experts only leave references here; closing the scope sums them up.

Layers of one shape are summed together, in chunks of as many as fit into a limit (``recording/budget.py``). Expert rows
are the one thing that is copied (the backend's own are too large to keep), into a buffer for as many layers as fit. A
full chunk, of expert rows or of router calls, is summed at once, the rest when the scope closes. Only then are the few
numbers an expert that are left put into their columns, once for all chunks, and added: a forward that fails before it
is in no sum.

Shape suffixes: L layers, E experts, T router rows (tokens), K experts per token, S tokens read, D width, R numbers of
one row, G layers of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from chronomoe_hf.recording.budget import limit_of, sizes
from chronomoe_hf.recording.columns import Row
from chronomoe_hf.recording.expert_sums import OutputBatch, OutputParts, output_parts, output_table
from chronomoe_hf.recording.faults import guarded
from chronomoe_hf.recording.inputs import InputTape
from chronomoe_hf.recording.reduce import (
    DISAGREEMENT_SAMPLE,
    RouterBatch,
    RoutingParts,
    Scores,
    disagreement_sums,
    routing_parts,
    routing_table,
)
from chronomoe_hf.recording.rows import TokenSample
from chronomoe_hf.recording.totals import Recorded, Sums

LIMIT: int | None = None
"""Bytes that layers may take together; None = as ``recording/budget.py`` says of the device."""


class Layerlike(Protocol):
    """What the tape must know of a layer's recorder."""

    layer_id: int
    num_experts: int

    @property
    def reference(self) -> str:
        """What an expert's output is compared with; see ``CoherenceConfig``."""

    def fail(self, error: Exception) -> None:
        """Summing what its router left has failed."""

    def fail_outputs(self, error: Exception) -> None:
        """Summing what its experts left has failed."""


@dataclass(frozen=True)
class RoutedCall:
    """What one router decided; see ``RouterBatch``.

    Args:
        layer: whose call it was.
        router: supplies the score distribution of its family.
        logits_TE, index_TK, kept_TK, native_TK: detached, as the router made them.
        beta_E: the full bias, while its effect is measured; else None.
        masked_E: experts that no token may choose; None = there are none.
        at: the row of the forward where it begins, if it may be a slice of its rows; see ``Slices``.
    """

    layer: Layerlike
    router: Any
    logits_TE: Tensor
    index_TK: Tensor
    kept_TK: Tensor | None
    native_TK: Tensor | None
    beta_E: Tensor | None
    masked_E: Tensor | None = None
    at: int | None = None

    def distribution(self, logits: Tensor) -> Tensor:
        """Scores of logits, fp32."""
        scores: Tensor = self.router.adapter.distribution(self.router, logits)
        return scores

    @property
    def key(self) -> tuple[Any, ...]:
        """Calls of one key can be summed together."""
        optional = tuple(part is None for part in (self.kept_TK, self.native_TK, self.beta_E, self.masked_E))
        shape = (self.logits_TE.shape, self.index_TK.shape, self.logits_TE.dtype, self.logits_TE.device)
        return (*shape, id(self.router.adapter), self.layer.num_experts, optional, self.at)

    @property
    def held(self) -> int:
        """Bytes that it keeps alive until it is summed."""
        num_rows, num_k = self.index_TK.shape
        ids = 8 * num_k * (1 if self.native_TK is None else 2)
        return num_rows * (self.logits_TE.shape[-1] * self.logits_TE.element_size() + ids)

    @property
    def bytes(self) -> int:
        """Working memory of summing it: logits as stacked and in fp32, scores, ids, weights and comparisons."""
        num_rows, num_k = self.index_TK.shape
        num_experts, size = self.logits_TE.shape[-1], self.logits_TE.element_size()
        per_row = num_experts * (max(size + 4, 8) if self.masked_E is None else 16) + 24 + 2 * 8 * num_k
        per_row += 0 if self.native_TK is None else num_k * (8 + num_k + 1)
        compared = 0 if self.beta_E is None else min(num_rows, DISAGREEMENT_SAMPLE) * num_experts * 4 * 5
        return num_rows * per_row + compared


@dataclass(frozen=True)
class OutputCall:
    """Which assignments a layer's copied rows belong to: weights ``[T, K]``, ids ``[T, K]``, usable slots or None."""

    layer: Layerlike
    weight_TK: Tensor
    index_TK: Tensor
    valid_TK: Tensor | None

    @property
    def key(self) -> tuple[Any, ...]:
        """Calls of one key can be summed together."""
        return self.layer.num_experts, self.weight_TK.shape, self.weight_TK.dtype, self.valid_TK is None


@dataclass
class OutputChunk:
    """Copied expert rows of up to G layers of one shape, with what they belong to."""

    rows_GSKD: Tensor
    sample: TokenSample
    scale: Tensor | float
    divided: bool
    calls: list[OutputCall] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """Whether another layer fits."""
        return len(self.calls) == self.rows_GSKD.shape[0]


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
        self._waiting: dict[Any, int] = {}  # calls by key
        self._routed: dict[Any, list[tuple[list[RoutedCall], RoutingParts]]] = {}
        self._read: dict[Any, list[tuple[list[OutputCall], OutputParts]]] = {}
        self._pieces: list[tuple[list[int], slice, Tensor]] = []

    def clear(self) -> None:
        """Forget everything."""
        for held in (self.calls, self.chunks, self.inputs, self._waiting, self._routed, self._read, self._pieces):
            held.clear()

    def room(self, device: torch.device) -> int:
        """Bytes that router calls may take together, beside what holds expert rows and router inputs now."""
        limit = limit_of(device, self.sums.num_layers) if LIMIT is None else LIMIT
        if device.type == "cpu" or LIMIT is not None:
            return limit
        rows = sum(chunk.rows_GSKD.nbytes for chunk in self.chunks.values() if chunk.rows_GSKD.device == device)
        return limit - rows - self.inputs.held(device)

    def remember(self, mode: Recorded, call: RoutedCall, mask: Masker, sample: Sampler) -> None:
        """One router call; sums those of its kind that are waiting if no more of them fit.

        Args:
            mode: of the forward.
            call: what it decided.
            mask: real tokens of so many rows on a device, from a row of the forward on.
            sample: of these.
        """
        key, waiting = call.key, self._waiting.get(call.key, 0)
        if waiting and (waiting + 1) * (call.bytes + call.held) > self.room(call.logits_TE.device):
            due = [other for other in self.calls if other.key == key]
            self.calls = [other for other in self.calls if other.key != key]
            self._sum_calls(due, mask, sample)
            waiting = 0
        self._waiting[key] = waiting + 1
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
        return sizes(limit - self.inputs.held(like.device), self.sums.num_layers, (rows, working), routing)

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
            for outputs in _distinct(read):
                of_outputs = [call for calls, _ in outputs for call in calls]
                guarded(_all(of_outputs, "fail_outputs"), self._add_outputs, mode, of_outputs, [p for _, p in outputs])
        for routed in self._routed.values():
            for routing in _distinct(routed):
                of_routing = [call for calls, _ in routing for call in calls]
                guarded(_all(of_routing, "fail"), self._add_routing, mode, of_routing, [p for _, p in routing])
        for layer_ids, columns, value in self._pieces:
            self.sums.add(mode, layer_ids, columns, value)
        self.clear()

    def _add_outputs(self, mode: Recorded, calls: list[OutputCall], parts: list[OutputParts]) -> None:
        layer_ids = [call.layer.layer_id for call in calls]
        with torch.no_grad(), torch.autocast(parts[0].dot_GE.device.type, enabled=False):
            self.sums.add(mode, layer_ids, self.sums.row.outputs, output_table(parts, self.sums.row.width))

    def _add_routing(self, mode: Recorded, calls: list[RoutedCall], parts: list[RoutingParts]) -> None:
        layer_ids, row = [call.layer.layer_id for call in calls], self.sums.row
        with torch.no_grad(), torch.autocast(parts[0].prob_GE.device.type, enabled=False):
            head, tail = routing_table(parts, row)
            self.sums.add(mode, layer_ids, row.head, head)
            self.sums.add(mode, layer_ids, row.tail, tail)

    def _sum_calls(self, calls: list[RoutedCall], mask: Any, sample: Sampler) -> None:
        for group in _groups(calls):
            room = self.room(group[0].logits_TE.device)
            size = max(1, room // max(1, group[0].bytes + group[0].held))
            for start in range(0, len(group), size):
                part = group[start : start + size]
                guarded(_all(part, "fail"), self._sum_routing, part, mask, sample)

    def _sum_outputs(self, mode: Recorded, chunk: OutputChunk) -> None:
        with torch.no_grad(), torch.autocast(chunk.rows_GSKD.device.type, enabled=False):
            for calls, rows_GSKD in _runs(chunk):
                guarded(_all(calls, "fail_outputs"), self._sum_run, mode, chunk, calls, rows_GSKD)

    def _sum_run(self, mode: Recorded, chunk: OutputChunk, calls: list[OutputCall], rows_GSKD: Tensor) -> None:
        parts = output_parts(
            output_batch(calls, rows_GSKD, chunk.sample, chunk.scale, chunk.divided),
            calls[0].layer.num_experts,
            calls[0].layer.reference,
            self.sums.more(mode, [call.layer.layer_id for call in calls]),
        )
        scale = chunk.scale if isinstance(chunk.scale, float) else id(chunk.sample)
        key = (calls[0].layer.num_experts, calls[0].layer.reference, rows_GSKD.device, scale)
        self._read.setdefault(key, []).append((calls, parts))

    def _sum_routing(self, calls: list[RoutedCall], mask: Any, sample: Sampler) -> None:
        device, num_rows = calls[0].logits_TE.device, calls[0].logits_TE.shape[0]
        row = self.sums.row
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            mask_T = mask(num_rows, device, calls[0].at)
            compared = None if calls[0].beta_E is None else sample(num_rows, DISAGREEMENT_SAMPLE, device, calls[0].at)
            layer_ids = [call.layer.layer_id for call in calls]
            most = limit_of(device, self.sums.num_layers, whole=True) if LIMIT is None else LIMIT
            for rows in _pieces(calls, num_rows, most):
                part_T = mask_T if mask_T is None or rows is None else mask_T[rows]
                parts = sums_of(calls, row, part_T, compared, rows)
                compared = None
                if rows is None:
                    self._routed.setdefault(calls[0].key, []).append((calls, parts))
                    return
                head, tail = routing_table([parts], row)
                if rows.start > 0:
                    head[:, row.width + 3] = 0.0  # one call, however many pieces
                self._pieces += [(layer_ids, row.head, head), (layer_ids, row.tail, tail)]


Masker = Callable[[int, torch.device, int | None], Tensor | None]
Sampler = Callable[[int, int | None, torch.device, int | None], TokenSample]


def router_batch(calls: list[RoutedCall], mask_T: Tensor | None, rows: slice | None = None) -> RouterBatch:
    """Calls of one key, stacked; only some rows of them where `rows` says so."""

    def stacked(name: str) -> Any:
        parts = [getattr(call, name) for call in calls]
        if parts[0] is None:
            return None
        return _stack([part if rows is None else part[rows] for part in parts])

    masked = [call.masked_E for call in calls if call.masked_E is not None]

    return RouterBatch(
        logits_GTE=stacked("logits_TE").float(),  # what was stacked goes before the scores come
        index_GTK=stacked("index_TK"),
        kept_GTK=stacked("kept_TK"),
        native_GTK=stacked("native_TK"),
        mask_T=mask_T,
        distribution=calls[0].distribution,
        masked_GE=_stack(masked) if masked else None,
        ordered=getattr(calls[0].router.adapter.rule, "sort", True),
    )


def sums_of(
    calls: list[RoutedCall],
    row: Row,
    mask_T: Tensor | None,
    compared: TokenSample | None = None,
    rows: slice | None = None,
) -> RoutingParts:
    """``routing_parts`` of calls of one key.

    Args:
        calls: of layers of one shape.
        row: the columns.
        mask_T: bool, real tokens among the rows that are summed.
        compared: measure disagreement, on these tokens of the whole call.
        rows: only these rows; None = all.
    """
    batch = router_batch(calls, mask_T, rows)
    scores = Scores.of(batch.logits_GTE, mask_T, batch.distribution, batch.masked_GE)
    disagreement_G4 = None
    if compared is not None:
        beta_GE = _stack([call.beta_E for call in calls if call.beta_E is not None])
        seen, sample = scores, compared
        if rows is not None:  # the sample is spread over all rows of the call
            logits_GSE = _stack([compared.pick(call.logits_TE) for call in calls])
            seen = Scores.of(logits_GSE, compared.valid_S, batch.distribution, batch.masked_GE)
            sample = TokenSample(None, None, compared.scale)
        disagreement_G4 = disagreement_sums(seen, beta_GE, sample, batch.distribution)
    return routing_parts(batch, row, disagreement_G4, scores)


def output_batch(
    calls: list[OutputCall], rows_GSKD: Tensor, sample: TokenSample, scale: Tensor | float, divided: bool
) -> OutputBatch:
    """Rows and what they belong to, of calls of one shape."""
    weight_GSK = sample.pick(_stack([call.weight_TK for call in calls]), 1)
    index_GSK = sample.pick(_stack([call.index_TK for call in calls]), 1)
    valid = None if sample.valid_S is None else sample.valid_S[None, :, None]
    usable = [call.valid_TK for call in calls if call.valid_TK is not None]
    if usable:
        usable_GSK = sample.pick(_stack(usable), 1)
        valid = usable_GSK if valid is None else usable_GSK & valid
    return OutputBatch(rows_GSKD, weight_GSK, index_GSK, valid, scale, divided)


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def _all(calls: Sequence[RoutedCall] | Sequence[OutputCall], name: str) -> Callable[[Exception], None]:
    """Tells an error to the layers of `calls`, by the method of that name."""

    def failed(error: Exception) -> None:
        for call in calls:
            getattr(call.layer, name)(error)

    return failed


def _groups(calls: list[RoutedCall]) -> Iterator[list[RoutedCall]]:
    """Calls by key, in layer order; a layer that was called twice is in two groups."""
    groups: dict[Any, list[RoutedCall]] = {}
    seen: dict[Any, int] = {}
    for call in calls:
        key = (call.key, call.layer.layer_id)
        seen[key] = seen.get(key, 0) + 1
        groups.setdefault((call.key, seen[key]), []).append(call)
    for group in groups.values():
        yield sorted(group, key=lambda call: call.layer.layer_id)


Summed = TypeVar("Summed", "tuple[list[RoutedCall], RoutingParts]", "tuple[list[OutputCall], OutputParts]")


def _distinct(summed: list[Summed]) -> Iterator[list[Summed]]:
    """Chunks in runs that hold no layer twice: a layer that is called twice is added twice."""
    run: list[Summed] = []
    seen: set[int] = set()
    for each in summed:
        ids = {call.layer.layer_id for call in each[0]}
        if ids & seen:
            yield run
            run, seen = [], set()
        run.append(each)
        seen |= ids
    yield run


def _pieces(calls: list[RoutedCall], num_rows: int, limit: int) -> Iterator[slice | None]:
    """Row ranges of a chunk of one layer that is too large by itself; None = all rows."""
    pieces = -(-len(calls) * calls[0].bytes // limit)
    if pieces <= 1 or len(calls) > 1:
        yield None
        return
    step = -(-num_rows // pieces)
    for start in range(0, num_rows, step):
        yield slice(start, min(num_rows, start + step))


def _runs(chunk: OutputChunk) -> Iterator[tuple[list[OutputCall], Tensor]]:
    """The chunk's calls in runs of distinct layers with the same E and the same kind of slots."""
    start = 0
    for at in range(1, len(chunk.calls) + 1):
        if at < len(chunk.calls):
            run, call = chunk.calls[start:at], chunk.calls[at]
            if call.key == run[0].key and call.layer.layer_id > run[-1].layer.layer_id:
                continue
        yield chunk.calls[start:at], chunk.rows_GSKD[start:at]
        start = at
