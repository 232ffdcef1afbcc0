"""ChronoConfig and its parts: frozen, keyword-only, strict, and exact through JSON.

Units are given per field. "interval" everywhere means optimizer steps.
"""

from chronomoe_hf.config.chrono import CONFIG_NAME, SCHEMA_VERSION, ChronoConfig
from chronomoe_hf.config.governing import (
    BalanceRule,
    BasisName,
    BetaConfig,
    ControlConfig,
    LensConfig,
    ReaderName,
    VetoConfig,
)
from chronomoe_hf.config.watching import (
    AlertConfig,
    CheckpointConfig,
    CoherenceConfig,
    LifecycleConfig,
    TelemetryConfig,
)

__all__ = [
    "CONFIG_NAME",
    "SCHEMA_VERSION",
    "AlertConfig",
    "BalanceRule",
    "BasisName",
    "BetaConfig",
    "CheckpointConfig",
    "ChronoConfig",
    "CoherenceConfig",
    "ControlConfig",
    "LensConfig",
    "LifecycleConfig",
    "ReaderName",
    "TelemetryConfig",
    "VetoConfig",
]
