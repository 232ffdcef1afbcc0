"""What one forward adds to a layer's sums: pure functions of what the tape remembers, for G layers of one shape.

No host read, no shape that depends on values, and nothing whose result depends on the order in which a GPU adds:
counts are whole numbers, and per-expert sums of rows are a matrix product with a one-hot. So two runs give the same
bits. On a CPU the product would cost more than it saves, and rows are added expert by expert, in order.

Shape suffixes: G layers, T router rows (tokens), E experts, K experts per token, S tokens read, D width, A = S * K
assignments of the tokens read, V the three numbers of a slot (gate * |y|, gate, |y|).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from chronomoe_hf.coherence import phase_coherence
from chronomoe_hf.metrics import js, overlap_only, top1_flip
from chronomoe_hf.recording.columns import Row
from chronomoe_hf.recording.rows import TokenSample

# What every expert's rows of a reading add up to: as matrix products on a device, in order on a CPU.
#
# Arguments of both, and what is left out of them, are worked out by :func:`output_sums`: `gain_GSK` makes a row an
# unweighted output (None: it is one), `own_GSK` makes it the expert's weighted part (None: it is that), `alone` asks
# for the leave-one-out reference. `value_VGSK` holds numbers of every slot that are added up beside its row.
#
# Shape suffixes: G layers of a chunk, S tokens read, K experts per token, A = S * K, E experts, D width of an output,
# F columns of coefficients, B bins, N = G * A rows, V numbers of a slot.


class PerExpert(NamedTuple):
    """Sums of one reading, all fp32.

    Args:
        output_GED: of unweighted outputs.
        reference_GED: of the references.
        rows_GE: rows that count.
        value_VGE: of the numbers that came with the rows.
    """

    output_GED: Tensor
    reference_GED: Tensor
    rows_GE: Tensor
    value_VGE: Tensor


def products(
    rows_GSKD: Tensor,
    hit_GAE: Tensor,
    gain_GSK: Tensor | None,
    own_GSK: Tensor | None,
    value_VGSK: Tensor,
    alone: bool,
) -> PerExpert:
    """Sums per expert, those of rows as one matrix product with coefficients.

    An output's coefficient is 1 (or 1 / weight) at its own expert; in the leave-one-out reference of expert e it is its
    weight where another slot of its token is e. Their difference is thus never taken, and nothing cancels.
    """
    num_groups, num_tokens, num_k, width = rows_GSKD.shape
    dtype, num_experts = rows_GSKD.dtype, hit_GAE.shape[-1]
    value_VGE = (hit_GAE * value_VGSK.flatten(2)[..., None]).sum(2)  # first: it needs room, and gives it back
    if gain_GSK is None:
        output_GAE = hit_GAE.to(dtype)
    else:
        output_GAE = (hit_GAE * gain_GSK.flatten(1)[..., None]).to(dtype)
    if alone:
        assert own_GSK is not None
        hit_GSKE = hit_GAE.view(num_groups, num_tokens, num_k, num_experts)
        elsewhere_GSKE = hit_GSKE.any(2, keepdim=True) ^ hit_GSKE
        other_GAF = (elsewhere_GSKE * own_GSK[..., None]).to(dtype).flatten(1, 2)
    elif own_GSK is None:
        other_GAF = torch.ones_like(output_GAE[..., :1])
    else:
        other_GAF = own_GSK.flatten(1)[..., None].to(dtype)
    product_GFD = product32(torch.cat([output_GAE, other_GAF], dim=-1).mT, rows_GSKD.flatten(1, 2))
    output_GED, other_GFD = product_GFD.split([num_experts, other_GAF.shape[-1]], dim=1)
    reference_GED = other_GFD.expand(num_groups, num_experts, width)
    return PerExpert(output_GED, reference_GED, hit_GAE.sum(1, dtype=torch.float32), value_VGE)


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
    end_B = torch.cat([start_B[1:], start_B.new_full((1,), bin_N.shape[0])])
    rows_GE = (end_B - start_B).float().view(num_groups, bins)[:, :num_experts]
    if own_GSK is None:
        mixture_GSD = y_GSKD.sum(2)
    else:
        mixture_XD = torch.bmm(own_GSK.view(-1, 1, num_k), y_GSKD.view(-1, num_k, width))
        mixture_GSD = mixture_XD.view(num_groups, num_tokens, width)
    if not alone:
        return PerExpert(output_GED, mixture_GSD.sum(1, keepdim=True).expand_as(output_GED), rows_GE, value_VGE)
    assert own_GSK is not None
    out = None if torch.compiler.is_compiling() else y_GSKD  # a fresh buffer of this size costs more than the sum
    rest_GSKD = torch.addcmul(mixture_GSD[:, :, None], own_GSK[..., None], y_GSKD, value=-1.0, out=out)
    return PerExpert(output_GED, per_expert(rest_GSKD.view(-1, width)), rows_GE, value_VGE)


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


DISAGREEMENT_SAMPLE = 1024
"""Tokens of a call on which disagreement is measured; it decides a relevance in [0, 1] and needs no more."""


@dataclass(frozen=True)
class RouterBatch:
    """Router calls of G layers.

    Args:
        logits_GTE: clean logits, native dtype, detached.
        index_GTK: int64 ids of the chosen experts, after steering, distinct in a token.
        kept_GTK: bool, False where capacity dropped the assignment; None = nothing can be dropped.
        native_GTK: ids that the plain router would have chosen; None while nothing steers.
        mask_T: bool, real tokens; None = all.
        distribution: the family's scores of logits, ``[..., E]`` to fp32 ``[..., E]``.
        masked_GE: bool, experts that no token may choose; None = there are none.
        ordered: a token's choices stand in the order of their scores, the first one first.
    """

    logits_GTE: Tensor
    index_GTK: Tensor
    kept_GTK: Tensor | None
    native_GTK: Tensor | None
    mask_T: Tensor | None
    distribution: Callable[[Tensor], Tensor]
    masked_GE: Tensor | None = None
    ordered: bool = True


class Scores(NamedTuple):
    """Scores of a call's rows, and which rows count. Masked experts are in none of it: their score is 0.

    Args:
        z_GTE: clean logits, fp32; -inf for masked experts.
        var_GT: their variance over experts.
        real_GT: bool, False for padding and for rows whose logits are not finite.
        left_out_GT: its opposite.
        prob_GTE: the family's scores, fp32; 0 in rows that are left out.
    """

    z_GTE: Tensor
    var_GT: Tensor
    real_GT: Tensor
    left_out_GT: Tensor
    prob_GTE: Tensor

    @classmethod
    def of(
        cls,
        logits_GTE: Tensor,
        mask_T: Tensor | None,
        distribution: Callable[[Tensor], Tensor],
        masked_GE: Tensor | None = None,
    ) -> Scores:
        """Scores of logits; arguments as in :class:`RouterBatch`."""
        z_GTE = logits_GTE.float()
        if masked_GE is None:
            var_GT = z_GTE.var(-1, correction=0)
        else:
            z_GTE, var_GT = _without(z_GTE, masked_GE[:, None])
        real_GT = var_GT < math.inf  # False for NaN too: the variance of a token with a bad logit is one
        if mask_T is not None:
            real_GT = real_GT & mask_T
        left_out_GT = ~real_GT
        prob_GTE = distribution(z_GTE).masked_fill_(left_out_GT[..., None], 0.0)
        return cls(z_GTE, var_GT, real_GT, left_out_GT, prob_GTE)


def _without(z_GTE: Tensor, masked_G1E: Tensor) -> tuple[Tensor, Tensor]:
    """Logits that are -inf for masked experts, and the variance of the others."""
    num_G1 = (~masked_G1E).sum(-1)
    mean_GT = z_GTE.masked_fill(masked_G1E, 0.0).sum(-1) / num_G1
    away_GTE = (z_GTE - mean_GT[..., None]).masked_fill_(masked_G1E, 0.0)
    return z_GTE.masked_fill(masked_G1E, -math.inf), away_GTE.square_().sum(-1) / num_G1


def routing_sums(
    batch: RouterBatch, row: Row, disagreement_G4: Tensor | None = None, scores: Scores | None = None
) -> tuple[Tensor, Tensor]:
    """Counts, probability sums and logit moments, and how many tokens steering sent elsewhere.

    A token whose logits are not finite is in no sum but "nonfinite"; padding is in none.

    Args:
        batch: the calls.
        row: the columns.
        disagreement_G4: from :func:`disagreement_sums`; None while it is not measured.
        scores: of the batch, where they are known already.

    Returns:
        float64 ``(G, head)`` and ``(G, tail)``: what is added to ``row.head`` and ``row.tail``.
    """
    if scores is None:
        scores = Scores.of(batch.logits_GTE, batch.mask_T, batch.distribution, batch.masked_GE)
    num_groups, num_rows, num_experts = scores.z_GTE.shape
    num_k = batch.index_GTK.shape[-1]
    weight_GT = scores.real_GT.double()
    tokens_G1 = weight_GT.sum(-1, keepdim=True)
    kept_GTK = weight_GT[..., None].expand_as(batch.index_GTK)
    if batch.kept_GTK is not None:
        kept_GTK = kept_GTK * batch.kept_GTK
    # Whole numbers in float64: exact in any order. Assignments, a column that stays zero, first choices.
    count_GF = tokens_G1.new_zeros(num_groups, 2 * row.width + 1)
    count_GF.scatter_add_(1, batch.index_GTK.flatten(1), kept_GTK.flatten(1))
    count_GE, zero_G1, first_GE = count_GF.split([row.width, 1, row.width], dim=1)
    first_GE.scatter_add_(1, _first_choices(batch, scores), weight_GT)
    dropped_G1 = zero_G1 if batch.kept_GTK is None else tokens_G1 * num_k - count_GE.sum(-1, keepdim=True)
    expected = num_rows if batch.mask_T is None else batch.mask_T.sum()
    prob_GE = scores.prob_GTE.sum(1, dtype=torch.float64)
    head = [count_GE, tokens_G1, dropped_G1, expected - tokens_G1, torch.ones_like(tokens_G1), prob_GE]
    if num_experts < row.width:
        head.append(prob_GE.new_zeros(num_groups, row.width - num_experts))
    head.append(first_GE)
    var_G1 = scores.var_GT.masked_fill(scores.left_out_GT, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    differs = [zero_G1, zero_G1]
    if batch.native_GTK is not None:
        differs_GT = experts_differ(batch.native_GTK, batch.index_GTK) & scores.real_GT
        differs = [differs_GT.sum(-1, keepdim=True, dtype=torch.float64), tokens_G1]
    if disagreement_G4 is None:
        disagreement_G4 = zero_G1.expand(-1, 4)
    return torch.cat(head, dim=-1), torch.cat([var_G1, disagreement_G4, *differs], dim=-1)


def _first_choices(batch: RouterBatch, scores: Scores) -> Tensor:
    """Id of every token's first choice, int64 ``(G, T)``: the highest-scoring one where the slots are in no order."""
    if batch.ordered or batch.index_GTK.shape[-1] == 1:
        return batch.index_GTK[..., 0]
    best_GT1 = scores.prob_GTE.gather(-1, batch.index_GTK).argmax(-1, keepdim=True)
    return batch.index_GTK.gather(-1, best_GT1).squeeze(-1)


