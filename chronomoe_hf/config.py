"""ChronoConfig and its parts: frozen, keyword-only, strict, and exact through JSON.

Units are given per field. "interval" everywhere means optimizer steps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chronomoe_hf.errors import ConfigError

SCHEMA_VERSION = 1
CONFIG_NAME = "chronomoe_config.json"

BalanceRule = Literal["quadratic", "proportional", "sign"]
BasisName = Literal["scaled", "least_squares", "router"]
ReaderName = Literal["ridge", "mean"]


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


class _Part:
    """Shared behaviour of every config dataclass: typed fields, strict dictionaries."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            fixed = _coerce(f"{type(self).__name__}.{item.name}", value, hints[item.name])
            if fixed is not value:
                object.__setattr__(self, item.name, fixed)
        self._check()

    def _check(self) -> None:
        """Raise ConfigError for values out of range; overridden by each part."""

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready dictionary of every field."""
        out: dict[str, Any] = {}
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            out[item.name] = value.to_dict() if isinstance(value, _Part) else value
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> typing.Self:
        """Build from a dictionary; unknown keys raise ConfigError naming them."""
        _require(isinstance(data, dict), f"{cls.__name__} is built from a dictionary, got {type(data).__name__}")
        hints = typing.get_type_hints(cls)
        known = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(data) - known)
        _require(not unknown, f"{cls.__name__} has no {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        values = dict(data)
        for name, value in data.items():
            hint = hints[name]
            if isinstance(hint, type) and issubclass(hint, _Part) and isinstance(value, dict):
                values[name] = hint.from_dict(value)
        return cls(**values)


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Check `value` against a type hint; an int is accepted (and converted) where a float is meant."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        _require(value in choices, f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        errors = []
        for option in typing.get_args(hint):
            try:
                return _coerce(name, value, option)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError(errors[0])
    if hint is type(None):
        _require(value is None, f"{name} must be None, got {value!r}")
        return value
    if hint is float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        _require(ok, f"{name} must be a finite number, got {value!r}")
        return float(value)
    if hint is int:
        _require(isinstance(value, int) and not isinstance(value, bool), f"{name} must be an integer, got {value!r}")
        return value
    _require(isinstance(value, hint), f"{name} must be {hint.__name__}, got {value!r}")
    return value


def _between(name: str, value: float, low: float, high: float) -> None:
    _require(low <= value <= high, f"{name} must be in [{low}, {high}], got {value}")


def _positive(name: str, value: float) -> None:
    _require(value > 0, f"{name} must be positive, got {value}")


@dataclass(frozen=True, kw_only=True)
class CoherenceConfig(_Part):
    """How expert outputs are read (SPEC section 4).

    Args:
        enabled: read expert outputs at all; without them phi and contributions are reported as null.
        max_tokens: tokens of one micro-batch and layer whose expert outputs are read, spread evenly over the
            real tokens; every record says how many rows were used. ``None`` reads all of them (exact).
        reference: ``"leave_one_out"`` (mixture without the expert's own part; falls back to ``"mixture"``
            where k = 1) or ``"mixture"``.
    """

    enabled: bool = True
    max_tokens: int | None = 256
    reference: Literal["leave_one_out", "mixture"] = "leave_one_out"

    def _check(self) -> None:
        if self.max_tokens is not None:
            _positive("coherence.max_tokens", self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class AlertConfig(_Part):
    """Alert thresholds (SPEC section 3).

    Args:
        neff_floor: PRE_COLLAPSE below this fraction of E (fraction).
        top2_pre: PRE_COLLAPSE above this top-2 share relative to its ceiling min(1, 2/k).
        top2_confirmed: COLLAPSE_CONFIRMED above this relative top-2 share, with a dead expert.
        drift_fraction: DRIFT below this fraction of the run's own baseline n_effective.
        pre_after, confirmed_after, drift_after: consecutive snapshots before the alert is raised.
        baseline_windows: full windows averaged into the baseline.
        min_window_tokens: assignments per expert (on average) below which a window gives no alert.
    """

    neff_floor: float = 0.6
    top2_pre: float = 0.75
    top2_confirmed: float = 0.85
    drift_fraction: float = 0.8
    pre_after: int = 3
    confirmed_after: int = 5
    drift_after: int = 3
    baseline_windows: int = 3
    min_window_tokens: int = 8

    def _check(self) -> None:
        for name in ("neff_floor", "top2_pre", "top2_confirmed", "drift_fraction"):
            _between(f"alerts.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("pre_after", "confirmed_after", "drift_after", "baseline_windows"):
            _positive(f"alerts.{name}", getattr(self, name))
        _between("alerts.min_window_tokens", self.min_window_tokens, 0, math.inf)


@dataclass(frozen=True, kw_only=True)
class BetaConfig(_Part):
    """The slow routing bias (SPEC section 4). Biases are in units of one logit standard deviation.

    Args:
        law: ``"none"`` (never acts), ``"coherence"`` (every interval) or ``"balance"`` (every step).
        eta: coherence law, gain per update.
        tau: coherence law, ``"layer_mean"`` or an absolute coherence in [-1, 1].
        k_max: coherence law, cap on \\|beta_coeff\\|.
        stale_after: optimizer steps without a token after which an expert's beta rests.
        rule: balance law: ``"quadratic"``, ``"proportional"`` or ``"sign"`` (the published loss-free rule), see
            :func:`chronomoe_hf.laws.balance_step`.
        rate: balance law, largest bias per step. The quadratic rule moves by the square of the relative error times
            this, so it is gentle near balance at a rate at which the sign rule would swing.
        balance_cap: balance law, cap on \\|beta_coeff\\|.
        scope: ``"routing"`` (selection and weights from biased logits) or ``"selection"`` (weights from clean).
            The balance law always uses ``"selection"``.
        native: balance law, update the model's own correction bias where it has one.
        native_rate: balance law on a native bias, in that tensor's own score units per step; ``None`` = the step that
            `rate` means in logits, through the slope of the family's score (scale-free).
    """

    law: Literal["none", "coherence", "balance"] = "coherence"
    eta: float = 0.01
    tau: float | Literal["layer_mean"] = "layer_mean"
    k_max: float = 0.3
    stale_after: int = 1000
    rule: BalanceRule = "quadratic"
    rate: float = 0.3
    balance_cap: float = 4.0
    scope: Literal["routing", "selection"] = "routing"
    native: bool = True
    native_rate: float | None = None

    def _check(self) -> None:
        for name in ("eta", "k_max", "rate", "balance_cap", "stale_after"):
            _positive(f"beta.{name}", getattr(self, name))
        if self.native_rate is not None:
            _positive("beta.native_rate", self.native_rate)
        if isinstance(self.tau, float):
            _between("beta.tau", self.tau, -1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class VetoConfig(_Part):
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
            _positive("veto.theta", self.theta)

    @property
    def threshold(self) -> float:
        """The theta in force."""
        if self.theta is not None:
            return self.theta
        return 0.2 if self.signal == "js" else 0.1


@dataclass(frozen=True, kw_only=True)
class ControlConfig(_Part):
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
            what one evaluation may add: several times that and experts swing between idle and busy.
        c1, c2: pressure and heat gains of the lens scale.
        pressure_cap: pressure counts at most this much towards the scale.
        scale_max: cap on the lens scale (logit standard deviations).
        warmup_steps, warmup_scale_max: the cap before that step.
        lens_spread_max: a layer whose lens would move tokens more unevenly than this (standard deviation over mean of
            what its reader reads, on tokens it was not fitted on) abstains with ``lens_unfit``. At 1, with
            normally distributed readings, one token in six would move the wrong way.
        harm_threshold: rise of top-2 share between two evaluations that counts as harm.
        harm_min_scale: scale above which a rise is blamed on the lens.
        harm_factor, harm_floor, harm_recovery: multiplicative back-off, its floor, recovery of the gap to 1.
        harm_abstain: abstain below this back-off.
        harm_restart: after a verdict, compare anew and let the back-off rest for one evaluation: that window shows
            what the back-off did, not what the lens did.
        harm_hold: evaluations without recovery once harm has led to abstention; 0 = the original, which probes the
            lens again at every other evaluation.
        quota_top2: relative top-2 share above which a quota is logged.

    The original law: ``ControlConfig(gate="pressure", scale_max=0.5, warmup_steps=100, harm_threshold=0.02,
    harm_restart=False, harm_hold=0, lens_spread_max=1e6)`` with ``LensConfig(basis="least_squares", reader="mean",
    memory=0.0)``. Why the defaults differ, in numbers: ``benchmarks/results/balance.md``.
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
    harm_threshold: float = 0.15
    harm_min_scale: float = 0.01
    harm_factor: float = 0.5
    harm_floor: float = 0.1
    harm_recovery: float = 0.2
    harm_abstain: float = 0.15
    harm_restart: bool = True
    harm_hold: int = 6
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
            "harm_factor",
            "harm_floor",
            "harm_recovery",
            "harm_abstain",
            "quota_top2",
        ):
            _between(f"control.{name}", getattr(self, name), 0.0, 1.0)
        for name in (
            "forget_gain",
            "c1",
            "c2",
            "integral_gain",
            "integral_step",
            "scale_max",
            "warmup_scale_max",
            "lens_spread_max",
            "harm_threshold",
        ):
            _between(f"control.{name}", getattr(self, name), 0.0, math.inf)
        for name in ("warmup_steps", "harm_hold"):
            _between(f"control.{name}", getattr(self, name), 0, math.inf)


@dataclass(frozen=True, kw_only=True)
class LensConfig(_Part):
    """The low-rank lens on the router input (SPEC section 5).

    Args:
        enabled: open a lens when the controller asks for it.
        basis: ``"scaled"`` (least squares, each expert moved in units of its own logit spread), ``"least_squares"``
            (all in units of the layer's) or ``"router"`` (the original).
        reader: ``"ridge"`` (V by ridge regression, so that all tokens are moved alike) or ``"mean"`` (V along the mean
            router input, the original, which scatters tokens where that mean is short).
        memory: how much of the lens in force goes into the next one, per evaluation. The shares that a basis is
            computed from were measured *under* the lens, so a basis without memory (0, the original) undoes itself as
            soon as it works: it settles half-way, or swings between two states where its scale is large.
    """

    enabled: bool = True
    basis: BasisName = "scaled"
    reader: ReaderName = "ridge"
    memory: float = 0.9

    def _check(self) -> None:
        _between("lens.memory", self.memory, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class LifecycleConfig(_Part):
    """The dry-run lifecycle (SPEC section 6).

    Args:
        enabled: look for prune candidates at every interval. Weights are never touched.
        prune_threshold: Phi_slow, ``"auto"`` = layer mean - 2 standard deviations.
        starvation_threshold: token-weighted mean Phi_slow, ``"auto"`` = below 0.8 of its own baseline.
        min_tokens: fewer tokens than this after `after_step` is low observability.
        coherence_tokens: tokens seen before low coherence can be judged.
        after_step: optimizer step before which low observability is not judged.
        confirmations: consecutive evaluations before a candidate is confirmed.
    """

    enabled: bool = True
    prune_threshold: float | Literal["auto"] = "auto"
    starvation_threshold: float | Literal["auto"] = "auto"
    min_tokens: int = 100
    coherence_tokens: int = 1000
    after_step: int = 1000
    confirmations: int = 3

    def _check(self) -> None:
        for name in ("prune_threshold", "starvation_threshold"):
            value = getattr(self, name)
            if isinstance(value, float):
                _between(f"lifecycle.{name}", value, -1.0, 1.0)
        for name in ("min_tokens", "coherence_tokens", "after_step"):
            _between(f"lifecycle.{name}", getattr(self, name), 0, math.inf)
        _positive("lifecycle.confirmations", self.confirmations)


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig(_Part):
    """What is written where (SPEC sections 3 and 7).

    Args:
        jsonl: write JSONL records below ``<output_dir>/chronomoe``.
        output_dir: ``None`` = the Trainer's output_dir (nothing is written without a Trainer).
        scalars: add ``moe/...`` scalars to the Trainer's logs.
        per_layer_scalars: also one set of scalars per layer.
        evaluation: record evaluation apart from training (``eval_moe/...``).
        on_error: ``"warn"`` keeps training when our own code fails, ``"raise"`` stops.
    """

    jsonl: bool = True
    output_dir: str | None = None
    scalars: bool = True
    per_layer_scalars: bool = False
    evaluation: bool = True
    on_error: Literal["warn", "raise"] = "warn"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(_Part):
    """Saving and resuming (SPEC section 7).

    Args:
        save: write chronomoe.safetensors and chronomoe.json beside every checkpoint.
        on_missing: ``"auto"`` (warn and start fresh, but raise if the run had acted), ``"fresh"`` or ``"raise"``.
        repair: ``"repair"`` reloads MoE weights that Trainer dropped, ``"raise"`` stops instead, ``"off"`` only warns.
        allow_partial: load matching layers of a state whose layer table differs.
        strict_save: raise on every rank when state cannot be written.
    """

    save: bool = True
    on_missing: Literal["auto", "fresh", "raise"] = "auto"
    repair: Literal["repair", "raise", "off"] = "repair"
    allow_partial: bool = False
    strict_save: bool = False


@dataclass(frozen=True, kw_only=True)
class ChronoConfig(_Part):
    """All settings of one wrapped model.

    Args:
        interval: optimizer steps in a telemetry window; control acts when a window closes.
        schema_version: of this config's JSON form.

    Presets: :meth:`observe`, :meth:`protect` (the default) and :meth:`balance`.

    Raises:
        ConfigError: unknown keys, wrong types, values out of range.
    """

    interval: int = 100
    coherence: CoherenceConfig = field(default_factory=CoherenceConfig)
    alerts: AlertConfig = field(default_factory=AlertConfig)
    beta: BetaConfig = field(default_factory=BetaConfig)
    veto: VetoConfig = field(default_factory=VetoConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    lens: LensConfig = field(default_factory=LensConfig)
    lifecycle: LifecycleConfig = field(default_factory=LifecycleConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    schema_version: int = SCHEMA_VERSION

    def _check(self) -> None:
        _positive("interval", self.interval)
        _require(
            self.schema_version == SCHEMA_VERSION,
            f"schema_version {self.schema_version} is not readable by this version (it reads {SCHEMA_VERSION}); "
            "install the chronomoe_hf that wrote it",
        )

    @classmethod
    def observe(cls, **fields: Any) -> typing.Self:
        """Telemetry and dry-run lifecycle only: outputs are bit-identical to the unwrapped model's."""
        return cls(
            **{
                "beta": BetaConfig(law="none"),
                "veto": VetoConfig(enabled=False),
                "control": ControlConfig(enabled=False),
                "lens": LensConfig(enabled=False),
                **fields,
            }
        )

    @classmethod
    def protect(cls, **fields: Any) -> typing.Self:
        """Coherence beta, bridge veto, pressure-gated lens, dry-run lifecycle (the default)."""
        return cls(**fields)

    @classmethod
    def balance(cls, **fields: Any) -> typing.Self:
        """Loss-free balancing every step; selection only; no lens."""
        return cls(
            **{
                "beta": BetaConfig(law="balance", scope="selection"),
                "veto": VetoConfig(enabled=False),
                "lens": LensConfig(enabled=False),
                **fields,
            }
        )

    @classmethod
    def preset(cls, name: str, **fields: Any) -> typing.Self:
        """The preset of that name: ``observe``, ``protect`` or ``balance``."""
        known = {"observe": cls.observe, "protect": cls.protect, "balance": cls.balance}
        _require(name in known, f"no preset {name!r}; known: {', '.join(known)}")
        return known[name](**fields)

    def to_json(self) -> str:
        """Strict JSON (no NaN), keys sorted, newline at the end."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> typing.Self:
        """Inverse of :meth:`to_json`; raises ConfigError on anything else."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not a chronomoe config: {error}") from None
        return cls.from_dict(data)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write ``chronomoe_config.json`` into `directory` (created if missing) and return its path."""
        path = Path(directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> typing.Self:
        """Read ``chronomoe_config.json`` from `directory` (or the file itself)."""
        path = Path(directory)
        path = path / CONFIG_NAME if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(f"no {CONFIG_NAME} at {path}; save one with config.save_pretrained(directory)")
        return cls.from_json(path.read_text(encoding="utf-8"))
