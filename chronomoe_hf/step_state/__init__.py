"""The stacked device state after an optimizer step: storage, and the arithmetic of a step on it."""

from chronomoe_hf.step_state.state import StepState, check_step

__all__ = ["StepState", "check_step"]
