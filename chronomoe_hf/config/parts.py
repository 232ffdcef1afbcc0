"""Settings of what acts: beta, veto, controller, lens."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Literal

from chronomoe_hf.config.base import ConfigBase, between, positive, require

BalanceRule = Literal["quadratic", "proportional", "sign"]
FirstLayer = Literal["same", "floor", "off", "auto"]
BasisName = Literal["scaled", "least_squares", "router"]
ReaderName = Literal["ridge", "mean"]
AUTO_READ, AUTO_REPLAYED = 256, 64  # tokens, see CoherenceConfig.max_tokens


@dataclass(frozen=True, kw_only=True)
class BetaConfig(ConfigBase):
    """The slow routing bias (docs/concepts.md, "beta, the slow routing bias").

    Biases are in units of one logit standard deviation.

    Args:
        law: ``"none"`` (never acts), ``"coherence"`` (every interval) or ``"balance"`` (every step).
        eta: coherence law, gain per update.
        tau: coherence law, ``"layer_mean"`` or an absolute coherence in [-1, 1].
        k_max: coherence law, cap on \\|beta_coeff\\|.
        centred: coherence law, zero-centre beta over the layer before the cap; False only clamps, as the original.
        stale_after: optimizer steps without a token after which an expert's beta rests.
        rule: balance law: ``"quadratic"``, ``"proportional"`` or ``"sign"`` (the published loss-free rule), see
            :func:`chronomoe_hf.router.laws.balance_step`.
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
    """The bridge veto (docs/concepts.md, "Bridge veto").

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
    """When the controller takes its own action back (docs/concepts.md, "The lens").

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
    """The controller (docs/concepts.md, "Pressure, heat, forgetting").

    Args:
        enabled: evaluate debt, pressure, heat at every interval.
        pressure_decay: pressure <- decay * pressure + (1 - decay) * debt.
        forget_base, forget_gain: forgetting = base + gain * pressure.
        min_pressure: below it the controller abstains and nothing is forgotten.
        reference: ``"level"`` (debt below the floors, as the original) or ``"baseline"`` (only where the run is below
            them *and* below its own baseline, and none before that is known).
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
    reference: Literal["level", "baseline"] = "level"
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
    """The low-rank lens on the router input (docs/concepts.md, "The lens").

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


# Settings of what is watched and written: coherence, alerts, telemetry, checkpoints.


@dataclass(frozen=True, kw_only=True)
class CoherenceConfig(ConfigBase):
    """How expert outputs are read (docs/concepts.md, "Coherence").

    Args:
        enabled: read expert outputs at all; without them phi and contributions are reported as null.
        max_tokens: tokens of one micro-batch and layer whose expert outputs are read, spread evenly over the
            real tokens; every record says how many rows were used. ``None`` reads all of them (exact). ``"auto"``:
            256 where rows are read as the experts compute them, 64 where the tokens must go through the experts once
            more (``eager`` experts, Transformers < 5.20, families whose experts are called in a way of their own). A
            number is read as it is written, in either way.
        reference: ``"leave_one_out"`` (mixture without the expert's own part; falls back to ``"mixture"``
            where k = 1) or ``"mixture"``.
        every: read expert outputs in every n-th micro-batch only; what is read counts n-fold, so that sums stay
            estimates of all. The fastest clock has a half-life of 7 steps: 4 changes little. Evaluation is read
            in full, and so is every forward of a compiled graph.
        roles: also keep the mean direction of every expert's outputs, and look for experts that are near-duplicates or
            serve two kinds of tokens (docs/roles.md). Costs device memory of 16 L E D + 16 L
            E^2 bytes, and as much in every checkpoint. Compiled graphs are not read for it.
    """

    enabled: bool = True
    max_tokens: int | Literal["auto"] | None = "auto"
    reference: Literal["leave_one_out", "mixture"] = "leave_one_out"
    every: int = 1
    roles: bool = False

    def _check(self) -> None:
        positive("coherence.every", self.every)
        require(self.enabled or not self.roles, "coherence.roles reads expert outputs, but coherence.enabled is False")
        if isinstance(self.max_tokens, int):
            positive("coherence.max_tokens", self.max_tokens)

    def tokens_read(self, replayed: bool) -> int | None:
        """Tokens of one micro-batch and layer that are read; None = all.

        Args:
            replayed: they go through the experts once more for it, which costs compute; reading rows does not.
        """
        if self.max_tokens == "auto":
            return AUTO_REPLAYED if replayed else AUTO_READ
        return self.max_tokens


