"""ChronoConfig: all settings of one wrapped model, its presets, and its JSON form."""

from __future__ import annotations

import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chronomoe_hf.config.base import ConfigBase, positive, require
from chronomoe_hf.config.governance import BetaConfig, ControlConfig, LensConfig, VetoConfig
from chronomoe_hf.config.recording import (
    AlertConfig,
    CheckpointConfig,
    CoherenceConfig,
    LifecycleConfig,
    TelemetryConfig,
)
from chronomoe_hf.errors import ConfigError

CONFIG_SCHEMA = 1
CONFIG_NAME = "chronomoe_config.json"


@dataclass(frozen=True, kw_only=True)
class ChronoConfig(ConfigBase):
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
    schema_version: int = CONFIG_SCHEMA

    def _check(self) -> None:
        positive("interval", self.interval)
        require(
            self.schema_version == CONFIG_SCHEMA,
            f"schema_version {self.schema_version} is not readable by this version (it reads {CONFIG_SCHEMA}); "
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
        require(name in known, f"no preset {name!r}; known: {', '.join(known)}")
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
