"""Ridge least squares for many output projections that share one residual, block by block.

The problem: rows r_t (one per token) are to be explained by sum_b A_b[t] V_b, where a token takes part in few blocks
(the experts it is routed to), and V_b should be small. Solved jointly, its matrix has (blocks * width)^2 entries, out
of reach for real models. Solved one block at a time against what the others leave (Gauss-Seidel), every solve is
width x width, and three sweeps come within noise of the joint solution (benchmarks/results/prune_quality.md).

Shape suffixes: T tokens, N tokens of one block, I width of a block's design, D width of the residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chronomoe_hf.errors import LifecycleError

_FACTOR_BYTES = 2**30  # factors of all blocks are kept between sweeps up to this; beyond it they are made anew


@dataclass(frozen=True)
class Block:
    """One block of the design: what an expert's output projection is multiplied with.

    Args:
        token_N: int64, ascending: the rows of the residual that the block takes part in.
        design_NI: their inputs of the output projection, any float dtype.
        gate_N: fp32 factor of each row (the combine weight).
    """

    token_N: Tensor
    design_NI: Tensor
    gate_N: Tensor

    def rows(self, count: int) -> Tensor:
        """The first `count` weighted design rows, fp32 ``(count, I)``."""
        return self.design_NI[:count].float() * self.gate_N[:count, None]


def solve_blocks(
    blocks: Sequence[Block], residual_TD: Tensor, *, num_fit: int, ridge: float, sweeps: int
) -> list[Tensor]:
    """Minimise ``sum_t |r_t - sum_b A_b[t] V_b|^2 + lambda sum_b |V_b|^2`` over the first `num_fit` tokens.

    Args:
        blocks: at least one; a block without a token to fit gets ``V = 0``.
        residual_TD: fp32, changed in place: on return it is what the solution leaves, on *all* tokens.
        num_fit: tokens that are fitted; the others (held out) are only predicted.
        ridge: lambda in units of the mean diagonal of ``A^T A`` over all blocks.
        sweeps: passes over the blocks, at least 1.

    Returns:
        ``V_b``, fp32 ``(I, D)`` each.

    Raises:
        LifecycleError: `ridge` is not positive, `sweeps` below 1, or nothing is finite.
    """
    if not ridge > 0.0 or sweeps < 1:
        raise LifecycleError(f"ridge must be positive and sweeps at least 1, got ridge={ridge}, sweeps={sweeps}")
    if not bool(torch.isfinite(residual_TD).all()):
        raise LifecycleError("the layer outputs to be fitted are not finite (NaN or infinity); check the batches")
    fits = [int((block.token_N < num_fit).sum()) for block in blocks]
    weight = penalty(blocks, fits, ridge)
    solution = [residual_TD.new_zeros(block.design_NI.shape[1], residual_TD.shape[1]) for block in blocks]
    if weight == 0.0:
        return solution
    keep = sum(min(fit, block.design_NI.shape[1]) ** 2 * 4 for block, fit in zip(blocks, fits, strict=True))
    solvers: dict[int, _Ridge] = {}
    for _ in range(sweeps):
        for index, (block, fit) in enumerate(zip(blocks, fits, strict=True)):
            if fit == 0:
                continue
            rows_NI = block.rows(len(block.token_N))
            solver = solvers.get(index) or _Ridge(rows_NI[:fit], weight)
            if keep <= _FACTOR_BYTES and sweeps > 1:
                solvers[index] = solver
            fitted_ND = residual_TD[block.token_N[:fit]] + rows_NI[:fit] @ solution[index]
            found_ID = solver.solve(rows_NI[:fit], fitted_ND)
            residual_TD.index_add_(0, block.token_N, rows_NI @ (solution[index] - found_ID))
            solution[index] = found_ID
    return solution


def penalty(blocks: Sequence[Block], fits: Sequence[int], ridge: float) -> float:
    """lambda: `ridge` times the mean diagonal of ``A^T A`` over all blocks ``A`` with a row to fit."""
    total, width = 0.0, 0
    for block, fit in zip(blocks, fits, strict=True):
        if fit:
            square_N = block.design_NI[:fit].float().square().sum(-1).double()
            total += float((square_N * block.gate_N[:fit].double().square()).sum())
            width += block.design_NI.shape[1]
    return ridge * total / width if width else 0.0


class _Ridge:
    """Ridge regression on fixed rows: the factor of the smaller of ``A^T A + lambda`` and ``A A^T + lambda``.

    The Gram matrix is a product in fp32, its factor is taken in fp64 where the device has it. With lambda at 1e-4 of
    the mean diagonal and above the product's rounding (1e-7 of it) does not matter.
    """

    def __init__(self, rows_NI: Tensor, weight: float) -> None:
        self.dual = rows_NI.shape[0] < rows_NI.shape[1]
        gram = rows_NI @ rows_NI.T if self.dual else rows_NI.T @ rows_NI
        wide = gram if gram.device.type == "mps" else gram.double()
        wide = wide + weight * torch.eye(wide.shape[0], dtype=wide.dtype, device=wide.device)
        factor, failed = torch.linalg.cholesky_ex(wide)
        if bool(failed):
            raise LifecycleError(
                "the refit's normal equations could not be factored: an expert's activations are not finite, or the "
                "ridge is too small for them; use a ridge of at least 0.0001"
            )
        self.factor = factor.float()

    def solve(self, rows_NI: Tensor, target_ND: Tensor) -> Tensor:
        """``argmin_V |target - rows V|^2 + lambda |V|^2``, ``(I, D)``."""
        if self.dual:
            return rows_NI.T @ torch.cholesky_solve(target_ND, self.factor)
        return torch.cholesky_solve(rows_NI.T @ target_ND, self.factor)
