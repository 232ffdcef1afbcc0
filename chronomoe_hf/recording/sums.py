"""What one forward adds to a layer's sums: pure functions of what the tape remembers, for G layers of one shape.

No host read, no shape that depends on values, and nothing whose result depends on the order in which a GPU adds:
counts are whole numbers, and per-expert sums of rows are a matrix product with a one-hot. So two runs give the same
bits. On a CPU the product would cost more than it saves, and rows are added expert by expert, in order.

Shape suffixes: G layers, T router rows (tokens), E experts, K experts per token, S tokens read, D width, A = S * K
assignments of the tokens read.
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
from chronomoe_hf.recording.sampling import TokenSample

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
    """

    logits_GTE: Tensor
    index_GTK: Tensor
    kept_GTK: Tensor | None
    native_GTK: Tensor | None
    mask_T: Tensor | None
    distribution: Callable[[Tensor], Tensor]


def routing_sums(batch: RouterBatch, row: Row, disagreement_G4: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Counts, probability sums and logit moments, and how many tokens steering sent elsewhere.

    A token whose logits are not finite is in no sum but "nonfinite"; padding is in none.

    Args:
        batch: the calls.
        row: the columns.
        disagreement_G4: from :func:`disagreement_sums`; None while it is not measured.

    Returns:
        float64 ``(G, head)`` and ``(G, tail)``: what is added to ``row.head`` and ``row.tail``.
    """
    z_GTE = batch.logits_GTE.float()
    num_groups, num_rows, num_experts = z_GTE.shape
    num_k = batch.index_GTK.shape[-1]
    var_GT = z_GTE.var(-1, correction=0)
    finite_GT = var_GT < math.inf  # False for NaN too: the variance of a token with a bad logit is one
    real_GT = finite_GT if batch.mask_T is None else finite_GT & batch.mask_T
    left_out_GT = ~real_GT
    prob_GTE = batch.distribution(z_GTE).masked_fill_(left_out_GT[..., None], 0.0)
    weight_GT = real_GT.double()
    tokens_G = weight_GT.sum(-1)
    kept_GTK = weight_GT[..., None].expand_as(batch.index_GTK)
    if batch.kept_GTK is not None:
        kept_GTK = kept_GTK * batch.kept_GTK
    count_GE = tokens_G.new_zeros(num_groups, row.width)
    # Whole numbers in float64: exact in any order.
    count_GE = count_GE.scatter_add_(1, batch.index_GTK.flatten(1), kept_GTK.flatten(1))
    zero_G = torch.zeros_like(tokens_G)
    dropped_G = zero_G if batch.kept_GTK is None else tokens_G * num_k - count_GE.sum(-1)
    expected = num_rows if batch.mask_T is None else batch.mask_T.sum()
    meta_G4 = torch.stack([tokens_G, dropped_G, expected - tokens_G, zero_G + 1.0], dim=-1)
    prob_GE = prob_GTE.sum(1, dtype=torch.float64)
    head = [count_GE, meta_G4, prob_GE]
    if num_experts < row.width:
        head.append(prob_GE.new_zeros(num_groups, row.width - num_experts))
    var_G = var_GT.masked_fill_(left_out_GT, 0.0).sum(-1, dtype=torch.float64)
    differs_G2 = torch.stack([zero_G, zero_G], dim=-1)
    if batch.native_GTK is not None:
        differs_GT = experts_differ(batch.native_GTK, batch.index_GTK) & real_GT
        differs_G2 = torch.stack([differs_GT.sum(-1, dtype=torch.float64), tokens_G], dim=-1)
    if disagreement_G4 is None:
        disagreement_G4 = zero_G[:, None].expand(-1, 4)
    return torch.cat(head, dim=-1), torch.cat([var_G[:, None], disagreement_G4, differs_G2], dim=-1)


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
    logits_GSE: Tensor, beta_GE: Tensor, sample: TokenSample, distribution: Callable[[Tensor], Tensor]
) -> Tensor:
    """How far the full, unvetoed beta moves the scores, on a sample of the tokens.

    Args:
        logits_GSE: clean logits of the tokens read.
        beta_GE: the full bias in logits.
        sample: which they are.
        distribution: the family's scores.

    Returns:
        float64 ``(G, 4)``: sums of the JS divergence (nats), of top-1 flips and of the moved mass, and the tokens
        compared; scaled to the whole call.
    """
    z_GSE = logits_GSE.float()
    finite_GS = z_GSE.sum(-1).abs() < math.inf
    real_GS = finite_GS if sample.valid_S is None else finite_GS & sample.valid_S
    p_GSE, q_GSE = distribution(z_GSE), distribution(z_GSE + beta_GE[:, None])
    measured_GS4 = torch.stack(
        [js(q_GSE, p_GSE), top1_flip(q_GSE, p_GSE).float(), overlap_only(q_GSE, p_GSE), torch.ones_like(z_GSE[..., 0])],
        dim=-1,
    )
    # A NaN token would poison the sum: it is no real token.
    return measured_GS4.masked_fill_(~real_GS[..., None], 0.0).sum(1, dtype=torch.float64) * sample.scale


@dataclass(frozen=True)
class OutputBatch:
    """Expert outputs of S tokens in G layers, all K assignments of each.

    Args:
        rows_GSKD: native dtype, detached; overwritten where they do not count. Unweighted outputs, or (`divided`)
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
    """Per-expert sums of one reading: phi (token-weighted), rows read, and contribution sum(gate * |y|).

    Args:
        batch: what was read.
        num_experts: E of these layers.
        width: E of the widest layer; columns beyond E are zero.
        reference: ``"leave_one_out"`` or ``"mixture"``.
        more: is shown the reading.

    Returns:
        fp32 ``(G, 5 * width)``: what is added to ``Row.outputs``.

    Source: SPEC section 4 (phi), REAP (gate * |expert output|).
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
    own_GSK = None if batch.divided else weight_GSK.masked_fill(left_out_GSK, 0.0)
    rows_GSKD = batch.rows_GSKD.masked_fill_(left_out_GSK[..., None], 0.0)
    hit_GAE = batch.index_GSK.flatten(1)[..., None] == torch.arange(num_experts, device=rows_GSKD.device)
    hit_GAE = hit_GAE & valid_GSK.flatten(1)[..., None]
    alone = num_k > 1 and reference == "leave_one_out"
    sums = _products if rows_GSKD.device.type != "cpu" else _in_order
    output_GED, reference_GED = sums(rows_GSKD, batch.index_GSK, hit_GAE, gain_GSK, own_GSK, alone)
    if more is not None:
        more(Reading(rows_GSKD, hit_GAE, gain_GSK, output_GED, batch.scale))
    phi_GE, has_phi_GE = phase_coherence(output_GED, reference_GED)
    rows_GE = hit_GAE.sum(1, dtype=torch.float32)
    weighed_GE = rows_GE * batch.scale
    evidence_GE = weighed_GE * has_phi_GE
    contribution_GSK = contribution_GSK.masked_fill(left_out_GSK, 0.0)
    contribution_GE = (hit_GAE * contribution_GSK.flatten(1)[..., None]).sum(1) * batch.scale
    table_G5E = torch.stack([phi_GE * evidence_GE, evidence_GE, rows_GE, contribution_GE, weighed_GE], dim=1)
    if num_experts < width:
        table_G5E = torch.nn.functional.pad(table_G5E, (0, width - num_experts))
    return table_G5E.view(num_groups, -1)


def _products(
    rows_GSKD: Tensor, index_GSK: Tensor, hit_GAE: Tensor, gain_GSK: Tensor | None, own_GSK: Tensor | None, alone: bool
) -> tuple[Tensor, Tensor]:
    """Sums of outputs and of references per expert, as one matrix product with coefficients: fp32 ``(G, E, D)`` each.

    An output's coefficient is 1 (or 1 / weight) at its own expert; in the leave-one-out reference of expert e it is its
    weight where another slot of its token is e. Their difference is thus never taken, and nothing cancels.
    """
    num_groups, num_tokens, num_k, width = rows_GSKD.shape
    dtype, num_experts = rows_GSKD.dtype, hit_GAE.shape[-1]
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
    return output_GED, other_GFD.expand(num_groups, num_experts, width)


def _in_order(
    rows_GSKD: Tensor, index_GSK: Tensor, hit_GAE: Tensor, gain_GSK: Tensor | None, own_GSK: Tensor | None, alone: bool
) -> tuple[Tensor, Tensor]:
    """The same sums on a CPU, where adding 2 D numbers a row beats multiplying it with 2 E coefficients."""
    num_groups, _, _, width = rows_GSKD.shape
    num_experts = hit_GAE.shape[-1]
    first_G = torch.arange(num_groups, device=index_GSK.device) * num_experts
    at_N = (index_GSK.clamp(max=num_experts - 1) + first_G[:, None, None]).flatten()
    valid_GSK = hit_GAE.any(-1).view(index_GSK.shape)
    y_GSKD = rows_GSKD.float()
    own_GSKD = y_GSKD if own_GSK is None else y_GSKD * own_GSK[..., None]
    mixture_GSD = own_GSKD.sum(2)
    if gain_GSK is not None:
        y_GSKD = y_GSKD * gain_GSK[..., None]

    def per_expert(value_GSKD: Tensor) -> Tensor:
        out = value_GSKD.new_zeros(num_groups * num_experts, width)
        return out.index_add_(0, at_N, value_GSKD.reshape(-1, width)).view(num_groups, num_experts, width)

    output_GED = per_expert(y_GSKD)
    if not alone:
        return output_GED, mixture_GSD.sum(1, keepdim=True).expand_as(output_GED)
    rest_GSKD = (mixture_GSD[:, :, None] - own_GSKD).mul_(valid_GSK[..., None])
    return output_GED, per_expert(rest_GSKD)


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