@dataclass(frozen=True, kw_only=True)
class AlertConfig(ConfigBase):
    """Alert thresholds (docs/alerts.md).

    Args:
        neff_floor: PRE_COLLAPSE below this fraction of E; topology debt starts there too.
        top2_pre: PRE_COLLAPSE above this top-2 share relative to its ceiling min(1, 2/k); debt starts there too.
        top2_confirmed: COLLAPSE_CONFIRMED above this relative top-2 share, with a dead expert.
        drift_fraction: DRIFT below this fraction of the run's own baseline n_effective.
        pre_after, confirmed_after, drift_after: consecutive snapshots before the alert is raised.
        baseline_windows: at least so many windows make the baseline.
        baseline_tokens: windows are added to the baseline until every expert could have had so many assignments.
        min_window_tokens: assignments per expert (on average) below which a window gives no alert.
    """

    neff_floor: float = 0.6
    top2_pre: float = 0.75
    top2_confirmed: float = 0.85
    drift_fraction: float = 0.8
    pre_after: int = 3
    confirmed_after: int = 5
    drift_after: int = 3
    baseline_windows: int = 1
    baseline_tokens: int = 50
    min_window_tokens: int = 8

    def _check(self) -> None:
        for name in ("neff_floor", "top2_pre", "top2_confirmed", "drift_fraction"):
            between(f"alerts.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("pre_after", "confirmed_after", "drift_after", "baseline_windows"):
            positive(f"alerts.{name}", getattr(self, name))
        for name in ("min_window_tokens", "baseline_tokens"):
            between(f"alerts.{name}", getattr(self, name), 0, math.inf)


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig(ConfigBase):
    """What is written where (docs/report.md).

    Args:
        jsonl: write JSONL records below ``<output_dir>/chronomoe``.
        output_dir: ``None`` = the Trainer's output_dir (nothing is written without a Trainer). A path becomes a
            string.
        events_every: write the routing events (the numbers of every expert, most of what a run writes) of every n-th
            window only; snapshots, decisions and alerts are of every window. A plan is then made from the windows that
            were written.
        scalars: add ``moe/...`` scalars to the Trainer's logs.
        per_layer_scalars: also one set of scalars per layer.
        evaluation: record evaluation apart from training (``eval_moe/...``).
        baseline: what the run is compared with: ``"windows"`` (its first windows, until every expert could have had
            ``alerts.baseline_tokens`` assignments), ``"forward"`` (a few training batches, read forward only before the
            first step), or the directory of a profile of this model on this data.
        max_mb: megabytes of records in a directory; from half of it on windows are recorded more and more rarely.
        on_error: ``"warn"`` keeps training when our own code fails, ``"raise"`` stops.
    """

    jsonl: bool = True
    output_dir: str | os.PathLike[str] | None = None
    events_every: int = 1
    scalars: bool = True
    per_layer_scalars: bool = False
    evaluation: bool = True
    baseline: str | os.PathLike[str] = "windows"
    max_mb: int | None = 2000
    on_error: Literal["warn", "raise"] = "warn"

    def _check(self) -> None:
        positive("telemetry.events_every", self.events_every)
        if self.max_mb is not None:
            positive("telemetry.max_mb", self.max_mb)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(ConfigBase):
    """Saving and resuming (docs/checkpoints.md).

    Args:
        save: write the state (a folder ``chronomoe``) into every checkpoint.
        on_missing: ``"auto"`` (warn and start fresh, but raise if the run had acted), ``"fresh"`` or ``"raise"``.
        repair: ``"repair"`` reloads MoE weights that Trainer dropped, ``"raise"`` stops instead, ``"off"`` only warns.
        allow_partial: load matching layers of a state whose layer table differs.
        other_weights: a state of other weights than the model's (another model, or weights that were trained on or
            folded since) is refused (``"raise"``), or loaded with a warning (``"warn"``). A Trainer's resume repairs
            the weights instead.
        strict_save: raise on every rank when state cannot be written.
    """

    save: bool = True
    on_missing: Literal["auto", "fresh", "raise"] = "auto"
    repair: Literal["repair", "raise", "off"] = "repair"
    allow_partial: bool = False
    other_weights: Literal["raise", "warn"] = "raise"
    strict_save: bool = False
