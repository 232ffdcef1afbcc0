"""What a reading of expert outputs adds to a layer's sums: pure functions, for G layers of one shape.

No host read, no shape that depends on values, and nothing whose result depends on the order in which a GPU adds:
per-expert sums of rows are a matrix product with a one-hot. So two runs give the same bits. On a CPU the product would
cost more than it saves, and rows are added expert by expert, in order. What is left to do with a few numbers an expert
is done once for all layers of a forward (:func:`output_table`), not once a chunk of them: it is launches that cost.

Shape suffixes: G layers of a chunk, S tokens read, K experts per token, A = S * K, E experts, D width of an output,
F columns of coefficients, B bins, N = G * A rows, V the four numbers of a slot (gate * |y|, gate, |y|, 1).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from chronomoe_hf.coherence import cosine, cosine_parts

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> whole numbers of that size

# Per-expert sums: as matrix products on a device, in order on a CPU.
#
# Arguments of both, and what is left out of them, are worked out by :func:`output_parts`: `gain_GSK` makes a row an
# unweighted output (None: it is one), `own_GSK` makes it the expert's weighted part (None: it is that), `alone` asks
# for the leave-one-out reference. `value_VGSK` holds numbers of every slot that are added up beside its row.


class PerExpert(NamedTuple):
    """Sums of one reading, all fp32.

    Args:
        output_GED: of unweighted outputs.
        dot_GE: of these with the references.
        norm_GF: of these, and beside them of the references (of each expert, or one for all).
        value_VGE: of the numbers of the slots.
    """

    output_GED: Tensor
    dot_GE: Tensor
    norm_GF: Tensor
    value_VGE: Tensor


def products(
    rows_GSKD: Tensor,
    index_GSK: Tensor,
    gain_GSK: Tensor | None,
    own_GSK: Tensor | None,
    value_VGSK: Tensor,
    num_experts: int,
    alone: bool,
) -> PerExpert:
    """Sums per expert, those of rows as one matrix product with coefficients.

    An output's coefficient is 1 (or 1 / weight) at its own expert; in the leave-one-out reference of expert e it is its
    weight where another slot of its token is e. Their difference is thus never taken, and nothing cancels.

    `index_GSK` is E or above in slots that do not count.
    """
    num_groups, num_tokens, num_k, _ = rows_GSKD.shape
    columns = num_experts if alone else 1
    # Both kinds of coefficients side by side, written in place: a cat would be one more launch, and one more copy.
    both_GAF = rows_GSKD.new_empty(num_groups, num_tokens * num_k, num_experts + columns)
    output_GAE, other_GAF = both_GAF.split([num_experts, columns], dim=-1)
    _hits(index_GSK, num_experts, output_GAE)
    value_VGE = (output_GAE * value_VGSK.flatten(2)[..., None]).sum(2, dtype=torch.float32)
    if alone:
        assert own_GSK is not None
        both_GSKF = both_GAF.view(num_groups, num_tokens, num_k, -1)
        hit_GSKE, other_GSKE = both_GSKF.split([num_experts, columns], dim=-1)
        elsewhere_GSKE = hit_GSKE.any(2, keepdim=True) != hit_GSKE
        torch.mul(elsewhere_GSKE, own_GSK[..., None], out=other_GSKE)
        del elsewhere_GSKE
    elif own_GSK is None:
        other_GAF.fill_(1.0)
    else:
        other_GAF.copy_(own_GSK.flatten(1)[..., None])
    if gain_GSK is not None:
        output_GAE.mul_(gain_GSK.flatten(1)[..., None])
    product_GFD = product32(both_GAF.mT, rows_GSKD.flatten(1, 2))
    del both_GAF, output_GAE, other_GAF
    norm_GF = product_GFD.norm(dim=-1)
    output_GED, other_GFD = product_GFD.split([num_experts, columns], dim=1)
    dot_GE = (other_GFD.mul_(output_GED) if alone else other_GFD * output_GED).sum(-1)  # the reference has no other use
    return PerExpert(output_GED, dot_GE, norm_GF, value_VGE)


def in_order(
    rows_GSKD: Tensor,
    index_GSK: Tensor,
    valid_GSK: Tensor,
    gain_GSK: Tensor | None,
    own_GSK: Tensor | None,
    value_VGSK: Tensor,
    num_experts: int,
    alone: bool,
) -> PerExpert:
    """The same sums on a CPU, where adding 2 D numbers a row beats multiplying it with 2 E coefficients.

    Rows are sorted by expert, those that do not count last, and each expert's rows are added in order. `rows_GSKD` may
    be overwritten.
    """
    num_groups, num_tokens, num_k, width = rows_GSKD.shape
    bins = num_experts + 1
    bin_GSK = index_GSK.masked_fill(~(valid_GSK & (index_GSK < num_experts)), num_experts)
    first_G = torch.arange(num_groups, device=index_GSK.device) * bins
    bin_N, order_N = torch.sort((bin_GSK + first_G[:, None, None]).flatten(), stable=True)
    start_B = torch.searchsorted(bin_N, torch.arange(num_groups * bins, device=bin_N.device))

    def per_expert(value_ND: Tensor, weight_N: Tensor | None = None) -> Tensor:
        sums_BD = torch.nn.functional.embedding_bag(order_N, value_ND, start_B, mode="sum", per_sample_weights=weight_N)
        return sums_BD.view(num_groups, bins, -1)[:, :num_experts]

    y_GSKD = rows_GSKD.float()
    y_ND = y_GSKD.view(-1, width)
    output_GED = per_expert(y_ND, None if gain_GSK is None else gain_GSK.flatten()[order_N])
    value_VGE = per_expert(value_VGSK.flatten(1).T.contiguous()).movedim(-1, 0)
    if own_GSK is None:
        mixture_GSD = y_GSKD.sum(2)
    else:
        mixture_XD = torch.bmm(own_GSK.view(-1, 1, num_k), y_GSKD.view(-1, num_k, width))
        mixture_GSD = mixture_XD.view(num_groups, num_tokens, width)
    if not alone:
        reference_GED = mixture_GSD.sum(1, keepdim=True).expand_as(output_GED)
        return _beside(output_GED, reference_GED, value_VGE)
    assert own_GSK is not None
    out = None if torch.compiler.is_compiling() else y_GSKD  # a fresh buffer of this size costs more than the sum
    rest_GSKD = torch.addcmul(mixture_GSD[:, :, None], own_GSK[..., None], y_GSKD, value=-1.0, out=out)
    return _beside(output_GED, per_expert(rest_GSKD.view(-1, width)), value_VGE)


def _beside(output_GED: Tensor, reference_GED: Tensor, value_VGE: Tensor) -> PerExpert:
    dot_GE, norms = cosine_parts(output_GED, reference_GED)
    return PerExpert(output_GED, dot_GE, torch.cat(norms, dim=-1), value_VGE)


def product32(left_GEA: Tensor, right_GAD: Tensor) -> Tensor:
    """Batched matrix product, summed and returned in fp32; low-precision operands stay as they are where they may."""
    if left_GEA.dtype == torch.float32:
        return torch.bmm(left_GEA, right_GAD)
    compiling = torch.compiler.is_compiling()  # the compiler fuses the conversions, and cannot trace the question
    if not compiling and left_GEA.dtype != torch.float64 and _wide_products(left_GEA.device, left_GEA.dtype):
        return torch.bmm(left_GEA, right_GAD, out_dtype=torch.float32)
    return torch.bmm(left_GEA.float(), right_GAD.float())


@functools.cache
def _wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device multiplies low-precision matrices into an fp32 result."""
    one = torch.ones(1, 16, 16, dtype=dtype, device=device)
    try:
        return torch.bmm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, NotImplementedError, TypeError):
        return False


