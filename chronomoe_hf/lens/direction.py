"""Fits the direction V for which x V is about 1 for every token.

A lens can only shift the logits of all tokens alike if x V hardly differs between them. The mean router input mu alone
is a poor reader wherever it is short beside the spread of the tokens about it: a lens so read scatters tokens instead
of moving them. Ridge regression of 1 on x leaves out the directions in which tokens differ.
``benchmarks/results/balance_changed.md`` has both readers' spreads.

A reader is fitted in two folds of a sample and judged on the fold that it has not seen; the direction used is the mean
of the two, whose readings have at most the mean of their standard deviations.

Shape suffixes: G calls of one shape, T tokens, D router input width, S tokens sampled, F tokens in a fold, N = 2 F,
P = 2 G folds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from chronomoe_hf.config import ReaderName

SAMPLE = 256  # tokens read per micro-batch and layer, both folds together
RIDGE = 0.1  # penalty, in units of the mean squared length of a router input
UNREADABLE = 1e6  # the spread of a reader that reads nothing
PIECE = 16 * 2**20  # bytes of router inputs that are copied at a time
_NUMBERS = 4  # after the two directions: tokens, sampled tokens, sum and square sum of their readings


def sums_width(d_model: int) -> int:
    """Length of the vector that :func:`input_sums` returns: 2 D + 4."""
    return 2 * d_model + _NUMBERS


def input_sums(
    x_TD: Tensor, real_T: Tensor, sample_S: Tensor | None, valid_S: Tensor | None, reader: ReaderName
) -> Tensor:
    """Everything about one batch of router inputs that a lens is aimed by, in a form that adds up over batches.

    No host transfer, no shape that depends on values, and no fp32 copy of the inputs.

    Args:
        x_TD: router inputs, native dtype; may hold anything where `real_T` is False.
        real_T: bool, real tokens.
        sample_S: positions of the tokens that the reader is fitted on, None = all; the last one is left out if S is
            odd.
        valid_S: bool, False for filler in the sample; None = all count.
        reader: ``"ridge"`` or ``"mean"``.

    Returns:
        fp32 ``(2 D + 4,)``: sum of x; direction times sampled tokens; tokens; sampled tokens; sum and sum of squares
        of their readings x V, each by the V of the other fold.
    """
    real_T = real_T.bool()
    folds = Folds.of(x_TD.shape[0], sample_S, valid_S, x_TD.device)
    rows_1ND = x_TD.index_select(0, folds.position_N)[None]
    return reader_sums(sum_real(x_TD, real_T)[None], rows_1ND, real_T[None], folds, reader)[0]


class Folds(NamedTuple):
    """Which tokens of a call the reader is fitted on, N = 2 F of them, one fold after the other.

    Args:
        position_N: int64 rows of the call. Neighbours are in different folds, so that both see every part of it.
        valid_N: bool, False for filler; None = all count.
    """

    position_N: Tensor
    valid_N: Tensor | None

    @classmethod
    def of(cls, num_rows: int, sample_S: Tensor | None, valid_S: Tensor | None, device: torch.device) -> Folds:
        """Deal a sample out; arguments as in :func:`input_sums`."""
        if sample_S is None:
            sample_S = torch.arange(num_rows, device=device)
        half = sample_S.shape[0] // 2
        position_N, valid_N = (
            None if each is None else each[: 2 * half].view(half, 2).T.flatten() for each in (sample_S, valid_S)
        )
        assert position_N is not None
        return cls(position_N, valid_N)


def reader_sums(sum_GD: Tensor, rows_GND: Tensor, real_GT: Tensor, folds: Folds, reader: ReaderName) -> Tensor:
    """:func:`input_sums` of G calls of one shape at once.

    Args:
        sum_GD: sums of the real rows, fp32, from :func:`sum_real`.
        rows_GND: the rows that `folds` names, native dtype.
        real_GT: bool, real tokens of the whole calls.
        folds: which rows they are.
        reader: ``"ridge"`` or ``"mean"``.

    Returns:
        fp32 ``(G, 2 D + 4)``.
    """
    num_groups, num_rows, width = rows_GND.shape
    real_GN = real_GT.index_select(1, folds.position_N)
    if folds.valid_N is not None:
        real_GN = real_GN & folds.valid_N
    rows_GND = torch.where(real_GN[..., None], rows_GND, 0.0).float()
    # The two folds of a call become two problems of their own: P = 2 G of them.
    folded = (2 * num_groups, num_rows // 2)
    x_PFD, real_PF = rows_GND.view(*folded, width), real_GN.float().view(folded)
    fitted_PD = _ridge(x_PFD, real_PF) if reader == "ridge" else _mean(x_PFD, real_PF)
    fitted_G2D = fitted_PD.view(num_groups, 2, width)
    other_PD = fitted_G2D.flip(1).view(-1, width)
    reading_GN = (x_PFD @ other_PD[..., None]).view(num_groups, num_rows)  # filler rows read 0
    weight_G1 = real_PF.view(num_groups, num_rows).sum(-1, keepdim=True)
    tokens_G1 = real_GT.sum(-1, keepdim=True, dtype=torch.float32)
    moments = [reading_GN.sum(-1, keepdim=True), reading_GN.square().sum(-1, keepdim=True)]
    return torch.cat([sum_GD, fitted_G2D.mean(1) * weight_G1, tokens_G1, weight_G1, *moments], dim=-1)


def finite_rows(x_TD: Tensor) -> Tensor:
    """Bool ``(T,)``: the sum of a row is a number (False for NaN and infinities)."""
    return x_TD.sum(-1, dtype=torch.float32).abs() < math.inf


def sum_real(x_TD: Tensor, real_T: Tensor, out: Tensor | None = None) -> Tensor:
    """Sum of the real rows, fp32 ``(D,)``; works on a masked copy of at most PIECE bytes at a time.

    Args:
        x_TD: native dtype.
        real_T: bool.
        out: fp32 ``(D,)`` to write to; None = a new tensor.
    """
    step = max(1, PIECE // (x_TD.shape[-1] * x_TD.element_size()))
    if torch.compiler.is_compiling():  # a graph needs no copy at all
        return torch.where(real_T[:, None], x_TD, 0.0).sum(0, dtype=torch.float32)
    if out is None:
        out = x_TD.new_empty(x_TD.shape[-1], dtype=torch.float32)
    first_TD, first_T = x_TD[:step], real_T[:step]
    torch.sum(torch.where(first_T[:, None], first_TD, 0.0), 0, dtype=torch.float32, out=out)
    for start in range(step, x_TD.shape[0], step):
        part_TD, part_T = x_TD[start : start + step], real_T[start : start + step]
        out += torch.where(part_T[:, None], part_TD, 0.0).sum(0, dtype=torch.float32)
    return out


def _mean(x_PFD: Tensor, real_PF: Tensor) -> Tensor:
    """mu / |mu|^2 of each fold, the reader ``"mean"`` (docs/concepts.md, "The lens")."""
    mean_PD = x_PFD.sum(1) / real_PF.sum(1, keepdim=True).clamp_min(1.0)
    return mean_PD / mean_PD.square().sum(-1, keepdim=True).clamp_min(1e-12)


def _ridge(x_PFD: Tensor, real_PF: Tensor) -> Tensor:
    """Minimiser of sum_t (1 - x_t V)^2 + penalty |V|^2 in each fold, through the F x F system of its dual."""
    gram_PFF = x_PFD @ x_PFD.mT
    length_P = gram_PFF.diagonal(dim1=-2, dim2=-1).sum(-1) / real_PF.sum(-1).clamp_min(1.0)
    gram_PFF.diagonal(dim1=-2, dim2=-1).add_((RIDGE * length_P).clamp_min(1e-6)[:, None])
    # The _ex form neither checks nor waits; the penalty keeps the matrix positive definite.
    factor_PFF, _ = torch.linalg.cholesky_ex(gram_PFF)
    dual_PF1 = torch.cholesky_solve(real_PF[..., None], factor_PFF)
    return (x_PFD.mT @ dual_PF1).squeeze(-1)


class RouterInputs(NamedTuple):
    """What a window's last step says about the inputs of one router, over all ranks.

    Attributes:
        mean_D: mean input of the real tokens, fp32.
        reader_D: direction V, not yet scaled to read 1 for the mean input, fp32.
        spread: standard deviation of x V over its mean, on tokens that V was not fitted on; 0-dim, fp64; `UNREADABLE`
            at most.
    """

    mean_D: Tensor
    reader_D: Tensor
    spread: Tensor

    @staticmethod
    def spreads(inputs: Mapping[int, RouterInputs]) -> dict[int, float]:
        """The spread of each layer's lens as Python floats; one transfer for all layers."""
        spread_L = torch.stack([each.spread for each in inputs.values()]).tolist() if inputs else []
        return dict(zip(inputs, spread_L, strict=True))

    @classmethod
    def from_sums(cls, sums: Tensor) -> RouterInputs:
        """Inverse of :func:`input_sums`, after adding up batches and ranks; fp64 in."""
        total_D, fitted_D, numbers = sums.split([(sums.numel() - _NUMBERS) // 2] * 2 + [_NUMBERS])
        tokens, sampled, reading, square = numbers.double().unbind()
        mean = reading / sampled.clamp_min(1.0)
        variance = (square / sampled.clamp_min(1.0) - mean.square()).clamp_min(0.0)
        return cls(
            mean_D=(total_D / tokens.clamp_min(1.0)).float(),
            reader_D=(fitted_D / sampled.clamp_min(1.0)).float(),
            spread=torch.where(mean > 0, variance.sqrt() / mean.clamp_min(1e-30), UNREADABLE).clamp_max(UNREADABLE),
        )
