"""What a running forward leaves on the tape, and how calls of one shape are put together to be summed.

Shape suffixes: L layers, E experts, T router rows (tokens), K experts per token, S tokens read, D width, G layers of a
chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from chronomoe_hf.recording.columns import Row
from chronomoe_hf.recording.expert_sums import OutputBatch, OutputParts
from chronomoe_hf.recording.reduce import (
    DISAGREEMENT_SAMPLE,
    RouterBatch,
    RoutingParts,
    Scores,
    disagreement_sums,
    joined,
    routing_parts,
)
from chronomoe_hf.recording.rows import TokenSample

Masker = Callable[[int, torch.device, int | None], Tensor | None]
Sampler = Callable[[int, int | None, torch.device, int | None], TokenSample]


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


@dataclass(eq=False)  # frozen would set every field by a call of its own, in every layer of every forward
class RoutedCall:
    """What one router decided; see ``RouterBatch``. Never changed once it is made.

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

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Calls of one key can be summed together."""
        logits_TE = self.logits_TE
        shape = (logits_TE.shape, self.index_TK.shape, logits_TE.dtype, logits_TE.device)
        lacks = (self.kept_TK is None, self.native_TK is None, self.beta_E is None, self.masked_E is None)
        return (shape, type(self.router), lacks, self.at)

    @cached_property
    def held(self) -> int:
        """Bytes that it keeps alive until it is summed."""
        num_rows, num_k = self.index_TK.shape
        ids = 8 * num_k * (1 if self.native_TK is None else 2)
        return num_rows * (self.logits_TE.shape[-1] * self.logits_TE.element_size() + ids)

    @cached_property
    def bytes(self) -> int:
        """Working memory of summing it: logits as stacked and in fp32, scores, ids, weights and comparisons."""
        num_rows, num_k = self.index_TK.shape
        num_experts, size = self.logits_TE.shape[-1], self.logits_TE.element_size()
        per_row = num_experts * (max(size + 4, 8) if self.masked_E is None else 16) + 24 + 2 * 8 * num_k
        per_row += 0 if self.native_TK is None else num_k * (8 + num_k + 1)
        if self.beta_E is None:
            return num_rows * per_row
        seen = min(num_rows, DISAGREEMENT_SAMPLE) * num_experts
        return num_rows * per_row + seen * (4 * 5 if self.logits_TE.device.type == "cpu" else size)


def waiting_bytes(call: RoutedCall) -> int:
    """Bytes that a call leaves on a device until the forward ends: the tokens on which beta's effect is measured."""
    if call.beta_E is None:
        return 0
    return min(call.logits_TE.shape[0], DISAGREEMENT_SAMPLE) * call.logits_TE.shape[1] * call.logits_TE.element_size()


@dataclass
class Waiting:
    """Router calls of one key that are not summed yet: how many, and the bytes of each, held and to be worked with."""

    size: int
    num: int = 0


class Compared(NamedTuple):
    """Tokens of G layers on which beta's effect is still to be measured.

    Args:
        layers: whose they are.
        logits_GSE: clean logits of the tokens, native dtype.
        beta_GE: the full beta.
        masked_GE: experts that no token may choose, or None.
        sample: which tokens of a call they are.
        distribution: see ``RouterBatch``.
    """

    layers: list[Layerlike]
    logits_GSE: Tensor
    beta_GE: Tensor
    masked_GE: Tensor | None
    sample: TokenSample
    distribution: Callable[[Tensor], Tensor]

    @property
    def bytes(self) -> int:
        """Working memory of comparing them: logits and scores in fp32, with and without beta, and their differences."""
        return self.logits_GSE.numel() * (self.logits_GSE.element_size() + 32)


def compared_later(waiting: list[Compared], room: int) -> Tensor | None:
    """``disagreement_sums`` of all layers, in chunks that fit.

    Args:
        waiting: in the order of their layers.
        room: bytes for a chunk.

    Returns:
        float64 ``(L, 4)``; None where nothing waits.
    """
    chunks: list[list[Compared]] = []
    for each in waiting:
        fits = bool(chunks) and sum(other.bytes for other in chunks[-1]) + each.bytes <= room
        if fits and each.sample is chunks[-1][0].sample:
            chunks[-1].append(each)
        else:
            chunks.append([each])
    return joined([_compared_now(chunk) for chunk in chunks]) if chunks else None


def _compared_now(chunk: list[Compared]) -> Tensor:
    first, sample = chunk[0], chunk[0].sample
    masked = [each.masked_GE for each in chunk if each.masked_GE is not None]
    logits_GSE = joined([each.logits_GSE for each in chunk])
    scores = Scores.of(logits_GSE, sample.valid_S, first.distribution, joined(masked) if masked else None)
    beta_GE = joined([each.beta_GE for each in chunk])
    return disagreement_sums(scores, beta_GE, TokenSample(None, None, sample.scale), first.distribution)


@dataclass(eq=False)
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


def router_batch(
    calls: list[RoutedCall], mask_T: Tensor | None, rows: slice | None = None
) -> tuple[RouterBatch, Tensor]:
    """Calls of one key, stacked; only some rows of them where `rows` says so. And their logits as they came."""

    def stacked(name: str) -> Any:
        parts = [getattr(call, name) for call in calls]
        if parts[0] is None:
            return None
        return stacked_up([part if rows is None else part[rows] for part in parts])

    masked = [call.masked_E for call in calls if call.masked_E is not None]

    logits_GTE = stacked("logits_TE")
    batch = RouterBatch(
        logits_GTE=logits_GTE.float(),
        index_GTK=stacked("index_TK"),
        kept_GTK=stacked("kept_TK"),
        native_GTK=stacked("native_TK"),
        mask_T=mask_T,
        distribution=calls[0].distribution,
        masked_GE=stacked_up(masked) if masked else None,
        ordered=getattr(calls[0].router.adapter.rule, "sort", True),
    )
    return batch, logits_GTE