@dataclass(frozen=True)
class OutputBatch:
    """Expert outputs of S tokens in G layers, all K assignments of each.

    Args:
        rows_GSKD: native dtype, detached; overwritten. Unweighted outputs, or (`divided`)
            outputs times weights.
        weight_GSK: combine weights, floating.
        index_GSK: int64 expert ids; E and above are no experts (expert parallelism marks foreign ones so).
        valid_GSK: bool, broadcastable; None = all.
        scale: what the sums are multiplied with: real tokens / tokens read.
        divided: the rows hold ``weight * output``, as a block with one expert a token returns them.
        filler_S: fp32, 0 for tokens that count and -inf for filler: all that `valid_GSK` says; None = it says more.
    """

    rows_GSKD: Tensor
    weight_GSK: Tensor
    index_GSK: Tensor
    valid_GSK: Tensor | None
    scale: Tensor | float
    divided: bool = False
    filler_S: Tensor | None = None


class Reading(NamedTuple):
    """What :func:`output_sums` has worked out on the way, for whoever adds up more.

    Args:
        rows_GSKD: as in the batch, zero where a slot does not count.
        hit_GAE: bool, the expert of each slot that counts.
        gain_GSK: what a row is multiplied with to be the unweighted output; None = 1.
        output_GED: sum of unweighted outputs, fp32.
        scale: of the batch.
    """

    rows_GSKD: Tensor
    hit_GAE: Tensor
    gain_GSK: Tensor | None
    output_GED: Tensor
    scale: Tensor | float


