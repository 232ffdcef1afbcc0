"""ChronoConfig and its parts: frozen, keyword-only, strict, and exact through JSON.

Units are given per field. "interval" everywhere means optimizer steps.
"""

from chronomoe_hf.config.config import ChronoConfig
from chronomoe_hf.config.files import CONFIG_NAME, CONFIG_SCHEMA
from chronomoe_hf.config.parts import (
    BalanceRule,
    BasisName,
    BetaConfig,
    ControlConfig,
    HarmGuardConfig,
    LensConfig,
    ReaderName,
    VetoConfig,
)
from chronomoe_hf.config.presets import PRESETS, PresetName
from chronomoe_hf.config.recording import (
    AlertConfig,
    CheckpointConfig,
    CoherenceConfig,
    LifecycleConfig,
    TelemetryConfig,
)

__all__ = [
    "CONFIG_NAME",
    "CONFIG_SCHEMA",
    "PRESETS",
    "AlertConfig",
    "BalanceRule",
    "BasisName",
    "BetaConfig",
    "CheckpointConfig",
    "ChronoConfig",
    "CoherenceConfig",
    "ControlConfig",
    "HarmGuardConfig",
    "LensConfig",
    "LifecycleConfig",
    "PresetName",
    "ReaderName",
    "TelemetryConfig",
    "VetoConfig",
]
