"""What of the model may change while it is wrapped, and is read anew: experts per token, the dtype of its biases.

A user may set another k in the middle of a run (a schedule, an ablation). Every forward shows how many experts each
token got, so laws and ceilings follow from the next step on. In a compiled graph the forward shows nothing to the host;
there k is read from the router when a window closes.
"""

from __future__ import annotations

from chronomoe_hf.errors import WrapError
from chronomoe_hf.parts import Parts
from chronomoe_hf.wrapping.native_bias import restore_fp32_bias


def follow_step(parts: Parts, closing: bool) -> None:
    """After the forwards of a step: bring what has changed in line. No read of the device.

    Args:
        parts: of the system; its layers and its state get the k in force.
        closing: the step closes a window: layers that no eager forward has called in it are looked at.

    Raises:
        WrapError: a router has another number of experts than when it was wrapped.
    """
    restore_fp32_bias(parts.layers)
    changed = False
    for layer in parts.layers:
        seen = layer.recorder
        if seen.other_width is not None:
            width, seen.other_width = seen.other_width, None
            raise WrapError(
                f"{layer.name} has {width} experts now and had {layer.num_experts} when it was wrapped; call "
                "chronomoe_hf.unwrap(model), then chronomoe_hf.wrap(model) again"
            )
        if closing and seen.top_k is None:
            seen.see_top_k(layer.adapter.top_k(layer.router))
        if seen.top_k is not None and seen.top_k != layer.top_k:
            layer.top_k, changed = seen.top_k, True
    if changed:
        parts.step_state.set_top_k([layer.top_k for layer in parts.layers])


def follow_model(parts: Parts) -> None:
    """Before a run and before a load: k as the routers have it."""
    for layer in parts.layers:
        layer.recorder.new_window()
    follow_step(parts, closing=True)


def new_window(parts: Parts) -> None:
    """What is told of a window starts afresh."""
    for layer in parts.layers:
        layer.recorder.new_window()
