"""What each preset sets, and which of it may not be overridden.

Paths are ``part.field``. A preset is a contract: its *fixed* settings are what its name promises, its *other* settings
are only where it starts from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
        fixed={"beta.law": "none", "control.enabled": False, "lens.enabled": False, "lifecycle.split": "off"},
        other={"veto.enabled": False},
    ),
    "protect": Preset(
        promise="moves beta by coherence and never writes a weight",
        fixed={"beta.law": "coherence", "lifecycle.split": "off"},
        other={},
    ),
    "balance": Preset(
        promise="balances the load by choosing experts only, without a lens and without writing a weight",
        fixed={"beta.law": "balance", "beta.scope": "selection", "lens.enabled": False, "lifecycle.split": "off"},
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
        fixed={"beta.law": "balance", "lens.enabled": False, "lifecycle.split": "start"},
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
            "control.gate": "pressure",
            "control.harm.restart": False,
            "lens.basis": "router",
            "lens.reader": "mean",
            "lens.train_router": True,
            "lifecycle.split": "off",
        },
        other={
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
            "lifecycle.prune_threshold": 0.3,
            "lifecycle.starvation_threshold": 0.5,
            "lifecycle.min_tokens": 100,
            "lifecycle.coherence_tokens": 1000,
            "lifecycle.after_step": 1000,
            "lifecycle.confirmations": 1,
        },
    ),
}


def by_keyword(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Paths as the keywords of ``config.replace``: ``beta.law`` -> ``beta__law``."""
    return {path.replace(".", "__"): value for path, value in settings.items()}
