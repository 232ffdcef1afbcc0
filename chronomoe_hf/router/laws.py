"""How beta moves and when it is held back: the coherence law, loss-free balancing, and the bridge veto. Pure functions.

Shape suffixes: L layers (any leading shape), E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from chronomoe_hf.errors import ConfigError

_SWING = 0.3  # a relative error of this size on the other side is a swing, a smaller one the noise of a batch
_SHRINK, _GROW, _SMALLEST = 0.5, 1.1, 0.1


def relevance_of(disagreement: Tensor, theta: float) -> Tensor:
    """Relevance r of beta: 1 below theta, falling linearly to 0 at 3 theta.

    Args:
        disagreement: of the full beta over the previous step, any shape, >= 0.
        theta: in the unit of the disagreement, > 0.

    Returns:
        r in [0, 1], shape of the input.

    Raises:
        ConfigError: theta is not positive.

    Source: docs/concepts.md, "Bridge veto": r = 1 - (d - theta) / (2 theta) between theta and 3 theta.
    """
    if theta <= 0:
        raise ConfigError(f"the veto's threshold must be positive, got {theta}")
    return (1.0 - (disagreement - theta) / (2.0 * theta)).clamp(0.0, 1.0)


def centre_and_clamp(beta_LE: Tensor, cap: float, mask_LE: Tensor | None = None) -> Tensor:
    """Shift each layer so that the clamped bias sums to zero: both zero-centred and within +-cap.

    Only differences matter, so find the shift after which the clamped biases sum to 0. Clamping after centring would
    bring a common part back. The sum is piecewise linear and decreasing in the shift, with bends at ``beta +- cap``;
    solve for its root, in float64.

    Args:
        beta_LE: shape ``(..., E)``.
        cap: bound on the absolute value, > 0.
        mask_LE: bool, False for padding columns (kept at 0).

    Returns:
        New tensor, dtype of `beta_LE`.
    """
    wide_LE = beta_LE.double()
    keep_LE = torch.ones_like(wide_LE) if mask_LE is None else mask_LE.double()
    num_L = keep_LE.sum(-1, keepdim=True).clamp_min(1.0)
    # Centring first makes the common case (nothing touches the cap) exact.
    centred_LE = (wide_LE - (wide_LE * keep_LE).sum(-1, keepdim=True) / num_L) * keep_LE
    bend_LB, order_LB = torch.cat([centred_LE - cap, centred_LE + cap], dim=-1).sort(-1)
    slope_LB = torch.cat([-keep_LE, keep_LE], dim=-1).gather(-1, order_LB).cumsum(-1)  # of the stretch after each bend
    fall_LB = (slope_LB[..., :-1] * bend_LB.diff(dim=-1)).cumsum(-1)
    sum_LB = torch.cat([cap * num_L, cap * num_L + fall_LB], dim=-1)
    # The sum starts at cap * E > 0 and ends at -cap * E: the root lies after the last bend where it is positive.
    at_L = (sum_LB > 0).sum(-1, keepdim=True) - 1
    stretch_L = sum_LB.gather(-1, at_L) / slope_LB.gather(-1, at_L).clamp_max(-1.0)
    fits_L = centred_LE.abs().amax(-1, keepdim=True) <= cap
    shift_L = torch.where(fits_L, 0.0, bend_LB.gather(-1, at_L) - stretch_L)
    return ((centred_LE - shift_L).clamp(-cap, cap) * keep_LE).to(beta_LE.dtype)


def coherence_law(
    beta_LE: Tensor,
    phi_slow_LE: Tensor,
    seen_LE: Tensor,
    tokens_LE: Tensor,
    *,
    eta: float,
    tau: float | str,
    k_max: float,
    mask_LE: Tensor | None = None,
    centred: bool = True,
) -> Tensor:
    """beta_coeff + eta (Phi_slow - tau) for the experts in `seen_LE`; then zero-centred and clamped.

    Args:
        beta_LE: current coefficients, shape ``(..., E)``, fp32.
        phi_slow_LE: bias-corrected slow clock, same shape.
        seen_LE: bool, experts with recent evidence; the others do not move (but are re-centred with the layer).
        tokens_LE: weights of the layer mean.
        eta: gain.
        tau: a number, or ``"layer_mean"``: token-weighted mean of Phi_slow over the seen experts.
        k_max: cap.
        mask_LE: bool, False for padding columns.
        centred: False only clamps, as the original: with a number for tau, all experts may then end at one cap.

    Returns:
        New coefficients, fp32.

    Source: docs/concepts.md, "beta, the slow routing bias".
    """
    phi = phi_slow_LE.double()
    if tau == "layer_mean":
        weight_LE = torch.where(seen_LE, tokens_LE.double(), 0.0)
        target = (phi * weight_LE).sum(-1, keepdim=True) / weight_LE.sum(-1, keepdim=True).clamp_min(1e-12)
    elif isinstance(tau, str):
        raise ConfigError(f"tau must be a number or 'layer_mean', got {tau!r}")
    else:
        target = torch.full_like(phi[..., :1], float(tau))
    moved_LE = beta_LE.double() + torch.where(seen_LE, eta * (phi - target), 0.0)
    if centred:
        return centre_and_clamp(moved_LE, k_max, mask_LE).to(torch.float32)
    clamped_LE = moved_LE.clamp(-k_max, k_max).to(torch.float32)
    return clamped_LE if mask_LE is None else clamped_LE * mask_LE


def balance_error(count_LE: Tensor, num_experts_L: Tensor | int) -> Tensor:
    """How far each expert is below its fair share, ``clip((fair - count) / fair, -1, 1)``.

    Args:
        count_LE: assignments of the step, shape ``(..., E)``.
        num_experts_L: E of each layer, broadcastable to ``(..., 1)``.

    Returns:
        float64, shape of `count_LE`; 0 for a layer without a count.
    """
    count_LE = count_LE.double()
    fair_L = count_LE.sum(-1, keepdim=True) / num_experts_L
    return ((fair_L - count_LE) / fair_L.clamp_min(1e-12)).clamp(-1.0, 1.0)


def next_gain(gain_LE: Tensor, error_LE: Tensor) -> Tensor:
    """Per-expert step size of the quadratic rule: halved when the error changes sign, grown otherwise (Rprop).

    Where many tokens look alike (the first layer reads little more than which token it is), a step can carry an expert
    from twice its share to idle, and the next one back. Such an expert's steps are halved each time its error changes
    sign at a size that matters, and grow by a tenth otherwise (the idea of Rprop, Riedmiller and Braun 1993).

    Args:
        gain_LE: factor on each expert's step in [0.1, 1], signed like its last error; 0 before the first.
        error_LE: from :func:`balance_error`.

    Returns:
        New gains, dtype of `gain_LE`; unchanged in a layer without a count.
    """
    # No `where` with a number in it: on a GPU each costs a launch of its own.
    size_LE = torch.nn.functional.threshold(gain_LE.abs(), _SMALLEST / 2, 1.0)  # 0, before the first error, reads as 1
    side_LE = gain_LE.sign() * error_LE  # below zero where the error has turned
    grown_LE = torch.where(side_LE < 0, size_LE, size_LE * _GROW)
    size_LE = torch.where(side_LE < -_SWING, size_LE * _SHRINK, grown_LE).clamp_(_SMALLEST, 1.0)
    some_LE = error_LE != 0
    signed_LE = size_LE.copysign_(torch.where(some_LE, error_LE, gain_LE))
    return torch.where(some_LE.any(-1, keepdim=True), signed_LE, gain_LE)


def balance_step(error_LE: Tensor, rule: str = "quadratic", gain_LE: Tensor | None = None) -> Tensor:
    """One step of loss-free balancing, in units of the rate, before centring.

    Args:
        error_LE: e, from :func:`balance_error`.
        rule: ``"quadratic"``: gain * e |e|; ``"proportional"``: e; ``"sign"``: sign(e).
        gain_LE: of the quadratic rule, from :func:`next_gain`; None = 1.

    Returns:
        float64 in [-1, 1], shape of `error_LE`; 0 for a layer without a count.

    Source: docs/concepts.md, "beta, the slow routing bias"; the sign rule is arXiv 2408.15664. The quadratic rule is
    ours: the step of the proportional one at an error of 1, smaller steps below.
    """
    if rule == "sign":
        return error_LE.sign()
    if rule == "proportional":
        return error_LE
    if rule != "quadratic":
        raise ConfigError(f"rule must be 'quadratic', 'proportional' or 'sign', got {rule!r}")
    gain: Tensor | float = 1.0 if gain_LE is None else gain_LE.double().abs()
    return gain * error_LE * error_LE.abs()


# Shares that the balance law leaves alone: a zone around the fair share, and a wider one in the first layer.
#
# All bounds are in units of the fair share 1/E. Shape suffixes: L layers, E experts.

FirstLayer = Literal["same", "floor", "off", "auto"]
NO_EDGE = 1e9  # no share is this many times its fair one


def zone_bounds(
    num_experts: Sequence[int],
    top_k: Sequence[int] | None,
    dead_zone: tuple[float, float | None] | None,
    first_layer: FirstLayer,
    first_floor: float,
) -> tuple[Tensor, Tensor]:
    """Lower and upper edge of every layer's zone.

    With k experts a token no share exceeds 1/k, which is E/k times the fair one. An upper edge near that would never
    act, so it is brought down to the middle between the fair share and that ceiling, ``(1 + E/k) / 2``, where the
    setting lies above it (E = 8, k = 4: 1.5 instead of 2).

    Args:
        num_experts: E of each layer.
        top_k: k of each layer; None = not known, the upper edge is taken as it is.
        dead_zone: (low, high); (low, None) = no upper edge; None = the fair share itself, so that every other share is
            pushed.
        first_layer: ``"same"``, ``"floor"`` (in the first of several layers only experts below `first_floor` are
            pushed up, none is pushed down), ``"off"`` (no force there) or ``"auto"`` (``"floor"``, but ``"same"`` at
            k = 1).
        first_floor: lower edge of the first layer with ``"floor"``.

    Returns:
        Two float64 tensors ``(L, 1)`` on the host.
    """
    low, high = dead_zone or (1.0, 1.0)
    lows, highs = [low] * len(num_experts), [NO_EDGE if high is None else high] * len(num_experts)
    if high is not None and top_k is not None:
        highs = [min(high, 0.5 * (1.0 + num / k)) for num, k in zip(num_experts, top_k, strict=True)]
    if first_layer == "auto":
        first_layer = "same" if top_k is not None and top_k[0] == 1 else "floor"
    if first_layer != "same" and len(num_experts) > 1:
        lows[0], highs[0] = (first_floor if first_layer == "floor" else 0.0), NO_EDGE
    low_L1, high_L1 = (torch.tensor(edges, dtype=torch.float64)[:, None] for edges in (lows, highs))
    return low_L1, high_L1


def zone_error(count_LE: Tensor, num_experts_L1: Tensor | int, low_L1: Tensor, high_L1: Tensor) -> Tensor:
    """How far each expert's share is outside its zone, in units of the fair share, within [-1, 1].

    Args:
        count_LE: assignments of the step, shape ``(..., E)``.
        num_experts_L1: E of each layer, broadcastable to ``(..., 1)``.
        low_L1: lower edges, from :func:`zone_bounds`.
        high_L1: upper edges.

    Returns:
        float64, shape of `count_LE`: low - share below the zone, high - share above it, exactly 0 inside and in a layer
        without a count.
    """
    count_LE = count_LE.double()
    relative_LE = count_LE / (count_LE.sum(-1, keepdim=True) / num_experts_L1)
    # 0 / 0, of a layer without a count, stays NaN up to here.
    return torch.clamp(relative_LE, low_L1, high_L1).sub_(relative_LE).clamp_(-1.0, 1.0).nan_to_num_(0.0)