class OutputParts(NamedTuple):
    """What a reading of G layers gives, fp32, before it is put into columns.

    Args:
        dot_GE, norm_GF: see :class:`PerExpert`.
        value_VGE: sums of gate * |y|, gate, |y| and rows read.
        scale: of the batch.
    """

    dot_GE: Tensor
    norm_GF: Tensor
    value_VGE: Tensor
    scale: Tensor | float


def output_sums(batch: OutputBatch, num_experts: int, width: int, reference: str) -> Tensor:
    """The columns of one reading: :func:`output_parts` and :func:`output_table`, one after the other."""
    return output_table([output_parts(batch, num_experts, reference)], width)


def output_parts(
    batch: OutputBatch, num_experts: int, reference: str, more: Callable[[Reading], None] | None = None
) -> OutputParts:
    """Per-expert sums of one reading: what phi needs, rows read, and of gate * |y|, gate and |y|.

    Args:
        batch: what was read.
        num_experts: E of these layers.
        reference: ``"leave_one_out"`` or ``"mixture"``.
        more: is shown the reading.

    Source: docs/concepts.md, "Coherence" (phi), REAP (gate * |expert output|).
    """
    num_k = batch.rows_GSKD.shape[2]
    rows_GSKD, on_cpu = batch.rows_GSKD, batch.rows_GSKD.device.type == "cpu"
    if on_cpu and rows_GSKD.element_size() < 4:
        rows_GSKD = rows_GSKD.float()  # once: adding in order does it too
    wide = torch.float64 if rows_GSKD.dtype == torch.float64 else torch.float32
    norm_GSK = torch.linalg.vector_norm(rows_GSKD, dim=-1, dtype=wide)
    norm_GSK = norm_GSK if wide == torch.float32 else norm_GSK.float()
    weight_GSK = batch.weight_GSK
    contribution_GSK, left_out_GSK, valid_GSK = _contributions(batch, norm_GSK)
    gain_GSK = weight_GSK.float().masked_fill(left_out_GSK, 1.0).reciprocal() if batch.divided else None
    size_GSK = norm_GSK if gain_GSK is None else norm_GSK * gain_GSK
    one_GSK = _one(norm_GSK.device).expand_as(norm_GSK)
    value_VGSK = torch.stack([contribution_GSK, weight_GSK, size_GSK, one_GSK]).masked_fill_(left_out_GSK, 0.0)
    own_GSK = None if batch.divided else value_VGSK[1]
    if on_cpu and not torch.compiler.is_compiling():
        bits = _BITS[rows_GSKD.element_size()]  # all bits are kept or none: a fill with a mask is slower on a CPU
        rows_GSKD.view(bits).bitwise_and_(left_out_GSK.logical_not().to(bits).neg_()[..., None])
    else:
        rows_GSKD.masked_fill_(left_out_GSK[..., None], 0.0)
    alone = num_k > 1 and reference == "leave_one_out"
    hit_GAE = None
    if more is not None or not on_cpu:
        index_GSK = batch.index_GSK.masked_fill(left_out_GSK, num_experts)
        if more is not None:
            hit_GAE = index_GSK.flatten(1)[..., None] == _count_up(num_experts, rows_GSKD.device)
    if on_cpu:
        assert valid_GSK is not None
        mine_GSKD = rows_GSKD if more is None else rows_GSKD.clone()  # they are overwritten
        each = in_order(mine_GSKD, batch.index_GSK, valid_GSK, gain_GSK, own_GSK, value_VGSK, num_experts, alone)
    else:
        each = products(rows_GSKD, index_GSK, gain_GSK, own_GSK, value_VGSK, num_experts, alone)
    if more is not None and hit_GAE is not None:
        more(Reading(rows_GSKD, hit_GAE, gain_GSK, each.output_GED, batch.scale))
    return OutputParts(each.dot_GE, each.norm_GF, each.value_VGE, batch.scale)


