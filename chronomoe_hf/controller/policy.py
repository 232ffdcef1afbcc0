"""The control law of one MoE layer, as pure functions of Python floats.

One evaluation, once per interval and layer: observed routing -> debt -> pressure -> heat, forgetting, integral -> lens
scale, with a harm guard in the loop. No tensors, no state, no I/O: the same inputs always give the same floats.

Words: E experts of the layer, k experts per token, fair share = 1/E, Neff = exp(entropy of the shares),
t = top-2 share relative to its ceiling min(1, 2/k). With k experts per token no expert can exceed a share of 1/k, so
the plain top-2 share of a fully collapsed top-8 layer is only 0.25; t is 1 there for every k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from chronomoe_hf.config import AlertConfig, ControlConfig
from chronomoe_hf.metrics import balanced_top2, relative_top2

AbstainReason = Literal["no_pressure", "harm_backoff", "insufficient_evidence", "lens_unsupported", "lens_unfit"]

DEFAULT_FLOORS = AlertConfig()
WEIGHT_NEFF, WEIGHT_TOP2, WEIGHT_DEAD = 0.4, 0.4, 0.2


def clip(value: float, low: float = 0.0, high: float = 1.0) -> float:
    """`value` limited to ``[low, high]``."""
    return min(max(value, low), high)


@dataclass(frozen=True)
class Debt:
    """Topology debt and its parts, each in [0, 1] before weighting.

    Attributes:
        n_effective: shortfall of Neff below its floor (0.6 E), as a fraction of the floor.
        top2: excess of t over its floor (0.75), as a fraction of what remains to 1.
        dead: dead experts over E - 1.
    """

    n_effective: float
    top2: float
    dead: float

    @property
    def total(self) -> float:
        """``0.4 n_effective + 0.4 top2 + 0.2 dead``, in [0, 1]."""
        return clip(WEIGHT_NEFF * self.n_effective + WEIGHT_TOP2 * self.top2 + WEIGHT_DEAD * self.dead)


def topology_debt(
    *,
    n_effective: float,
    top2_share: float,
    dead_experts: int,
    n_experts: int,
    top_k: int,
    floors: AlertConfig = DEFAULT_FLOORS,
) -> Debt:
    """How far a layer's routing is from a healthy one. Debt starts where PRE_COLLAPSE does.

    A perfectly balanced layer has t = (2/E) / min(1, 2/k), which reaches 0.75 only where nearly all experts run for
    every token (k > 3E/4, or E = 2 with k = 1). There the top-2 share says little about dominance, so debt is counted
    from the balanced value on instead of from 0.75, and a balanced layer has debt 0.

    Args:
        n_effective: exp(entropy) of the shares, in [1, E].
        top2_share: sum of the two largest shares, in [0, 1].
        dead_experts: experts with share exactly 0.
        n_experts: E, at least 1.
        top_k: k, in [1, E].
        floors: its `neff_floor` and `top2_pre` are where debt starts; by default 0.6 and 0.75.

    Source: ChronoMoE v2 debt (0.4 / 0.4 / 0.2), with the top-2 share made relative to its ceiling.
    """
    floor = floors.neff_floor * n_experts
    start = top2_start(floors.top2_pre, n_experts, top_k)
    relative = relative_top2(top2_share, top_k)
    return Debt(
        n_effective=clip((floor - n_effective) / floor) if floor > 0.0 else 0.0,
        top2=clip((relative - start) / (1.0 - start)) if start < 1.0 else 0.0,
        dead=clip(dead_experts / max(1, n_experts - 1)),
    )


def top2_start(threshold: float, n_experts: int, top_k: int) -> float:
    """`threshold` on t, or the balanced layer's own t where that is higher (see :func:`topology_debt`)."""
    return max(threshold, balanced_top2(n_experts, top_k))


def next_pressure(pressure: float, debt: float, config: ControlConfig) -> float:
    """``decay * pressure + (1 - decay) * debt``, in [0, 1]."""
    return clip(config.pressure_decay * pressure + (1.0 - config.pressure_decay) * debt)


def forgetting_of(pressure: float, config: ControlConfig) -> float:
    """Fraction of beta to forget, ``base + gain * pressure``, in [0, 1]."""
    return clip(config.forget_base + config.forget_gain * pressure)


def beta_multiplier(pressure: float, config: ControlConfig) -> float:
    """What beta is multiplied with: ``1 - forgetting`` from `min_pressure` on, else exactly 1."""
    return 1.0 - forgetting_of(pressure, config) if pressure >= config.min_pressure else 1.0


def next_integral(
    integral: float,
    *,
    n_effective: float,
    n_experts: int,
    config: ControlConfig,
    min_share: float | None = None,
    fit: bool = True,
) -> float:
    """Leaky integral of the shortfall: ``leak * integral + min(gain * shortfall, step)``.

    The shortfall is ``max(0, target - Neff/E, integral_min_share - E * min_share)``: with many experts one of them can
    die while Neff and debt hardly notice (one of 32: Neff/E 0.97, debt 0.006).

    Held within [0, scale_max]: a layer that stays collapsed would otherwise wind it up to
    ``gain * target / (1 - leak)``, 32 times the largest scale, and keep a healed layer under the lens for a long time.
    While the lens is not `fit` to act it is held within one step, so that a lens that becomes fit starts small.
    """
    shortfall = max(0.0, config.integral_target - n_effective / n_experts)
    if min_share is not None:
        shortfall = max(shortfall, config.integral_min_share - n_experts * min_share)
    added = min(config.integral_gain * shortfall, config.integral_step)
    return clip(config.integral_leak * integral + added, 0.0, config.scale_max if fit else config.integral_step)


