"""Where a lens should move the logits, and the rank-1 basis that moves them there. Pure functions.

Solved in fp64 on the host, once per interval.

Shape suffixes: D hidden size, E experts, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Eigenvalues of W W^T below this fraction of the largest are treated as zero: fp32 weights carry no more information.
_EIGEN_CUTOFF = 1e-12
_PIVOT_CUTOFF = 1e-8


def steering_target(share_E: Tensor | Sequence[float]) -> Tensor:
    """Where the logits should move: up for idle experts, down for busy ones.

    ``t_e = clip((1/E - share_e) E, -1, 1)``, then zero-centred, because a shift common to all experts changes no
    softmax and no top-k.

    Args:
        share_E: share of the layer's assignments per expert, shape ``(E,)``.

    Returns:
        ``t``, shape ``(E,)``, float64 on the CPU, in units of one logit standard deviation.
    """
    share = host64(share_E)
    t_E = (1.0 - share * share.numel()).clamp(-1.0, 1.0)
    return t_E - t_E.mean()


def row_norm_ratio(weight_ED: Tensor) -> Tensor:
    """How far each expert's logit spreads over tokens, relative to the layer: centred row norms over their rms.

    A normalised router input spreads much the same in every direction, so the spread of an expert's logit follows the
    length of its row. Where rows differ in length, one shift for all would move an expert with a small weight row too
    far.

    Returns:
        Shape ``(E,)``, float64 on the CPU, rms 1; all ones where the rows do not differ at all.
    """
    weight = host64(weight_ED)
    norm_E = (weight - weight.mean(0)).norm(dim=1)
    rms = float(norm_E.square().mean().sqrt())
    return norm_E / rms if rms > 0.0 else torch.ones_like(norm_E)


def basis_problem(
    mu_D: Tensor, weight_ED: Tensor, share_E: Tensor | Sequence[float], logit_std: float = 1.0
) -> str | None:
    """Why no steering basis can be built from these inputs, or None if one can."""
    mu = host64(mu_D)
    if not bool(torch.isfinite(mu).all()):
        return "the mean router input has non-finite entries"
    if float(mu.norm()) == 0.0:
        return "the mean router input is zero"
    if not bool(torch.isfinite(weight_ED).all()):
        return "the router weight has non-finite entries"
    if not math.isfinite(logit_std) or logit_std <= 0.0:
        return f"the logit standard deviation is {logit_std}, it must be positive and finite"
    if not bool(torch.isfinite(host64(share_E)).all()):
        return "the shares have non-finite entries"
    return None


def least_squares_basis(
    mu_D: Tensor,
    weight_ED: Tensor,
    share_E: Tensor | Sequence[float],
    logit_std: float,
    spread_E: Tensor | None = None,
    reader_D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rank-1 basis that moves the mean token's logits by the steering target.

    V reads how much of the mean token is in x (1 for the mean token itself; by default ``V = mu / |mu|^2``), and
    ``U = pinv(W) (t * logit_std)`` is the smallest change of x whose logits are the target. At s = 1 the mean token's
    logits move by exactly t logit standard deviations wherever t lies in the range of W (always for E <= D and
    independent rows), and by the closest possible shift elsewhere.

    Args:
        mu_D: mean router input of the window, shape ``(D,)``.
        weight_ED: router weight, shape ``(E, D)``, any floating dtype.
        share_E: share of assignments per expert, shape ``(E,)``.
        logit_std: standard deviation of the clean logits, positive.
        spread_E: factors on the target, then centred again, shape ``(E,)``; see :func:`row_norm_ratio`.
        reader_D: direction of V, shape ``(D,)``; it is scaled to read 1 for `mu_D`. None = along `mu_D`.

    Returns:
        ``(V, U)``, shapes ``(D, 1)`` and ``(1, D)``, float32 on the CPU. Both are zero (an identity lens) where
        :func:`basis_problem` names a reason.
    """
    if basis_problem(mu_D, weight_ED, share_E, logit_std) is not None:
        return no_basis(weight_ED.shape[1])
    weight = host64(weight_ED)
    target_E = steering_target(share_E) * logit_std
    if spread_E is not None:
        target_E = target_E * spread_E
        target_E = target_E - target_E.mean()
    shift_D = weight.T @ _solved(weight @ weight.T, target_E)  # pinv(W) t = W^T (W W^T)^+ t
    return reader_column(mu_D, reader_D), shift_D.unsqueeze(0).float()


