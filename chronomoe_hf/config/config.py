"""ChronoConfig: all settings of one wrapped model, its presets, and its JSON form."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from chronomoe_hf.config import files
from chronomoe_hf.config.base import ConfigBase, positive, require, with_parts
from chronomoe_hf.config.files import CONFIG_NAME, CONFIG_SCHEMA
from chronomoe_hf.config.lifecycle import LifecycleConfig
from chronomoe_hf.config.parts import (
    AlertConfig,
    BetaConfig,
    CheckpointConfig,
    CoherenceConfig,
    ControlConfig,
    LensConfig,
    TelemetryConfig,
    VetoConfig,
)
from chronomoe_hf.config.replay import ReplayConfig
from chronomoe_hf.errors import ConfigError, did_you_mean, shown

# What each preset sets, and which of it may not be overridden.
#
# Paths are ``part.field``. A preset is a contract: its *fixed* settings are what its name promises, its *other*
# settings are only where it starts from.

PresetName = Literal["observe", "protect", "balance", "revive", "original"]


@dataclass(frozen=True)
class Preset:
    """Settings of one preset that differ from the defaults, or that it fixes.

    Attributes:
        promise: what the fixed settings stand for, for error messages.
        fixed: path -> value; another value is refused.
        other: path -> value; may be overridden.
    """

    promise: str
    fixed: Mapping[str, Any]
    other: Mapping[str, Any]


PRESETS: dict[PresetName, Preset] = {
    "observe": Preset(
        promise="never steers",
        fixed={"beta.law": "none", "control.enabled": False, "lens.enabled": False, "lifecycle.revive.at": "off"},
        other={"veto.enabled": False},
    ),
    "protect": Preset(
        promise="moves beta by coherence and never writes a weight",
        fixed={"beta.law": "coherence", "lifecycle.revive.at": "off"},
        other={},
    ),
    "balance": Preset(
        promise="balances the load by choosing experts only, without a lens and without writing a weight",
        fixed={"beta.law": "balance", "beta.scope": "selection", "lens.enabled": False, "lifecycle.revive.at": "off"},
        other={
            "veto.enabled": False,
            "beta.dead_zone": (0.7, 2.0),
            "beta.rate": 0.05,
            "beta.first_layer": "floor",
            "beta.first_floor": 0.3,
        },
    ),
    "revive": Preset(
        promise="rewrites idle experts when training begins, and keeps every expert at work afterwards",
        fixed={"beta.law": "balance", "lens.enabled": False, "lifecycle.revive.at": "start"},
        other={
            "veto.enabled": False,
            "beta.dead_zone": (0.67, 1.5),
            "beta.rate": 0.05,
            "beta.first_layer": "auto",
            "beta.first_floor": 0.4,
            "beta.scope": "routing",
        },
    ),
    "original": Preset(
        promise="keeps the laws of the original documents",
        fixed={
            "beta.law": "coherence",
            "beta.scope": "routing",
            "beta.centred": False,
            "veto.signal": "js",
            "control.reference": "level",
            "control.gate": "pressure",
            "control.harm.restart": False,
            "lens.basis": "router",
            "lens.reader": "mean",
            "lens.train_router": True,
            "lifecycle.revive.at": "off",
        },
        other={
            "interval": 100,
            "beta.tau": 0.5,
            "beta.eta": 0.01,
            "beta.k_max": 0.3,
            "veto.enabled": True,
            "veto.theta": 0.2,
            "alerts.neff_floor": 0.6,
            "alerts.top2_pre": 0.75,
            "alerts.top2_confirmed": 0.85,
            "alerts.pre_after": 3,
            "alerts.confirmed_after": 5,
            "control.pressure_decay": 0.8,
            "control.forget_base": 0.02,
            "control.forget_gain": 0.10,
            "control.min_pressure": 0.01,
            "control.c1": 1.0,
            "control.c2": 0.0,
            "control.pressure_cap": 0.5,
            "control.scale_max": 0.5,
            "control.warmup_steps": 100,
            "control.warmup_scale_max": 0.02,
            "control.lens_spread_max": 1e6,
            "control.harm.threshold": 0.02,
            "control.harm.min_scale": 0.01,
            "control.harm.factor": 0.5,
            "control.harm.floor": 0.1,
            "control.harm.recovery": 0.2,
            "control.harm.abstain": 0.15,
            "control.harm.hold": 0,
            "control.quota_top2": 0.90,
            "lens.memory": 0.0,
            "lifecycle.dry_run.prune_threshold": 0.3,
            "lifecycle.dry_run.starvation_threshold": 0.5,
            "lifecycle.dry_run.min_tokens": 100,
            "lifecycle.dry_run.coherence_tokens": 1000,
            "lifecycle.dry_run.after_step": 1000,
            "lifecycle.dry_run.confirmations": 1,
        },
    ),
}


def by_keyword(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Paths as the keywords of ``config.replace``: ``beta.law`` -> ``beta__law``."""
    return {path.replace(".", "__"): value for path, value in settings.items()}