def _contributions(batch: OutputBatch, norm_GSK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """gate * |y| of every slot, which slots do not count, and, where it is known by the way, which do.

    A slot does not count where the batch says so, or its contribution is not finite.
    """
    weight_GSK = batch.weight_GSK
    if batch.filler_S is not None and not batch.divided:
        # What is not finite minus itself is NaN: three launches for five.
        contribution_GSK = torch.addcmul(batch.filler_S[:, None], weight_GSK, norm_GSK)
        return contribution_GSK, (contribution_GSK - contribution_GSK) != 0, None
    contribution_GSK = norm_GSK if batch.divided else weight_GSK * norm_GSK
    valid_GSK = contribution_GSK.abs() < math.inf  # False for NaN too
    if batch.valid_GSK is not None:
        valid_GSK = valid_GSK & batch.valid_GSK
    if batch.divided:
        valid_GSK = valid_GSK & (weight_GSK > 0)
    return contribution_GSK, ~valid_GSK, valid_GSK


def _hits(index_GSK: Tensor, num_experts: int, out_GAE: Tensor) -> None:
    """Write 1 where a slot's expert is e, else 0."""
    index_GA1, expert_E = index_GSK.flatten(1)[..., None], _count_up(num_experts, index_GSK.device)
    if torch.compiler.is_compiling():
        out_GAE.copy_(index_GA1 == expert_E)
    else:
        torch.eq(index_GA1, expert_E, out=out_GAE)


def output_table(parts: Sequence[OutputParts], width: int) -> Tensor:
    """The parts of one or more readings of one shape and one scale, in their columns.

    Args:
        parts: in the order of their layers.
        width: E of the widest layer; columns beyond E are zero.

    Returns:
        fp32 ``(G, 7 * width)`` of all their layers: what is added to ``Row.outputs``.
    """
    scale = parts[0].scale
    dot_GE, value_VGE = _joined([part.dot_GE for part in parts]), _joined([part.value_VGE for part in parts], 1)
    norm_GF, num_experts = _joined([part.norm_GF for part in parts]), dot_GE.shape[-1]
    phi_GE, has_phi_GE = cosine(dot_GE, norm_GF[:, :num_experts] * norm_GF[:, num_experts:])
    rows_GE = value_VGE[3]
    scaled_VGE = value_VGE * scale
    weighed_GE = scaled_VGE[3]
    evidence_GE = weighed_GE * has_phi_GE
    table_G7E = torch.stack([phi_GE * evidence_GE, evidence_GE, rows_GE, *scaled_VGE.unbind()], dim=1)
    num_groups = table_G7E.shape[0]
    if num_experts < width:
        table_G7E = torch.nn.functional.pad(table_G7E, (0, width - num_experts))
    return table_G7E.view(num_groups, -1)


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _one(device: torch.device) -> Tensor:
    """1.0 on a device; made once, outside a graph."""
    return torch.ones((), device=device) if torch.compiler.is_compiling() else _kept_one(device)


@functools.cache
def _kept_one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def _count_up(num: int, device: torch.device) -> Tensor:
    """0, 1, ..., num - 1 on a device; made once, outside a graph."""
    return torch.arange(num, device=device) if torch.compiler.is_compiling() else _kept_range(num, device)


@functools.cache
def _kept_range(num: int, device: torch.device) -> Tensor:
    return torch.arange(num, device=device)