def _solved(gram_EE: Tensor, target_E: Tensor) -> Tensor:
    """``gram^+ target``: by Cholesky where the rows are independent, else by an eigendecomposition.

    The latter costs ten times as much. It is taken where a pivot is near zero, or the solution found is none.
    """
    factor_EE, failed = torch.linalg.cholesky_ex(gram_EE)
    if int(failed) == 0:
        pivot_E = factor_EE.diagonal().square()
        found_E = torch.cholesky_solve(target_E[:, None], factor_EE)[:, 0]
        off = float((gram_EE @ found_E - target_E).norm())
        if float(pivot_E.min()) > _PIVOT_CUTOFF * float(pivot_E.max()) and off <= 1e-9 * float(target_E.norm()):
            return found_E
    value_E, vector_EE = torch.linalg.eigh(gram_EE)
    keep_E = value_E > value_E[-1] * _EIGEN_CUTOFF
    inverse_E = torch.where(keep_E, 1.0 / value_E.where(keep_E, torch.ones_like(value_E)), torch.zeros_like(value_E))
    return vector_EE @ (inverse_E * (vector_EE.T @ target_E))


def router_basis(
    mu_D: Tensor, weight_ED: Tensor, share_E: Tensor | Sequence[float], reader_D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The original steering direction: the unit vector of ``sum_e (1/E - share_e) W_e``.

    Args:
        mu_D: mean router input of the window, shape ``(D,)``; V reads it as in :func:`least_squares_basis`.
        weight_ED: router weight, shape ``(E, D)``.
        share_E: share of assignments per expert, shape ``(E,)``.
        reader_D: as in :func:`least_squares_basis`.

    Returns:
        ``(V, U)``, shapes ``(D, 1)`` and ``(1, D)``, float32 on the CPU; zero where there is no direction.

    Source: ChronoMoE v2 lens, anti-dominance steering.
    """
    direction_D = (1.0 / weight_ED.shape[0] - host64(share_E)) @ host64(weight_ED)
    norm = float(direction_D.norm())
    if basis_problem(mu_D, weight_ED, share_E) is not None or norm == 0.0:
        return no_basis(weight_ED.shape[1])
    return reader_column(mu_D, reader_D), (direction_D / norm).unsqueeze(0).float()


def carried(old_scale: float, new_scale: float, memory: float) -> float:
    """Fraction of the old basis in the new one, so that scale times basis is a leaky sum of corrections.

    With A = scale * basis, the new A is ``memory * A_old + (s_new - memory * s_old) * fresh``: what the scale gains
    over its own decay is spent on the fresh direction, and a scale that only decays keeps its direction.

    Args:
        old_scale: scale in force during the window.
        new_scale: scale of the next window, positive.
        memory: decay per evaluation, in [0, 1]; 0 forgets the old basis.
    """
    return min(memory * old_scale, new_scale) / new_scale


def host64(value: Tensor | Sequence[float]) -> Tensor:
    """A float64 copy on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float64)
    return torch.tensor(value, dtype=torch.float64)


def reader_column(mu_D: Tensor, reader_D: Tensor | None) -> Tensor:
    """`reader_D` scaled to read 1 for the mean token, as a column; ``mu / |mu|^2`` where it reads nothing.

    The division goes by the norm twice so that tiny means do not underflow.
    """
    mu = host64(mu_D)
    norm = float(mu.norm())
    unit = mu / norm
    direction = unit if reader_D is None else host64(reader_D)
    reading = float(unit @ direction)
    if not math.isfinite(reading) or reading <= 0.0:
        direction, reading = unit, 1.0
    return (direction / reading / norm).unsqueeze(1).float()


def no_basis(d_model: int) -> tuple[Tensor, Tensor]:
    """The identity lens: a zero ``(V, U)`` of rank 1."""
    return torch.zeros(d_model, 1), torch.zeros(1, d_model)
