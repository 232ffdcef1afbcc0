"""Laws for tests: balance at its strongest, which acts within a few steps, and control in round numbers."""

from __future__ import annotations

from typing import Any

from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import HarmGuardConfig

FULL: dict[str, Any] = {"dead_zone": None, "rate": 0.3, "first_layer": "same"}  # every share to the fair one
# The original gate's cap, warm-up and harm threshold; round numbers for sums by hand, where the defaults are measured.
HAND: dict[str, Any] = {
    "integral_target": 0.65,
    "integral_gain": 0.5,
    "integral_leak": 0.98,
    "integral_step": 1.0,
    "scale_max": 0.5,
    "warmup_steps": 100,
    "harm": HarmGuardConfig(threshold=0.02, restart=False),
}


def full_balance(**overrides: Any) -> ChronoConfig:
    """``ChronoConfig.balance()`` without a dead zone, in every layer alike."""
    return ChronoConfig.balance(beta=FULL, **overrides)
