"""The block solver against the joint normal equations, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.lifecycle.live.layer_fit import Block, solve_blocks

TOKENS, FIT, WIDE = 120, 90, 5


def problem(seed: int, widths: list[int], share: float) -> tuple[list[Block], Tensor, np.ndarray]:
    """Blocks over random subsets of tokens, a residual, and the same design as one dense matrix."""
    generator = torch.Generator().manual_seed(seed)
    blocks, columns = [], []
    for width in widths:
        token_N = (torch.rand(TOKENS, generator=generator) < share).nonzero().flatten()
        design_NI = torch.randn(len(token_N), width, generator=generator)
        gate_N = torch.rand(len(token_N), generator=generator) + 0.1
        blocks.append(Block(token_N, design_NI, gate_N))
        dense = np.zeros((TOKENS, width))
        dense[token_N.numpy()] = (design_NI * gate_N[:, None]).numpy()
        columns.append(dense)
    return blocks, torch.randn(TOKENS, WIDE, generator=generator), np.concatenate(columns, axis=1)


def normal_equations(design: np.ndarray, target: np.ndarray, ridge: float, used: np.ndarray) -> np.ndarray:
    """(A^T A + lambda I) V = A^T r over the rows to fit; lambda = ridge * mean diagonal over used columns."""
    fit = design[:FIT]
    gram = fit.T @ fit
    weight = ridge * np.diag(gram)[used].mean()
    return np.linalg.solve(gram + weight * np.eye(len(gram)), fit.T @ target[:FIT])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    share=st.sampled_from([0.03, 0.3, 0.9]),
    ridge=st.sampled_from([0.01, 0.1, 1.0]),
)
def test_many_sweeps_solve_the_joint_problem(seed: int, widths: list[int], share: float, ridge: float) -> None:
    blocks, target_TD, design = problem(seed, widths, share)
    used = np.concatenate([np.full(w, bool((b.token_N < FIT).any())) for w, b in zip(widths, blocks, strict=True)])
    residual_TD = target_TD.clone()
    found = torch.cat(solve_blocks(blocks, residual_TD, num_fit=FIT, ridge=ridge, sweeps=600)).double().numpy()
    expected = np.zeros_like(found)
    if used.any():
        expected = normal_equations(design, target_TD.double().numpy(), ridge, used)
    # With a small ridge sweeps reach some directions slowly: the objective agrees long before the solution does.
    weight = ridge * np.diag(design[:FIT].T @ design[:FIT])[used].mean() if used.any() else 0.0
    reached, best = (
        ((target_TD.numpy()[:FIT] - design[:FIT] @ each) ** 2).sum() + weight * (each**2).sum()
        for each in (found, expected)
    )
    assert reached <= best * (1 + 1e-5) + 1e-6
    if ridge >= 0.1:
        np.testing.assert_allclose(found, expected, atol=2e-4 * max(1.0, np.abs(expected).max()))
    np.testing.assert_allclose(residual_TD.numpy(), target_TD.numpy() - design @ found, atol=1e-4)


def test_every_sweep_lowers_the_objective_and_three_come_close() -> None:
    blocks, target_TD, design = problem(3, [8, 8, 8], 0.4)
    target = target_TD.double().numpy()
    weight = 0.01 * np.diag(design[:FIT].T @ design[:FIT]).mean()

    def objective(solution: np.ndarray) -> float:
        return float(((target[:FIT] - design[:FIT] @ solution) ** 2).sum() + weight * (solution**2).sum())

    best = objective(normal_equations(design, target, 0.01, np.ones(24, dtype=bool)))
    values = [objective(np.zeros((24, WIDE)))]
    for sweeps in (1, 2, 3):
        found = solve_blocks(blocks, target_TD.clone(), num_fit=FIT, ridge=0.01, sweeps=sweeps)
        values.append(objective(torch.cat(found).double().numpy()))
    assert values == sorted(values, reverse=True) and values[3] >= best - 1e-6
    assert values[3] - best < 0.05 * (values[0] - best)


def test_held_out_tokens_are_predicted_but_not_fitted() -> None:
    blocks, target_TD, _ = problem(5, [4, 4], 0.8)
    other_TD = target_TD.clone()
    other_TD[FIT:] += 100.0
    first = solve_blocks(blocks, target_TD, num_fit=FIT, ridge=0.01, sweeps=2)
    second = solve_blocks(blocks, other_TD, num_fit=FIT, ridge=0.01, sweeps=2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_block_without_tokens_does_not_move() -> None:
    empty = Block(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), torch.zeros(0))
    late = Block(torch.arange(FIT, TOKENS), torch.randn(TOKENS - FIT, 4), torch.ones(TOKENS - FIT))
    assert all(
        not v.any() for v in solve_blocks([empty, late], torch.randn(TOKENS, 3), num_fit=FIT, ridge=0.1, sweeps=1)
    )


@pytest.mark.parametrize("bad", [{"ridge": 0.0}, {"ridge": -1.0}, {"ridge": float("nan")}, {"sweeps": 0}])
def test_bad_settings_and_values_are_refused(bad: dict[str, float]) -> None:
    blocks, target_TD, _ = problem(1, [4], 0.5)
    with pytest.raises(LifecycleError, match="ridge must be positive"):
        solve_blocks(blocks, target_TD, **{"num_fit": FIT, "ridge": 0.1, "sweeps": 1, **bad})  # type: ignore[arg-type]
    target_TD[3, 2] = float("inf")
    with pytest.raises(LifecycleError, match="not finite"):
        solve_blocks(blocks, target_TD, num_fit=FIT, ridge=0.1, sweeps=1)
