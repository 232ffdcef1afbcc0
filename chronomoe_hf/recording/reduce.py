"""What router calls add to a layer's sums: pure functions of what the tape remembers, for G layers of one shape.

No host read, no shape that depends on values, and nothing whose result depends on the order in which a GPU adds:
counts are whole numbers. So two runs give the same bits. What is left to do with a few numbers a layer is done once for
all layers of a forward (:func:`routing_table`), not once a chunk of them: it is launches that cost.

Shape suffixes: G layers, T router rows (tokens), E experts, K experts per token, S tokens read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from chronomoe_hf.metrics import js, overlap_only, top1_flip
from chronomoe_hf.recording.columns import Row
from chronomoe_hf.recording.rows import TokenSample

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


class RoutingParts(NamedTuple):
    """Sums over the rows of router calls of G layers, float64, before they are put into columns.

    What has one number a token is summed with that of all layers.

    Args:
        count_GF: ``[G, 2 width + 1]``: assignments per expert, a column that is zero, first choices per expert.
        real_GT: bool, real tokens.
        prob_GE: of the scores.
        var_GT: variance of the logits of every token.
        agrees_GT: bool, tokens that steering left where they were; None while nothing steers.
        disagreement_G4: of :func:`disagreement_sums`; None while it is not measured.
        rows: rows of each call.
        mask_T: bool, those that are no padding; None = all.
        num_k: experts per token.
        drops: capacity may drop assignments.
    """

    count_GF: Tensor
    real_GT: Tensor
    prob_GE: Tensor
    var_GT: Tensor
    agrees_GT: Tensor | None
    disagreement_G4: Tensor | None
    rows: int
    mask_T: Tensor | None
    num_k: int
    drops: bool


def routing_parts(
    batch: RouterBatch, row: Row, disagreement_G4: Tensor | None = None, scores: Scores | None = None
) -> RoutingParts:
    """Counts, probability sums and logit moments, and how many tokens steering sent elsewhere.

    A token whose logits are not finite is in no sum but "nonfinite"; padding is in none.

    Args:
        batch: the calls.
        row: the columns.
        disagreement_G4: from :func:`disagreement_sums`; None while it is not measured.
        scores: of the batch, where they are known already.
    """
    if scores is None:
        scores = Scores.of(batch.logits_GTE, batch.mask_T, batch.distribution, batch.masked_GE)
    num_groups, num_rows, _ = scores.prob_GTE.shape
    index_GTK = batch.index_GTK
    kept_GTK = torch.empty(index_GTK.shape, dtype=torch.float64, device=index_GTK.device)
    kept_GTK.copy_(scores.real_GT[..., None])
    if batch.kept_GTK is not None:
        kept_GTK = kept_GTK * batch.kept_GTK
    weight_GT = scores.real_GT.double()
    # Whole numbers in float64: exact in any order. Assignments, a column that stays zero, first choices.
    count_GF = kept_GTK.new_zeros(num_groups, 2 * row.width + 1)
    count_GF.scatter_add_(1, index_GTK.flatten(1), kept_GTK.flatten(1))
    count_GF[:, row.width + 1 :].scatter_add_(1, _first_choices(batch, scores), weight_GT)
    agrees_GT = None if batch.native_GTK is None else experts_agree(batch.native_GTK, index_GTK)
    return RoutingParts(
        count_GF=count_GF,
        real_GT=scores.real_GT,
        prob_GE=scores.prob_GTE.sum(1, dtype=torch.float64),
        var_GT=scores.var_GT,
        agrees_GT=agrees_GT,
        disagreement_G4=disagreement_G4,
        rows=num_rows,
        mask_T=batch.mask_T,
        num_k=index_GTK.shape[-1],
        drops=batch.kept_GTK is not None,
    )


def routing_table(parts: Sequence[RoutingParts], row: Row, measured_G4: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The parts of one or more chunks of one shape, in their columns.

    Args:
        parts: of calls of one key, in the order of their layers.
        row: the columns.
        measured_G4: disagreement of all their layers, where it was measured apart from the parts.

    Returns:
        float64 ``(G, head)`` and ``(G, tail)`` of all their layers: what is added to ``row.head`` and ``row.tail``.
    """
    first = parts[0]
    count_GF, real_GT = joined([part.count_GF for part in parts]), joined([part.real_GT for part in parts])
    prob_GE, var_GT = joined([part.prob_GE for part in parts]), joined([part.var_GT for part in parts])
    tokens_G1 = real_GT.sum(-1, keepdim=True, dtype=torch.float64)
    var_G1 = var_GT.masked_fill(~real_GT, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    count_GE, zero_G1, first_GE = count_GF.split([row.width, 1, row.width], dim=1)
    dropped_G1 = tokens_G1 * first.num_k - count_GE.sum(-1, keepdim=True) if first.drops else zero_G1
    expected = first.rows if first.mask_T is None else first.mask_T.sum()
    head = [count_GE, tokens_G1, dropped_G1, expected - tokens_G1, _one(tokens_G1.device).expand_as(tokens_G1), prob_GE]
    if prob_GE.shape[-1] < row.width:
        head.append(prob_GE.new_zeros(prob_GE.shape[0], row.width - prob_GE.shape[-1]))
    head.append(first_GE)
    agrees = [part.agrees_GT for part in parts if part.agrees_GT is not None]
    measured = [part.disagreement_G4 for part in parts if part.disagreement_G4 is not None]
    if measured_G4 is None:
        measured_G4 = joined(measured) if measured else zero_G1.expand(-1, 4)
    tail = [var_G1, measured_G4]
    if agrees:
        tail += [(joined(agrees) < real_GT).sum(-1, keepdim=True, dtype=torch.float64), tokens_G1]
    else:
        tail += [zero_G1, zero_G1]
    return torch.cat(head, dim=-1), torch.cat(tail, dim=-1)


def _one(device: torch.device) -> Tensor:
    """1.0 in float64 on a device; made once, outside a graph."""
    compiling = torch.compiler.is_compiling()
    return torch.ones((), dtype=torch.float64, device=device) if compiling else _kept_one(device)


@functools.cache
def _kept_one(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.float64, device=device)


def joined(parts: list[Tensor]) -> Tensor:
    """Parts of chunks, one after the other along their first dimension."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _first_choices(batch: RouterBatch, scores: Scores) -> Tensor:
    """Id of every token's first choice, int64 ``(G, T)``: the highest-scoring one where the slots are in no order."""
    if batch.ordered or batch.index_GTK.shape[-1] == 1:
        return batch.index_GTK[..., 0]
    best_GT1 = scores.prob_GTE.gather(-1, batch.index_GTK).argmax(-1, keepdim=True)
    return batch.index_GTK.gather(-1, best_GT1).squeeze(-1)


def experts_agree(native_TK: Tensor, steered_TK: Tensor) -> Tensor:
    """Bool ``(..., T)``: the two choices are the same set of experts (their order does not matter).

    Args:
        native_TK: ids, distinct in a token, shape ``(..., T, K)``.
        steered_TK: the same shape.
    """
    if native_TK.shape[-1] == 1:
        return (native_TK == steered_TK).squeeze(-1)
    same_TKK = native_TK[..., :, None] == steered_TK[..., None, :]
    return same_TKK.any(-1).all(-1)


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
