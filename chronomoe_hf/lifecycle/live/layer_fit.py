"""One layer's least squares: from what its experts read and two routings to new output projections.

The routing whose output is the target and the routing to be fitted may be any two of the same tokens: the full model's
and a masked one's (refit), or those before and after experts were copied and rows were split.

Shape suffixes: T tokens, N tokens of one expert, M of these routed to it, D width of the output, I of the projection's
input.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.lifecycle.live.projections import OutputProjections, expert_outputs
from chronomoe_hf.lifecycle.live.samples import LayerSamples

# Ridge least squares for many output projections that share one residual, block by block.
#
# The problem: rows r_t (one per token) are to be explained by sum_b A_b[t] V_b, where a token takes part in few blocks
# (the experts it is routed to), and V_b should be small. Solved jointly, its matrix has (blocks * width)^2 entries,
# out of reach for real models. Solved one block at a time against what the others leave (Gauss-Seidel), every solve is
# width x width, and three sweeps come within noise of the joint solution (benchmarks/results/prune_quality.md).
#
# Shape suffixes: T tokens, N tokens of one block, I width of a block's design, D width of the residual.

_FACTOR_BYTES = 2**30  # factors of all blocks are kept between sweeps up to this; beyond it they are rebuilt


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


@dataclass(frozen=True, kw_only=True)
class LayerRefit:
    """What the refit does to one layer, on tokens that it was not fitted on.

    Args:
        layer_id: the layer.
        error_before, error_after: squared error of the layer's routed output against the full layer's, as a fraction
            of the latter's square; of the plain cut, and with the new projections.
        applied: the new projections are in the model. They are not where they did not lower the error.
        tokens: tokens fitted.
        rows_per_width: median over the survivors of tokens fitted per input of the projection; below about 4 the fit
            leans on the ridge.
    """

    layer_id: int
    error_before: float
    error_after: float
    applied: bool
    tokens: int
    rows_per_width: float


def fit_layer(
    layer_id: int,
    projections: OutputProjections,
    samples: LayerSamples,
    experts: Sequence[int],
    *,
    ridge: float,
    sweeps: int,
    target_TD: Tensor | None = None,
) -> tuple[LayerRefit, dict[int, Tensor]]:
    """New projections of `experts` in one layer, as the model would store them; nothing is changed.

    Args:
        layer_id: for the report.
        projections: the layer's.
        samples: its inputs, the routing whose output is the target, and the routing to be fitted.
        experts: whose projections may move; all others keep theirs.
        ridge: see :func:`refit`.
        sweeps: see :func:`refit`.
        target_TD: fp32, the layer's routed output before the change, where experts have got other weights since;
            None = the first routing with the present weights.

    Returns:
        The report, and expert -> new weight for every expert whose weight moved.
    """
    residual_TD, target_TD, blocks = _residual(projections, samples, experts, target_TD)
    held = slice(samples.num_fit, None)
    scale = max(float(target_TD[held].double().square().sum()), 1e-30)
    before = float(residual_TD[held].double().square().sum()) / scale
    solution = solve_blocks(
        [blocks[e] for e in experts], residual_TD, num_fit=samples.num_fit, ridge=ridge, sweeps=sweeps
    )
    weights = {}
    for expert, change_ID in zip(experts, solution, strict=True):
        block = blocks[expert]
        if len(block.token_N) == 0 or not bool(change_ID.any()):
            continue
        old_ID = projections.weight(expert)
        weights[expert] = projections.rounded(old_ID + change_ID)
        stored_ID = weights[expert].float() if projections.transposed else weights[expert].float().T
        rounding_ID = change_ID - (stored_ID - old_ID)
        residual_TD.index_add_(0, block.token_N, block.rows(len(block.token_N)) @ rounding_ID)
    after = float(residual_TD[held].double().square().sum()) / scale
    report = LayerRefit(
        layer_id=layer_id,
        error_before=before,
        error_after=after,
        applied=bool(weights) and after < before,
        tokens=samples.num_fit,
        rows_per_width=_rows_per_width([blocks[e] for e in experts], samples.num_fit),
    )
    return report, weights


def _rows_per_width(blocks: Sequence[Block], num_fit: int) -> float:
    return statistics.median(int((b.token_N < num_fit).sum()) / b.design_NI.shape[1] for b in blocks)


def _residual(
    projections: OutputProjections, samples: LayerSamples, experts: Sequence[int], given_TD: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[int, Block]]:
    """What the new routing leaves of the target with the present weights, the target, and the design per expert."""
    movable = set(experts)
    num_tokens, blocks = samples.hidden_TD.shape[0], {}
    residual_TD = target_TD = None
    for expert in range(projections.num_experts):
        before_T, after_T = samples.gates(expert)
        if given_TD is not None:
            before_T = torch.zeros_like(after_T)
        token_N = ((before_T != 0) | (after_T != 0)).nonzero().flatten()
        if len(token_N) == 0 and expert not in movable:
            continue
        hidden_ND = samples.hidden_TD[token_N]
        if residual_TD is None and len(token_N):
            projections.require_linear(hidden_ND[:16], expert)
        design_NI = projections.inputs(hidden_ND, expert)
        output_ND = design_NI.float() @ projections.weight(expert)
        bias_D = projections.bias(expert)
        output_ND = output_ND if bias_D is None else output_ND + bias_D
        if residual_TD is None or target_TD is None:
            residual_TD = output_ND.new_zeros(num_tokens, output_ND.shape[1])
            target_TD = torch.zeros_like(residual_TD)
        before_N, after_N = before_T[token_N], after_T[token_N]
        target_TD.index_add_(0, token_N, output_ND * before_N[:, None])
        residual_TD.index_add_(0, token_N, output_ND * (before_N - after_N)[:, None])
        if expert in movable:
            used_M = after_N.nonzero().flatten()
            blocks[expert] = Block(token_N[used_M], design_NI[used_M], after_N[used_M])
    if residual_TD is None or target_TD is None:
        raise LifecycleError(f"{projections.layer.name}: no token of the batches reaches an expert")
    if given_TD is not None:
        residual_TD, target_TD = residual_TD + given_TD, given_TD
    return residual_TD, target_TD, blocks


def routed_output(projections: OutputProjections, samples: LayerSamples) -> Tensor:
    """The layer's routed output under the first routing with the present weights, fp32 ``(T, D)``."""
    out_TD = None
    for expert in range(projections.num_experts):
        gate_T, _ = samples.gates(expert)
        token_N = gate_T.nonzero().flatten()
        if len(token_N) == 0:
            continue
        output_ND = expert_outputs(projections.layer, samples.hidden_TD[token_N], expert).float()
        if out_TD is None:
            out_TD = output_ND.new_zeros(samples.hidden_TD.shape[0], output_ND.shape[1])
        out_TD.index_add_(0, token_N, output_ND * gate_T[token_N, None])
    if out_TD is None:
        raise LifecycleError(f"{projections.layer.name}: no token of the batches reaches an expert")
    return out_TD
