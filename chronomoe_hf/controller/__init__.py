"""Routing control: pure policy, per-layer state, decisions, and the controller that joins them."""

from chronomoe_hf.config import ControlConfig
from chronomoe_hf.controller.controller import Controller
from chronomoe_hf.controller.decisions import ControlDecision
from chronomoe_hf.controller.layer_state import ControlState

__all__ = ["ControlConfig", "ControlDecision", "ControlState", "Controller"]
