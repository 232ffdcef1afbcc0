"""ChronoConfig and its parts: frozen, keyword-only, strict, and exact through JSON.

Units are given per field. "interval" everywhere means optimizer steps.
"""

from chronomoe_hf.config.config import CONFIG_NAME, CONFIG_SCHEMA, ChronoConfig
from chronomoe_hf.config.governance import (
    BalanceRule,
    BasisName,
    BetaConfig,
    ControlConfig,
    LensConfig,
    ReaderName,
    VetoConfig,
)
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