def experts_differ(native_TK: Tensor, steered_TK: Tensor) -> Tensor:
    """Bool ``(..., T)``: the two choices are different sets of experts (their order does not matter).

    Args:
        native_TK: ids, distinct in a token, shape ``(..., T, K)``.
        steered_TK: the same shape.
    """
    if native_TK.shape[-1] == 1:
        return (native_TK != steered_TK).squeeze(-1)
    same_TKK = native_TK[..., :, None] == steered_TK[..., None, :]
    return ~same_TKK.any(-1).all(-1)


def disagreement_sums(
    scores: Scores, beta_GE: Tensor, sample: TokenSample, distribution: Callable[[Tensor], Tensor]
) -> Tensor:
    """How far the full, unvetoed beta moves the scores, on a sample of the tokens.

    Args:
        scores: of all rows.
        beta_GE: the full bias in logits.
        sample: the rows that are compared.
        distribution: the family's scores.

    Returns:
        float64 ``(G, 4)``: sums of the JS divergence (nats), of top-1 flips and of the moved mass, and the tokens
        compared; scaled to the whole call.
    """
    z_GSE, p_GSE = sample.pick(scores.z_GTE, 1), sample.pick(scores.prob_GTE, 1)
    left_out_GS = sample.pick(scores.left_out_GT, 1)
    if sample.valid_S is not None and sample.position_S is not None:  # without positions, filler is left out already
        left_out_GS = left_out_GS | ~sample.valid_S
    q_GSE = distribution(z_GSE + beta_GE[:, None])
    measured_GS4 = torch.stack(
        [js(q_GSE, p_GSE), top1_flip(q_GSE, p_GSE).float(), overlap_only(q_GSE, p_GSE), torch.ones_like(z_GSE[..., 0])],
        dim=-1,
    )
    # A NaN token would poison the sum: it is no real token.
    return measured_GS4.masked_fill_(left_out_GS[..., None], 0.0).sum(1, dtype=torch.float64) * sample.scale


