"""The bias of a split: into beta of the wrapped model, or into the model's own correction biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from chronomoe_hf.controller import actuate
from chronomoe_hf.splitting.plan import LayerSplit


def write_shifts(system: Any, splits: Mapping[int, LayerSplit]) -> Callable[[], None]:
    """Let the shifts of the plan's logits act from the next forward on.

    Args:
        system: of the wrapped model.
        splits: layers with a shift, by layer_id.

    Returns:
        A function that gives every bit back.
    """
    shifts = {index: split.shift_E for index, split in splits.items() if split.shift_E is not None}
    stds = {index: split.logit_std for index, split in splits.items()}
    governed, moved = system.governed, system.beta_moved
    restore = actuate.shift_biases(system.step_state, system.layers, shifts, stds)
    system.governed = True
    _act(system, True)

    def undo() -> None:
        restore()
        system.governed = governed
        _act(system, moved)

    return undo


def _act(system: Any, moved: bool) -> None:
    system.step_state.refresh(system.cap)
    system.step_state.publish()
    system.switch_beta_on(moved)