def sums_of(
    calls: list[RoutedCall],
    row: Row,
    mask_T: Tensor | None,
    compared: TokenSample | None = None,
    rows: slice | None = None,
    later: list[Compared] | None = None,
) -> RoutingParts:
    """``routing_parts`` of calls of one key.

    Args:
        calls: of layers of one shape.
        row: the columns.
        mask_T: bool, real tokens among the rows that are summed.
        compared: measure disagreement, on these tokens of the whole call.
        rows: only these rows; None = all.
        later: where what is to be compared goes instead of being compared now; None = it is compared now.
    """
    batch, logits_GTE = router_batch(calls, mask_T, rows)
    if later is not None and compared is not None:
        picked_GSE = compared.pick(logits_GTE, 1)
        beta_GE = stacked_up([call.beta_E for call in calls if call.beta_E is not None])
        later.append(Compared([], picked_GSE, beta_GE, batch.masked_GE, compared, batch.distribution))
        compared = None
    del logits_GTE
    scores = Scores.of(batch.logits_GTE, mask_T, batch.distribution, batch.masked_GE)
    disagreement_G4 = None
    if compared is not None:
        beta_GE = stacked_up([call.beta_E for call in calls if call.beta_E is not None])
        seen, sample = scores, compared
        if rows is not None:  # the sample is spread over all rows of the call
            logits_GSE = stacked_up([compared.pick(call.logits_TE) for call in calls])
            seen = Scores.of(logits_GSE, compared.valid_S, batch.distribution, batch.masked_GE)
            sample = TokenSample(None, None, compared.scale)
        disagreement_G4 = disagreement_sums(seen, beta_GE, sample, batch.distribution)
    return routing_parts(batch, row, disagreement_G4, scores)


def output_batch(
    calls: list[OutputCall], rows_GSKD: Tensor, sample: TokenSample, scale: Tensor | float, divided: bool
) -> OutputBatch:
    """Rows and what they belong to, of calls of one shape."""
    weight_GSK = sample.pick(stacked_up([call.weight_TK for call in calls]), 1)
    index_GSK = sample.pick(stacked_up([call.index_TK for call in calls]), 1)
    valid = None if sample.valid_S is None else sample.valid_S[None, :, None]
    usable = [call.valid_TK for call in calls if call.valid_TK is not None]
    if usable:
        usable_GSK = sample.pick(stacked_up(usable), 1)
        valid = usable_GSK if valid is None else usable_GSK & valid
    plain = not usable and rows_GSKD.device.type != "cpu" and not torch.compiler.is_compiling()
    filler_S = sample.filler_S if plain else None
    return OutputBatch(rows_GSKD, weight_GSK, index_GSK, valid, scale, divided, filler_S)


def stacked_up(parts: list[Tensor]) -> Tensor:
    """Parts of layers along a new first dimension; of one layer without a copy."""
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def layers_of(calls: Sequence[RoutedCall] | Sequence[OutputCall]) -> list[Layerlike]:
    """Whose calls they are."""
    return [call.layer for call in calls]


def telling(layers: Sequence[Layerlike], name: str) -> Callable[[Exception], None]:
    """Tells an error to `layers`, by the method of that name."""

    def failed(error: Exception) -> None:
        for layer in layers:
            getattr(layer, name)(error)

    return failed


def groups_of(calls: list[RoutedCall]) -> Iterator[list[RoutedCall]]:
    """Calls by key, in layer order; a layer that was called twice is in two groups."""
    groups: dict[Any, list[RoutedCall]] = {}
    seen: dict[Any, int] = {}
    for call in calls:
        key = (call.key, call.layer.layer_id)
        seen[key] = seen.get(key, 0) + 1
        groups.setdefault((call.key, seen[key]), []).append(call)
    for group in groups.values():
        yield sorted(group, key=lambda call: call.layer.layer_id)


Summed = TypeVar("Summed", "tuple[list[Layerlike], RoutingParts]", "tuple[list[Layerlike], OutputParts]")


def distinct_runs(summed: list[Summed]) -> Iterator[list[Summed]]:
    """Chunks in runs that hold no layer twice: a layer that is called twice is added twice."""
    run: list[Summed] = []
    seen: set[int] = set()
    for each in summed:
        ids = {layer.layer_id for layer in each[0]}
        if ids & seen:
            yield run
            run, seen = [], set()
        run.append(each)
        seen |= ids
    yield run


def row_pieces(calls: list[RoutedCall], num_rows: int, limit: int) -> Iterator[slice | None]:
    """Row ranges of a chunk of one layer that is too large by itself; None = all rows."""
    pieces = -(-len(calls) * calls[0].bytes // limit)
    if pieces <= 1 or len(calls) > 1:
        yield None
        return
    step = -(-num_rows // pieces)
    for start in range(0, num_rows, step):
        yield slice(start, min(num_rows, start + step))


def runs_of(chunk: OutputChunk) -> Iterator[tuple[list[OutputCall], Tensor]]:
    """The chunk's calls in runs of distinct layers with the same E and the same kind of slots."""
    start = 0
    for at in range(1, len(chunk.calls) + 1):
        if at < len(chunk.calls):
            run, call = chunk.calls[start:at], chunk.calls[at]
            if call.key == run[0].key and call.layer.layer_id > run[-1].layer.layer_id:
                continue
        yield chunk.calls[start:at], chunk.rows_GSKD[start:at]
        start = at
