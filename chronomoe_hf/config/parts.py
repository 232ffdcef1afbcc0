"""Settings of what acts: beta, veto, controller, lens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from chronomoe_hf.config.base import ConfigBase, between, positive, require

BalanceRule = Literal["quadratic", "proportional", "sign"]
FirstLayer = Literal["same", "floor", "off", "auto"]
BasisName = Literal["scaled", "least_squares", "router"]
ReaderName = Literal["ridge", "mean"]


@dataclass(frozen=True, kw_only=True)
class BetaConfig(ConfigBase):
    """The slow routing bias (SPEC section 4). Biases are in units of one logit standard deviation.

    Args:
        law: ``"none"`` (never acts), ``"coherence"`` (every interval) or ``"balance"`` (every step).
        eta: coherence law, gain per update.
        tau: coherence law, ``"layer_mean"`` or an absolute coherence in [-1, 1].
        k_max: coherence law, cap on \\|beta_coeff\\|.
        centred: coherence law, zero-centre beta over the layer before the cap; False only clamps, as the original.
        stale_after: optimizer steps without a token after which an expert's beta rests.
        rule: balance law: ``"quadratic"``, ``"proportional"`` or ``"sign"`` (the published loss-free rule), see
            :func:`chronomoe_hf.router.beta_laws.balance_step`.
        rate: balance law, largest bias per step. The quadratic rule moves by the square of the relative error times
            this, so it is gentle near balance at a rate at which the sign rule would swing.
        balance_cap: balance law, cap on \\|beta_coeff\\|.
        dead_zone: balance law, ``(low, high)`` in units of the fair share 1/E: no force while a share lies between;
            outside, the error is measured from the edge. ``None`` = no zone. With k experts a token no share exceeds
            E/k fair ones, so the upper edge is at most ``(1 + E/k) / 2``; ``(0.3, None)`` has none, a floor alone.
        first_layer: balance law, the first of several MoE layers: ``"same"`` as the others; ``"floor"``, only experts
            below `first_floor` are pushed up, and none is pushed down; ``"off"``, no force; ``"auto"``, ``"floor"``
            with several experts a token and ``"same"`` with one. The first layer reads little more than which token it
            is, and evening it out costs most (``benchmarks/results/balance.md``).
        first_floor: in units of the fair share, for ``first_layer="floor"``.
        scope: ``"routing"`` (selection and weights from biased logits) or ``"selection"`` (weights from clean);
            ``None`` = ``"selection"`` for the balance law, ``"routing"`` for the coherence law.
        native: balance law, update the model's own correction bias where it has one.
        native_rate: balance law on a native bias, in that tensor's own score units per step; ``None`` = the step that
            `rate` means in logits, through the slope of the family's score (scale-free).
    """

    law: Literal["none", "coherence", "balance"] = "coherence"
    eta: float = 0.01
    tau: float | Literal["layer_mean"] = "layer_mean"
    k_max: float = 0.3
    centred: bool = True
    stale_after: int = 1000
    rule: BalanceRule = "quadratic"
    rate: float = 0.3
    balance_cap: float = 4.0
    dead_zone: tuple[float, float | None] | None = None
    first_layer: FirstLayer = "same"
    first_floor: float = 0.3
    scope: Literal["routing", "selection"] | None = None
    native: bool = True
    native_rate: float | None = None

    @property
    def scope_in_force(self) -> Literal["routing", "selection"]:
        """`scope`, or what it means where it is None."""
        return self.scope or ("selection" if self.law == "balance" else "routing")

    def _check(self) -> None:
        for name in ("eta", "k_max", "rate", "balance_cap", "stale_after"):
            positive(f"beta.{name}", getattr(self, name))
        if self.native_rate is not None:
            positive("beta.native_rate", self.native_rate)
        between("beta.first_floor", self.first_floor, 0.0, 1.0)
        if self.dead_zone is not None:
            low, high = self.dead_zone
            require(
                0.0 <= low <= 1.0 and (high is None or high >= 1.0),
                "beta.dead_zone must be (low, high) with 0 <= low <= 1 <= high, in fair shares, (low, None) for a "
                f"floor alone, or None for no zone, got {self.dead_zone}",
            )
        if isinstance(self.tau, float):
            between("beta.tau", self.tau, -1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class VetoConfig(ConfigBase):
    """The bridge veto (SPEC section 4).

    Args:
        enabled: without it relevance is always 1.
        signal: ``"js"`` (nats) or ``"overlap"``.
        theta: relevance is 1 below theta and 0 from 3 theta on; ``None`` = 0.2 for js, 0.1 for overlap.
    """

    enabled: bool = True
    signal: Literal["js", "overlap"] = "js"
    theta: float | None = None

    def _check(self) -> None:
        if self.theta is not None:
            positive("veto.theta", self.theta)

    @property
    def threshold(self) -> float:
        """The theta in force."""
        if self.theta is not None:
            return self.theta
        return 0.2 if self.signal == "js" else 0.1


@dataclass(frozen=True, kw_only=True)
class HarmGuardConfig(ConfigBase):
    """When the controller takes its own action back (SPEC section 5).

    Args:
        threshold: rise of the relative top-2 share between two evaluations that counts as harm.
        min_scale: lens scale (logit standard deviations) above which a rise is attributed to the lens.
        factor: the back-off is multiplied by this at each harm, down to `floor`.
        floor: smallest back-off.
        recovery: fraction of the gap to 1 by which the back-off recovers at an evaluation without harm.
        abstain: the lens stays closed while the back-off is below this.
        restart: after a verdict, compare anew and let the back-off rest for one evaluation: that window reflects
            the smaller scale, so it is not judged.
        hold: evaluations without recovery once harm has led to abstention; 0 = the original, which opens the
            lens again at every other evaluation.
    """

    threshold: float = 0.15
    min_scale: float = 0.01
    factor: float = 0.5
    floor: float = 0.1
    recovery: float = 0.2
    abstain: float = 0.15
    restart: bool = True
    hold: int = 6

    def _check(self) -> None:
        for name in ("factor", "floor", "recovery", "abstain"):
            between(f"control.harm.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("threshold", "min_scale", "hold"):
            between(f"control.harm.{name}", getattr(self, name), 0, math.inf)


@dataclass(frozen=True, kw_only=True)
class ControlConfig(ConfigBase):
    """The controller (SPEC section 5).

    Args:
        enabled: evaluate debt, pressure, heat at every interval.
        pressure_decay: pressure <- decay * pressure + (1 - decay) * debt.
        forget_base, forget_gain: forgetting = base + gain * pressure.
        min_pressure: below it the controller abstains and nothing is forgotten.
        gate: ``"integral"`` (leaky integral of the Neff shortfall) or ``"pressure"`` (the original gate).
        integral_target: fraction of E below which the integral gate accumulates.
        integral_min_share: fraction of the fair share below which the idlest expert counts as a shortfall too; it
            sees a dead expert in a wide layer whose Neff is well above the target. 0 = Neff alone.
        integral_gain, integral_leak, integral_step: integral <- leak * integral + min(gain * shortfall, step), with
            shortfall = the larger of target - Neff/E and min_share - E * smallest share, not below 0. The step bounds
            what one evaluation may add.
        c1, c2: pressure and heat gains of the lens scale.
        pressure_cap: pressure counts at most this much towards the scale.
        scale_max: cap on the lens scale (logit standard deviations).
        warmup_steps, warmup_scale_max: the cap before that step.
        lens_spread_max: a layer whose lens would move tokens more unevenly than this (standard deviation over mean of
            what its reader reads, on tokens it was not fitted on) abstains with ``lens_unfit``. At 1, with
            normally distributed readings, one token in six would move the wrong way.
        harm: the guard that backs off from a lens that makes things worse.
        quota_top2: relative top-2 share above which a quota is logged.

    The original law is ``ChronoConfig.original()``; why the defaults differ, in numbers:
    ``benchmarks/results/balance_changed.md``.
    """

    enabled: bool = True
    pressure_decay: float = 0.8
    forget_base: float = 0.02
    forget_gain: float = 0.10
    min_pressure: float = 0.01
    gate: Literal["integral", "pressure"] = "integral"
    integral_target: float = 0.7
    integral_min_share: float = 0.05
    integral_gain: float = 1.0
    integral_leak: float = 0.99
    integral_step: float = 0.2
    c1: float = 1.0
    c2: float = 0.0
    pressure_cap: float = 0.5
    scale_max: float = 2.0
    warmup_steps: int = 0
    warmup_scale_max: float = 0.02
    lens_spread_max: float = 0.5
    harm: HarmGuardConfig = field(default_factory=HarmGuardConfig)
    quota_top2: float = 0.90

    def _check(self) -> None:
        for name in (
            "pressure_decay",
            "forget_base",
            "min_pressure",
            "integral_target",
            "integral_min_share",
            "integral_leak",
            "pressure_cap",
            "quota_top2",
        ):
            between(f"control.{name}", getattr(self, name), 0.0, 1.0)
        for name in (
            "forget_gain",
            "c1",
            "c2",
            "integral_gain",
            "integral_step",
            "scale_max",
            "warmup_scale_max",
            "lens_spread_max",
        ):
            between(f"control.{name}", getattr(self, name), 0.0, math.inf)
        between("control.warmup_steps", self.warmup_steps, 0, math.inf)


@dataclass(frozen=True, kw_only=True)
class LensConfig(ConfigBase):
    """The low-rank lens on the router input (SPEC section 5).

    Args:
        enabled: open a lens when the controller asks for it.
        basis: ``"scaled"`` (least squares, each expert moved in units of its own logit spread), ``"least_squares"``
            (all in units of the layer's) or ``"router"`` (the direction of ChronoMoE v2).
        reader: ``"ridge"`` (V by ridge regression, so that all tokens are moved alike) or ``"mean"`` (V along the mean
            router input, the original, which scatters tokens where that mean is short).
        memory: how much of the lens in force goes into the next one, per evaluation. The shares that a basis is
            computed from were measured *under* the lens, so a basis without memory (0, the original) undoes itself as
            soon as it works: it settles half-way, or swings between two states where its scale is large.
        train_router: let the router's weight take gradients through the lens, as a router that is fed x' would (the
            original). The router then learns to cancel the lens, which needs an ever larger scale.
    """

    enabled: bool = True
    basis: BasisName = "scaled"
    reader: ReaderName = "ridge"
    memory: float = 0.9
    train_router: bool = False

    def _check(self) -> None:
        between("lens.memory", self.memory, 0.0, 1.0)
