"""The balance law at its strongest: it acts within the few steps of a test."""

from __future__ import annotations

from typing import Any

from chronomoe_hf import ChronoConfig

FULL: dict[str, Any] = {"dead_zone": None, "rate": 0.3, "first_layer": "same"}  # every share to the fair one


def full_balance(**overrides: Any) -> ChronoConfig:
    """``ChronoConfig.balance()`` without a dead zone, in every layer alike."""
    return ChronoConfig.balance(beta=FULL, **overrides)
