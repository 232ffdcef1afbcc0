"""Weights whose routing was governed, loaded without the state that goes with them."""

from __future__ import annotations

import warnings

from torch import nn

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.manifest import short
from chronomoe_hf.checkpoint.state_file import has_state, read_manifest
from chronomoe_hf.errors import StateError


def warn_of_unloaded_state(model: nn.Module) -> None:
    """Warn if `model` came from a local directory whose state steers: without it the same weights route otherwise.

    A state that steers nothing in the forward (``observe``, or ``balance`` on a family's own correction bias, which is
    part of the weights) is not warned of.

    Args:
        model: As ``from_pretrained`` returned it; its ``name_or_path`` says where it came from.
    """
    source = getattr(model, "name_or_path", None)
    if not isinstance(source, str) or not source or not distributed.is_main() or not has_state(source):
        return
    try:
        manifest = read_manifest(source)
    except StateError:
        return  # loading it says what is wrong with it
    steering = manifest.get("steering")
    beta = isinstance(steering, list) and any(steering)
    if manifest.get("governed") is True and (beta or any(name.startswith("lens.") for name in manifest["tensors"])):
        warnings.warn(
            f"the weights of this model come from {short(source)}, where their routing was governed, and without the "
            "state there they route otherwise: load it with wrap(model, config, state=directory), or resume the "
            "Trainer from that checkpoint",
            stacklevel=3,
        )