def drive_of(pressure: float, integral: float, config: ControlConfig) -> float:
    """The signal behind the lens scale, before gains and caps.

    ``gate="pressure"`` (the original): ``min(pressure, pressure_cap)``, which fades as Neff returns to its threshold.
    ``gate="integral"``: the larger of that and the integral. The integral holds the floor where pressure fades;
    pressure still answers what a Neff shortfall does not see (dead experts in an otherwise even layer).
    """
    capped = min(pressure, config.pressure_cap)
    return capped if config.gate == "pressure" else max(capped, integral)


def is_fit(lens_spread: float | None, config: ControlConfig) -> bool:
    """Whether a lens moves tokens evenly enough to act; one that was never measured is taken to."""
    return lens_spread is None or lens_spread <= config.lens_spread_max


def scale_cap(step: int, config: ControlConfig) -> float:
    """Largest lens scale allowed at this optimizer step."""
    return min(config.scale_max, config.warmup_scale_max) if step < config.warmup_steps else config.scale_max


def lens_scale(*, drive: float, heat: float, harm_backoff: float, step: int, config: ControlConfig) -> float:
    """``clip(c1 * drive + c2 * heat, 0, cap) * harm_backoff``, in logit standard deviations."""
    return clip(config.c1 * drive + config.c2 * heat, 0.0, scale_cap(step, config)) * harm_backoff


def is_harm(last_scale: float, top2_rise: float | None, config: ControlConfig) -> bool:
    """Whether the last action counts as harmful: scale above `harm.min_scale`, and t rose by more than the threshold.

    Args:
        last_scale: lens scale in force during the window.
        top2_rise: change of t since the previous evaluation, None on the first one.
        config: thresholds.
    """
    return top2_rise is not None and last_scale > config.harm.min_scale and top2_rise > config.harm.threshold


def next_harm_backoff(backoff: float, hold: int, harmed: bool, config: ControlConfig) -> tuple[float, int]:
    """Back-off and hold after one verdict.

    Harm halves the back-off (down to the floor); without harm it moves a fifth of the way back to 1. The floor and
    that fifth alone end an abstention after a single evaluation, before there is new evidence: a lens that
    always harms then acts in more than half of all evaluations. So harm that leads to abstention also sets a hold of
    `harm.hold` evaluations in which nothing recovers.

    Args:
        backoff: factor in force, in [harm.floor, 1].
        hold: evaluations left without recovery.
        harmed: :func:`is_harm`.
        config: thresholds; with `harm.restart` every verdict holds the back-off for one evaluation.

    Returns:
        The new back-off and hold.
    """
    if harmed:
        backoff = clip(backoff * config.harm.factor, config.harm.floor, 1.0)
        return backoff, config.harm.hold if backoff < config.harm.abstain else int(config.harm.restart)
    if hold > 0:
        return backoff, hold - 1
    return clip(backoff + config.harm.recovery * (1.0 - backoff), config.harm.floor, 1.0), 0


def abstain_reason(
    *,
    drive: float,
    harm_backoff: float,
    sufficient: bool,
    lens_supported: bool,
    config: ControlConfig,
    lens_spread: float | None = None,
) -> AbstainReason | None:
    """Why the lens stays closed, or None to act. The first reason that holds is reported.

    1. ``insufficient_evidence``: too few tokens in the window to judge anything.
    2. ``no_pressure``: the signal that drives the gate is below `min_pressure`. Under ``gate="integral"`` that means
       pressure *and* integral, so a run that never fell below the target and never owed debt (both exactly 0) abstains
       at every evaluation, while a healed layer keeps its fading support until the integral has drained.
    3. ``lens_unsupported``: the layer has no lens, or an IdentityLens.
    4. ``lens_unfit``: the lens would scatter tokens instead of moving them (:func:`is_fit`).
    5. ``harm_backoff``: recent actions were followed by more concentration.
    """
    if not sufficient:
        return "insufficient_evidence"
    if drive < config.min_pressure:
        return "no_pressure"
    if not lens_supported:
        return "lens_unsupported"
    if not is_fit(lens_spread, config):
        return "lens_unfit"
    if harm_backoff < config.harm.abstain:
        return "harm_backoff"
    return None


@dataclass(frozen=True)
class Quota:
    """A recommended cap, logged and never enforced.

    Attributes:
        dominant: the two experts with the largest shares, largest first (ties: lower index).
        share_E: cap on each expert's share, the fair share for the dominant two and 1 for the rest; length E.
    """

    dominant: tuple[int, ...]
    share_E: tuple[float, ...]


def quota_of(
    shares: Sequence[float],
    *,
    top2_share: float,
    dead_experts: int,
    top_k: int,
    config: ControlConfig,
    n_experts: int | None = None,
) -> Quota | None:
    """The emergency quota where t is above `quota_top2` or an expert is dead, else None.

    `n_experts` is the number of experts that a token can be given to, if some were cut; by default all of `shares`.
    """
    n_experts = len(shares) if n_experts is None else n_experts
    if dead_experts == 0 and relative_top2(top2_share, top_k) <= top2_start(config.quota_top2, n_experts, top_k):
        return None
    dominant = tuple(sorted(range(len(shares)), key=lambda expert: (-shares[expert], expert))[:2])
    fair = 1.0 / n_experts
    return Quota(dominant, tuple(fair if expert in dominant else 1.0 for expert in range(len(shares))))
