"""Making layers: what is found becomes Layers with state, lens and recorder. Nothing of the model is changed here but
the dtype of a correction bias that balance will update.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import Any

import torch
from torch import nn

from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.errors import AlreadyWrappedError, NoMoELayersError, UnsupportedArchitectureError
from chronomoe_hf.lens.lens import ChronoLens
from chronomoe_hf.patches import Adapter, probe
from chronomoe_hf.recording.scope import ForwardScope, Switches, forward_parameters
from chronomoe_hf.recording.sums import Accumulators, LayerRecorder
from chronomoe_hf.router.state import HANDLE, RouterHandle, RouterState
from chronomoe_hf.wrapping.class_swap import check_swappable
from chronomoe_hf.wrapping.discovery import FoundLayer, find_layers
from chronomoe_hf.wrapping.layer import Layer, is_parameter

logger = logging.getLogger("chronomoe_hf")


def build_layers(
    root: nn.Module, config: ChronoConfig, switches: Switches
) -> tuple[list[Layer], dict[nn.Module, ForwardScope]]:
    """Every MoE layer of `root` that can be wrapped, and the forward scope of each of their owners.

    Args:
        root: the model that will own the system.
        config: settings.
        switches: shared by all scopes.

    Raises:
        NoMoELayersError, UnsupportedArchitectureError, AlreadyWrappedError, WrapError: see ``wrap``. Everything is
            checked before anything is changed.
    """
    found = discover(root)
    for layer in found:  # all of them before the first change: a refused model is left as it was
        for module in (layer.router, layer.experts if layer.unreadable is None else None):
            if module is not None:
                check_swappable(layer.name, module)
    width = max(layer.adapter.num_experts(layer.router) for layer in found)
    scopes: dict[nn.Module, ForwardScope] = {}
    layers = []
    for layer_id, layer in enumerate(found):
        if layer.owner not in scopes:
            scopes[layer.owner] = ForwardScope(switches, forward_parameters(layer.owner), _pad_token_id(layer.owner))
        layers.append(_make_layer(layer_id, layer, scopes[layer.owner], width, config))
    if not any(layer.can_steer for layer in layers):
        raise UnsupportedArchitectureError(
            f"no layer of {type(root).__name__} can be governed: {layers[0].name}: {layers[0].notes[0]}; "
            "use ChronoConfig.observe()"
        )
    return layers, scopes


def discover(model: nn.Module) -> list[FoundLayer]:
    """Every layer that can be wrapped; warns of what is refused, and raises if nothing is left."""
    found, refused = find_layers(model)
    if not found and refused:
        raise UnsupportedArchitectureError(
            f"no MoE layer of {type(model).__name__} can be wrapped:\n  "
            + "\n  ".join(map(str, refused))
            + "\nCONTRIBUTING.md shows how to add an architecture."
        )
    if not found:
        raise NoMoELayersError(
            f"{type(model).__name__} has no MoE layer that chronomoe_hf knows "
            f"(searched {sum(1 for _ in model.modules())} modules); is this the model you meant to wrap?"
        )
    if any(HANDLE in layer.router.__dict__ for layer in found):
        raise AlreadyWrappedError(
            f"this {type(model).__name__} is part of a wrapped model; use that one, or chronomoe_hf.unwrap it first"
        )
    for line in refused:
        warnings.warn(f"chronomoe_hf leaves a layer alone: {line}", stacklevel=5)
    return found


def _pad_token_id(owner: nn.Module) -> int | None:
    config = getattr(owner, "config", None)
    pad = getattr(config, "pad_token_id", None)
    return pad if isinstance(pad, int) else None


def _make_layer(layer_id: int, found: FoundLayer, window: ForwardScope, width: int, config: ChronoConfig) -> Layer:
    name, router, adapter, parent = found.name, found.router, found.adapter, found.parent
    adapter.bind(router, parent)
    _probe(adapter, router, parent)
    num_experts = adapter.num_experts(router)
    notes = []
    recorder = LayerRecorder(layer_id, num_experts, width, window, config.coherence, config.lens.reader)
    native = config.beta.law == "balance" and config.beta.native and adapter.native_bias(router, parent) is not None
    refused_beta = adapter.refused("beta") if config.beta.law != "none" and not native else None
    if refused_beta is not None:
        notes.append(f"no beta: {refused_beta}")
    if native:
        keep_native_bias_in_fp32(adapter, router, parent)
    state = RouterState(layer_id, num_experts, k_max=config.beta.k_max)
    state.scope = "selection" if config.beta.law == "balance" else config.beta.scope
    if config.beta.law == "balance":
        state.k_max = config.beta.balance_cap
    handle = RouterHandle(state=state, recorder=recorder)
    if config.lens.enabled and config.control.enabled:
        if reason := adapter.refused("lens"):
            notes.append(f"no lens: {reason}")
        else:
            handle.lens = ChronoLens(
                d_model=_input_width(adapter, router),
                rank=1,
                layer_id=layer_id,
                train_router=config.lens.train_router,
            )
    input_width = handle.lens.d_model if handle.lens is not None else 0
    recorder.train = Accumulators.zeros(width, input_width)
    recorder.eval = Accumulators.zeros(width)
    if config.coherence.enabled and found.unreadable is not None:
        notes.append(f"no coherence: {found.unreadable}")
    readable = config.coherence.enabled and found.unreadable is None
    return Layer(
        layer_id=layer_id,
        name=name,
        adapter=adapter,
        router=router,
        experts=found.experts if readable else None,
        parent=parent,
        num_experts=num_experts,
        top_k=adapter.top_k(router),
        handle=handle,
        recorder=recorder,
        native_bias=native,
        bias_is_parameter=native and is_parameter(_bias(adapter, router, parent), router, parent),
        can_steer=refused_beta is None,
        notes=notes,
    )


def _bias(adapter: Adapter, router: nn.Module, parent: nn.Module) -> torch.Tensor:
    bias_E = adapter.native_bias(router, parent)
    assert bias_E is not None
    return bias_E


def keep_native_bias_in_fp32(adapter: Adapter, router: nn.Module, parent: nn.Module) -> None:
    """Some families load their bias in bf16, where steps of a thousandth are rounded away: keep it in fp32."""
    bias = _bias(adapter, router, parent)
    for module in (*router.modules(), parent):
        for name, value in [*module._buffers.items(), *module._parameters.items()]:
            if value is not None and value.data_ptr() == bias.data_ptr() and value.dtype != torch.float32:
                if name in module._buffers:
                    module._buffers[name] = value.float()
                else:
                    value.data = value.data.float()


def _probe(adapter: Adapter, router: nn.Module, parent: nn.Module) -> None:
    """Run the native router once on four made-up tokens and hold its output against the adapter.

    A Transformers release that changes an order or a shape is then refused by name instead of miscounted. Routers
    that need more than hidden states, and weights that are not here yet (meta, ZeRO-3), are not probed.

    Raises:
        ContractError: the output is not what the adapter describes.
    """
    weight = adapter.weight(router)
    if weight.is_meta or weight.dim() != 2 or weight.numel() == 0 or not adapter.linear:
        return
    extra = [bias] if adapter.bias_arg and (bias := adapter.native_bias(router, parent)) is not None else []
    hidden_TD = torch.linspace(-1.0, 1.0, 4 * weight.shape[-1], device=weight.device, dtype=weight.dtype).view(4, -1)
    # Some routers keep what they saw (a capacity, a dtype), and training mode may draw random numbers: leave no trace.
    before = dict(router.__dict__)
    router.training = False
    try:
        output = _first_that_runs(router, (hidden_TD, hidden_TD[None]), extra)
    finally:
        router.__dict__.clear()
        router.__dict__.update(before)
    if output is None:
        logger.debug("%s was not probed", adapter.router_class)
        return
    probe(adapter, router, output)


def _first_that_runs(router: nn.Module, inputs: tuple[torch.Tensor, ...], extra: list[torch.Tensor]) -> Any:
    for hidden in inputs:
        with torch.no_grad(), contextlib.suppress(TypeError, RuntimeError, ValueError, IndexError, AttributeError):
            return router(hidden, *extra)
    return None


def _input_width(adapter: Adapter, router: nn.Module) -> int:
    weight = adapter.weight(router)
    # Under an active ZeRO-3 config the weight is empty at wrap time; DeepSpeed keeps its shape beside it.
    shape = weight.ds_shape if hasattr(weight, "ds_shape") else weight.shape
    return int(shape[-1])
