"""Fits the direction V for which x V is about 1 for every token.

A lens can only shift the logits of all tokens alike if x V hardly differs between them. The mean router input mu alone
is a poor reader wherever it is short beside the spread of the tokens about it: a lens so read scatters tokens instead
of moving them. Ridge regression of 1 on x leaves out the directions in which tokens differ.
``benchmarks/results/balance.md`` has both readers' spreads.

A reader is fitted in two folds of a sample and judged on the fold that it has not seen; the direction used is the mean
of the two, whose readings have at most the mean of their standard deviations.

Shape suffixes: T tokens, D router input width, F tokens in a fold.
"""

from __future__ import annotations

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
    sampled_SD = x_TD if sample_S is None else x_TD.index_select(0, sample_S)
    counts_S = real_T if sample_S is None else real_T.index_select(0, sample_S)
    if valid_S is not None:
        counts_S = counts_S & valid_S
    half = sampled_SD.shape[0] // 2
    # Neighbours go to different folds, so that both see every part of the batch.
    counts_2F = counts_S[: 2 * half].view(half, 2).T
    x_2FD = sampled_SD[: 2 * half].view(half, 2, x_TD.shape[-1]).transpose(0, 1).float()
    x_2FD, real_2F = torch.where(counts_2F[..., None], x_2FD, 0.0), counts_2F.float()
    fitted_2D = _ridge(x_2FD, real_2F) if reader == "ridge" else _mean(x_2FD, real_2F)
    reading_2F = (x_2FD @ fitted_2D.flip(0)[..., None]).squeeze(-1)  # filler rows read 0
    weight = real_2F.sum()
    return torch.cat(
        [
            _sum_real(x_TD, real_T),
            fitted_2D.mean(0) * weight,
            torch.stack([real_T.sum(dtype=torch.float32), weight, reading_2F.sum(), reading_2F.square().sum()]),
        ]
    )


def _sum_real(x_TD: Tensor, real_T: Tensor) -> Tensor:
    """Sum of the real rows, fp32 ``(D,)``; works on a masked copy of at most PIECE bytes at a time."""
    step = max(1, PIECE // (x_TD.shape[-1] * x_TD.element_size()))
    if torch.compiler.is_compiling() or x_TD.shape[0] <= step:  # a graph needs no copy at all
        return torch.where(real_T[:, None], x_TD, 0.0).sum(0, dtype=torch.float32)
    total_D = x_TD.new_zeros(x_TD.shape[-1], dtype=torch.float32)
    for part_TD, part_T in zip(x_TD.split(step), real_T.split(step), strict=True):
        total_D += torch.where(part_T[:, None], part_TD, 0.0).sum(0, dtype=torch.float32)
    return total_D


def _mean(x_2FD: Tensor, real_2F: Tensor) -> Tensor:
    """mu / |mu|^2 of each fold, the reader of SPEC section 5."""
    mean_2D = x_2FD.sum(1) / real_2F.sum(1, keepdim=True).clamp_min(1.0)
    return mean_2D / mean_2D.square().sum(-1, keepdim=True).clamp_min(1e-12)


def _ridge(x_2FD: Tensor, real_2F: Tensor) -> Tensor:
    """Minimiser of sum_t (1 - x_t V)^2 + penalty |V|^2 in each fold, through the F x F system of its dual."""
    gram_2FF = x_2FD @ x_2FD.mT
    length_2 = gram_2FF.diagonal(dim1=-2, dim2=-1).sum(-1) / real_2F.sum(-1).clamp_min(1.0)
    penalty_2 = (RIDGE * length_2).clamp_min(1e-6)
    eye_FF = torch.eye(gram_2FF.shape[-1], device=x_2FD.device)
    # The _ex form neither checks nor waits; the penalty keeps the matrix positive definite.
    factor_2FF, _ = torch.linalg.cholesky_ex(gram_2FF + penalty_2[:, None, None] * eye_FF)
    dual_2F1 = torch.cholesky_solve(real_2F[..., None], factor_2FF)
    return (x_2FD.mT @ dual_2F1).squeeze(-1)


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
