"""ChronoConfig and its parts: frozen, keyword-only, strict, and exact through JSON.

Units are given per field. "interval" everywhere means optimizer steps.
"""

from chronomoe_hf.config.config import PRESETS, ChronoConfig, PresetName, as_config
from chronomoe_hf.config.files import CONFIG_NAME, CONFIG_SCHEMA
from chronomoe_hf.config.lifecycle import CutConfig, DryRunConfig, LifecycleConfig, MeasuringConfig, ReviveConfig
from chronomoe_hf.config.parts import (
    AlertConfig,
    BalanceRule,
    BasisName,
    BetaConfig,
    CheckpointConfig,
    CoherenceConfig,
    ControlConfig,
    HarmGuardConfig,
    LensConfig,
    ReaderName,
    TelemetryConfig,
    VetoConfig,
)
from chronomoe_hf.config.replay import ReplayConfig

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
    "CutConfig",
    "DryRunConfig",
    "HarmGuardConfig",
    "LensConfig",
    "LifecycleConfig",
    "MeasuringConfig",
    "PresetName",
    "ReaderName",
    "ReplayConfig",
    "ReviveConfig",
    "TelemetryConfig",
    "VetoConfig",
    "as_config",
]
