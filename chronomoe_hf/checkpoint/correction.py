"""The model's own correction biases in a state: saved whenever the balance law moves them, and written back on load.

Most weights hold the bias as well, and then both agree. An adapter (PEFT) does not: what is written are its own weights
alone, and without the state every bias would be that of the base model again. A bias in a state is fp32, as the law
moves it, also where the weights beside it were rounded to bf16.

Shape suffixes: E experts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.manifest import WAY_OUT
from chronomoe_hf.errors import StateCorruptError
from chronomoe_hf.wrapping.layer import Layer
from chronomoe_hf.wrapping.native_bias import restore_fp32_bias

BIAS = re.compile(r"bias\.(\d{1,9})")
"""Name of the tensor of one layer, fp32 ``(E,)``."""


def packed_biases(layers: Sequence[Layer]) -> dict[str, Tensor]:
    """The biases that the balance law moves, by name; one that is sharded is left to the engine that shards it."""
    found = {layer.layer_id: _whole_bias(layer) for layer in layers if layer.native_bias}
    return {f"bias.{at}": bias_E.float().cpu().clone() for at, bias_E in found.items() if bias_E is not None}


def check_biases(tensors: Mapping[str, Tensor], num_experts: Sequence[int]) -> None:
    """Check layer, dtype, shape and numbers of every ``bias.*`` tensor.

    Args:
        tensors: of the saved state.
        num_experts: E of each saved layer.

    Raises:
        StateCorruptError: the first that is not what it must be.
    """
    for name, value in tensors.items():
        if (match := BIAS.fullmatch(str(name))) is None:
            continue
        if int(match[1]) >= len(num_experts):
            raise StateCorruptError(f"the saved state has {name} for {len(num_experts)} layers; {WAY_OUT}")
        shape = (num_experts[int(match[1])],)
        if value.dtype != torch.float32 or tuple(value.shape) != shape or not bool(value.isfinite().all()):
            raise StateCorruptError(
                f"the saved state's {name} must be finite numbers in torch.float32 of shape {shape}, got {value.dtype} "
                f"{tuple(value.shape)}; {WAY_OUT}"
            )


def load_biases(
    layers: Sequence[Layer], tensors: Mapping[str, Tensor], pairs: Sequence[tuple[int, int]]
) -> dict[int, str]:
    """Write the saved biases into the layers whose bias the balance law moves.

    Args:
        layers: live.
        tensors: of the saved state, checked.
        pairs: (saved layer, live layer) that agree.

    Returns:
        By live layer id, why a saved bias that is not the live one was left out.
    """
    restore_fp32_bias(layers)
    left: dict[int, str] = {}
    for old, new in pairs:
        saved_E = tensors.get(f"bias.{old}")
        if saved_E is None:
            continue
        live_E = _whole_bias(layers[new])
        if live_E is None:
            left[new] = "it is not whole on this process"
        elif layers[new].native_bias:
            with torch.no_grad():
                live_E.copy_(saved_E)
        elif not torch.equal(live_E.cpu(), saved_E.to(live_E.dtype)):
            left[new] = "no law moves it with these settings, and the weights loaded here hold another one"
    return left


def lacks_biases(layers: Sequence[Layer], tensors: Mapping[str, Tensor], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Live layers whose bias neither the state (of version 0.2 or before) nor the adapter's weights hold."""
    if not only_adapter(layers):
        return []
    return [new for old, new in pairs if f"bias.{old}" not in tensors and not saved_with_weights(layers[new])]


def only_adapter(layers: Sequence[Layer]) -> bool:
    """Whether ``save_pretrained`` writes an adapter and not the model's weights (PEFT, not merged)."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # an adapter can only be there if its library was imported
    if tuners is None:
        return False
    kind: Any = tuners.BaseTunerLayer
    return any(isinstance(module, kind) for module in layers[0].root.modules())


def saved_with_weights(layer: Layer) -> bool:
    """Whether the weights that ``save_pretrained`` writes hold what the law moves in this layer; beta they never do."""
    if not layer.native_bias:
        return True
    if not only_adapter([layer]):
        return True
    others: Any = sys.modules["peft.utils.other"].ModulesToSaveWrapper
    place = layer.adapter.native_bias_place(layer.router, layer.parent)
    assert place is not None
    saved = (module for module in layer.root.modules() if isinstance(module, others))
    return any(place[0] is inner for wrapper in saved for inner in wrapper.modules_to_save.modules())


def missing_from_weights(layers: Sequence[Layer]) -> list[int]:
    """Layers whose correction bias the weights beside a state do not hold, so that only the state does."""
    return [layer.layer_id for layer in layers if not saved_with_weights(layer)]


def _whole_bias(layer: Layer) -> Tensor | None:
    """The live bias, or None where there is none or this process does not hold all of it."""
    bias_E = layer.adapter.native_bias(layer.router, layer.parent)
    if bias_E is None or bias_E.is_meta or distributed.is_sharded(bias_E):
        return None
    if layer.bias_is_parameter and distributed.is_sharded(layer.adapter.weight(layer.router)):
        return None
    return bias_E.detach()