@dataclass(frozen=True)
class OutputBatch:
    """Expert outputs of S tokens in G layers, all K assignments of each.

    Args:
        rows_GSKD: native dtype, detached; overwritten. Unweighted outputs, or (`divided`)
            outputs times weights.
        weight_GSK: combine weights, fp32.
        index_GSK: int64 expert ids; E and above are no experts (expert parallelism marks foreign ones so).
        valid_GSK: bool, broadcastable; None = all.
        scale: what the sums are multiplied with: real tokens / tokens read.
        divided: the rows hold ``weight * output``, as a block with one expert a token returns them.
    """

    rows_GSKD: Tensor
    weight_GSK: Tensor
    index_GSK: Tensor
    valid_GSK: Tensor | None
    scale: Tensor | float
    divided: bool = False


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


def output_sums(
    batch: OutputBatch, num_experts: int, width: int, reference: str, more: Callable[[Reading], None] | None = None
) -> Tensor:
    """Per-expert sums of one reading: phi (token-weighted), rows read, and of gate * |y|, gate and |y|.

    Args:
        batch: what was read.
        num_experts: E of these layers.
        width: E of the widest layer; columns beyond E are zero.
        reference: ``"leave_one_out"`` or ``"mixture"``.
        more: is shown the reading.

    Returns:
        fp32 ``(G, 7 * width)``: what is added to ``Row.outputs``.

    Source: docs/concepts.md, "Coherence" (phi), REAP (gate * |expert output|).
    """
    num_groups, _, num_k, _ = batch.rows_GSKD.shape
    wide = torch.float64 if batch.rows_GSKD.dtype == torch.float64 else torch.float32
    norm_GSK = torch.linalg.vector_norm(batch.rows_GSKD, dim=-1, dtype=wide).float()
    weight_GSK = batch.weight_GSK
    contribution_GSK = norm_GSK if batch.divided else weight_GSK * norm_GSK
    valid_GSK = contribution_GSK.abs() < math.inf  # False for NaN too
    if batch.valid_GSK is not None:
        valid_GSK = valid_GSK & batch.valid_GSK
    if batch.divided:
        valid_GSK = valid_GSK & (weight_GSK > 0)
    left_out_GSK = ~valid_GSK
    gain_GSK = weight_GSK.masked_fill(left_out_GSK, 1.0).reciprocal() if batch.divided else None
    size_GSK = norm_GSK if gain_GSK is None else norm_GSK * gain_GSK
    value_VGSK = torch.stack([contribution_GSK, weight_GSK, size_GSK]).masked_fill_(left_out_GSK, 0.0)
    own_GSK = None if batch.divided else value_VGSK[1]
    rows_GSKD = batch.rows_GSKD.masked_fill_(left_out_GSK[..., None], 0.0)
    alone = num_k > 1 and reference == "leave_one_out"
    on_cpu, hit_GAE = rows_GSKD.device.type == "cpu", None
    if more is not None or not on_cpu:
        hit_GAE = batch.index_GSK.flatten(1)[..., None] == torch.arange(num_experts, device=rows_GSKD.device)
        hit_GAE = hit_GAE & valid_GSK.flatten(1)[..., None]
    if on_cpu:
        mine_GSKD = rows_GSKD if more is None else rows_GSKD.clone()  # they are overwritten
        each = in_order(mine_GSKD, batch.index_GSK, valid_GSK, gain_GSK, own_GSK, value_VGSK, num_experts, alone)
    else:
        assert hit_GAE is not None
        each = products(rows_GSKD, hit_GAE, gain_GSK, own_GSK, value_VGSK, alone)
    if more is not None and hit_GAE is not None:
        more(Reading(rows_GSKD, hit_GAE, gain_GSK, each.output_GED, batch.scale))
    phi_GE, has_phi_GE = phase_coherence(each.output_GED, each.reference_GED)
    weighed_GE = each.rows_GE * batch.scale
    evidence_GE = weighed_GE * has_phi_GE
    value_VGE = each.value_VGE * batch.scale
    table_G7E = torch.stack([phi_GE * evidence_GE, evidence_GE, each.rows_GE, *value_VGE.unbind(), weighed_GE], dim=1)
    if num_experts < width:
        table_G7E = torch.nn.functional.pad(table_G7E, (0, width - num_experts))
    return table_G7E.view(num_groups, -1)
