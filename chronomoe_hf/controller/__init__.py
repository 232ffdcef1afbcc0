"""Routing control: pure policy, per-layer state, decisions, and the controller that joins them."""

from chronomoe_hf.config import ControlConfig
from chronomoe_hf.controller.controller import Controller, ControlState
from chronomoe_hf.controller.decisions import ControlDecision

__all__ = ["ControlConfig", "ControlDecision", "ControlState", "Controller"]