@dataclass(frozen=True, kw_only=True)
class ChronoConfig(ConfigBase):
    """All settings of one wrapped model.

    Args:
        interval: optimizer steps in a telemetry window; control acts when a window closes. None = a twentieth of the
            run, between 1 and 100, fixed when a Trainer begins to train and written into the manifest and the state;
            100 in a loop of your own.
        contract: the preset that this config was made from, None for one that was built from parts. It is not
            compared: two configs with equal settings are equal.
        schema_version: of this config's JSON form.

    **Presets are contracts.** :meth:`observe`, :meth:`protect` (the default), :meth:`balance`, :meth:`revive` and
    :meth:`original` take overrides that tune them: ``ChronoConfig.balance(beta__rate=0.1)`` keeps everything else of
    `balance`. A whole part overrides the fields that are written out in it, and no others:
    ``ChronoConfig.observe(beta=BetaConfig(stale_after=500))`` still observes. What a preset's name promises cannot be
    overridden: ``observe`` never steers, ``balance`` stays `balance`. Such an override raises, here, in
    :meth:`replace`, in ``dataclasses.replace`` and when JSON is read. Build a config from parts
    (``ChronoConfig(beta=BetaConfig(law="balance"), ...)``) for a mixture that no preset promises; parts left out are
    the defaults.

    Raises:
        ConfigError: unknown names, wrong types, values out of range, a contradiction to the preset.
    """

    interval: int | None = None
    coherence: CoherenceConfig = field(default_factory=CoherenceConfig)
    alerts: AlertConfig = field(default_factory=AlertConfig)
    beta: BetaConfig = field(default_factory=BetaConfig)
    veto: VetoConfig = field(default_factory=VetoConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    lens: LensConfig = field(default_factory=LensConfig)
    lifecycle: LifecycleConfig = field(default_factory=LifecycleConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    contract: PresetName | None = field(default=None, compare=False)
    schema_version: int = CONFIG_SCHEMA

    def _check(self) -> None:
        if self.interval is not None:
            positive("interval", self.interval)
        require(
            self.schema_version == CONFIG_SCHEMA,
            f"schema_version is {CONFIG_SCHEMA} in this version, got {self.schema_version}; leave it out",
        )
        if self.contract is None:
            return
        preset = PRESETS[self.contract]
        for path, promised in preset.fixed.items():
            value = reduce(getattr, path.split("."), self)
            require(
                value == promised,
                f"ChronoConfig.{self.contract}() {preset.promise}: {path} is {promised!r} there, got {value!r}. "
                f"Leave {path} out, start from another preset, or build the config from parts, "
                "ChronoConfig(beta=BetaConfig(...), ...)",
            )

    @classmethod
    def observe(cls, **overrides: Any) -> typing.Self:
        """Telemetry and dry-run lifecycle only: outputs are bit-identical to the unwrapped model's.

        (Until a cut that was asked for with ``lifecycle.cut.at``.)

        Fixed: no beta law, no controller, no lens.
        """
        return cls.preset("observe", **overrides)

    @classmethod
    def protect(cls, **overrides: Any) -> typing.Self:
        """Coherence beta, bridge veto, gated lens, dry-run lifecycle (the default).

        Fixed: the coherence law. Veto, controller and lens may be tuned or switched off.
        """
        return cls.preset("protect", **overrides)

    @classmethod
    def balance(cls, **overrides: Any) -> typing.Self:
        """Loss-free balancing every step; selection only; no lens.

        Fixed: the balance law, its scope, no lens. Its rule, rate and cap may be tuned.
        """
        return cls.preset("balance", **overrides)

    @classmethod
    def revive(cls, **overrides: Any) -> typing.Self:
        """**Rewrites the weights of idle experts** when training begins: they become copies of busy ones.

        Balancing is costly because tokens reach experts that never learned them. So an idle expert first gets the
        weights of the expert whose tokens it is to share (:func:`chronomoe_hf.lifecycle.plan_split`), and a balance law
        with a wide dead zone keeps it at work. Where no expert is idle, no weight is written. Needs whole, trainable
        experts: full fine-tuning, alone or under DDP.

        Fixed: the balance law, no lens, the split at the start.
        """
        return cls.preset("revive", **overrides)

    @classmethod
    def original(cls, **overrides: Any) -> typing.Self:
        """Every law and constant of the original ChronoMoE documents, as far as a setting reaches them.

        Fixed: the laws (coherence beta on routing, not centred; JS veto; pressure gate; the lens along the router's own
        direction, with the mean reader and gradients through it; every window judged). The constants may be tuned. No
        setting reaches three points of the original: clocks without bias correction, a logit scale that starts at 1,
        and a veto measured on the vetoed beta of the forward before. Why the defaults differ:
        ``benchmarks/results/balance_changed.md``.
        """
        return cls.preset("original", **overrides)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> typing.Self:
        """The preset of that name.

        Args:
            name: ``observe``, ``protect``, ``balance``, ``revive`` or ``original``.
            overrides: as for :meth:`replace`.

        Raises:
            ConfigError: no such preset, or an override that contradicts it.
        """
        known = ", ".join(PRESETS)
        if not (isinstance(name, str) and name in PRESETS):
            raise ConfigError(f"no preset {shown(name)}{did_you_mean(name, PRESETS)}; known: {known}")
        require("contract" not in overrides, "contract is set by the preset; leave it out")
        preset = PRESETS[name]
        base = cls().replace(**by_keyword(preset.fixed), **by_keyword(preset.other), contract=name)
        return base.replace(**overrides)

    def differences(self, other: ChronoConfig) -> list[str]:
        """Paths of the settings that differ, ``["beta.rate", "interval"]``; empty for equal configs."""
        return sorted(_differences(self, other))

    def to_json(self) -> str:
        """Strict JSON (no NaN), keys sorted, newline at the end."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> typing.Self:
        """Inverse of ``to_dict``, for dictionaries of every schema so far; unknown keys raise ConfigError.

        What is left out comes from the preset that ``contract`` names, or is the default:
        ``{"contract": "balance", "beta": {"rate": 0.1}}`` is ``ChronoConfig.balance(beta__rate=0.1)``.
        """
        require(isinstance(data, Mapping), f"ChronoConfig is built from a dictionary, got {shown(data)}")
        values = with_parts(cls, files.upgrade(data))
        contract = values.pop("contract", None)
        return cls(**values) if contract is None else cls.preset(contract, **values)

    @classmethod
    def from_json(cls, text: str) -> typing.Self:
        """Inverse of :meth:`to_json`; raises ConfigError on anything else (files of up to 1 MiB)."""
        data = files.parse(text)
        files.say_what_changed(data)
        return cls.from_dict(data)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``chronomoe_config.json`` into `directory` (created if missing) and return its path."""
        path = Path(directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> typing.Self:
        """Read ``chronomoe_config.json`` from `directory` (or the file itself)."""
        text = files.read(directory)
        try:
            return cls.from_json(text)
        except ConfigError as error:
            raise ConfigError(f"{os.fspath(directory)}: {error}") from None


def as_config(value: ChronoConfig | PresetName | None) -> ChronoConfig | None:
    """A config from what may stand in its place: itself, the name of a preset, or None.

    Raises:
        ConfigError: anything else, with the way out.
    """
    if value is None or isinstance(value, ChronoConfig):
        return value
    if isinstance(value, str):
        return ChronoConfig.preset(value)
    way_out = f"for example ChronoConfig.observe(), or the name of a preset ({', '.join(PRESETS)})"
    if isinstance(value, dict):
        way_out = "ChronoConfig.from_dict(...) makes one of a dict"
    elif getattr(value, "__name__", None) in PRESETS:
        way_out = f"call it: ChronoConfig.{value.__name__}()"
    raise ConfigError(f"config is a {type(value).__name__}; give a ChronoConfig, {way_out}")


def _differences(one: ConfigBase, two: ConfigBase) -> list[str]:
    paths = []
    for item in dataclasses.fields(one):  # type: ignore[arg-type]
        left, right = getattr(one, item.name), getattr(two, item.name)
        if left == right or not item.compare:
            continue
        inner = [f"{item.name}.{path}" for path in _differences(left, right)] if isinstance(left, ConfigBase) else []
        paths += inner or [item.name]
    return paths
