"""Making layers: what is found becomes Layers with state, lens and recorder. Nothing of the model is changed here."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from chronomoe_hf import distributed
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.errors import AlreadyWrappedError, NoMoELayersError, UnsupportedArchitectureError, WrapError
from chronomoe_hf.lens.lens import ChronoLens
from chronomoe_hf.patches import Adapter, all_adapters, probe
from chronomoe_hf.recording.recorder import LayerRecorder
from chronomoe_hf.recording.role_sums import RoleState
from chronomoe_hf.recording.rows import PadToken
from chronomoe_hf.recording.scope import ForwardScope, Switches, forward_parameters
from chronomoe_hf.recording.totals import Sums
from chronomoe_hf.router.state import HANDLE, RouterHandle, RouterState
from chronomoe_hf.wrapping.class_swap import check_swappable, experts_class, router_class
from chronomoe_hf.wrapping.discovery import FoundLayer, Modules, find_layers
from chronomoe_hf.wrapping.layer import Layer
from chronomoe_hf.wrapping.native_bias import bias_dtype
from chronomoe_hf.wrapping.weights import WAY_OUT, probe_input, quantised_router

logger = logging.getLogger("chronomoe_hf")


@dataclass(frozen=True)
class Built:
    """What wrapping a model adds to it, made and checked before the model is changed.

    Args:
        layers: one for each MoE layer.
        scopes: owner of routers -> the scope of its forwards; copies that PEFT holds of an owner share one.
        decoders: encoder-decoder model -> the scope of its decoder, which needs the model's labels.
        swaps: (module, its wrapped class, handle) of every router and experts module, copies included.
        bias_holders: (adapter, router, parent) of every native bias that the balance law moves in fp32.
    """

    layers: list[Layer]
    scopes: dict[nn.Module, ForwardScope]
    decoders: dict[nn.Module, ForwardScope]
    swaps: list[tuple[nn.Module, type[nn.Module], RouterHandle]]
    bias_holders: list[tuple[Adapter, nn.Module, nn.Module]]


def build_layers(root: nn.Module, config: ChronoConfig, switches: Switches) -> Built:
    """Everything that wrapping `root` needs; `root` is not changed.

    Args:
        root: the model that will own the system.
        config: settings.
        switches: shared by all scopes.

    Raises:
        NoMoELayersError, UnsupportedArchitectureError, AlreadyWrappedError, WrapError: see ``wrap``.
    """
    found = discover(root)
    for layer in found:
        for _, module, _ in layer.modules():
            check_swappable(layer.name, module)
    sizes = [layer.adapter.num_experts(layer.router) for layer in found]
    sums = Sums(len(found), max(sizes), RoleState(sizes) if config.coherence.roles else None)
    scopes: dict[nn.Module, ForwardScope] = {}
    built = Built([], scopes, {}, [], [])
    for layer_id, layer in enumerate(found):
        scope = scopes.get(layer.owner)
        if scope is None:
            pad = PadToken.of(_config_of(layer.owner))
            scope = ForwardScope(switches, forward_parameters(layer.owner), pad, sums)
        for one in (layer, *layer.copies):
            scopes.setdefault(one.owner, scope)
        made = _make_layer(root, layer_id, layer, scope, sums, config)
        built.layers.append(made)
        if made.native_bias:
            built.bias_holders.extend((one.adapter, one.router, one.parent) for one in (layer, *layer.copies))
        for one, module, routes in layer.modules():
            if routes or made.reads_experts:
                cls = type(module)
                chrono = router_class(one.adapter, cls) if routes else experts_class(one.adapter.experts_call, cls)
                built.swaps.append((module, chrono, made.handle))
    if not any(layer.can_steer for layer in built.layers):
        raise UnsupportedArchitectureError(
            f"no layer of {type(root).__name__} can be governed: {built.layers[0].name}: {built.layers[0].known[0]}; "
            "use ChronoConfig.observe()"
        )
    built.decoders.update(_decoders(root, scopes))
    _warn_of_quantised(built.layers, config)
    return built


def _warn_of_quantised(layers: list[Layer], config: ChronoConfig) -> None:
    """A lens that was asked for and that quantisation takes away is named once, with the way out."""
    if not (config.lens.enabled and config.control.enabled):
        return
    reasons = [reason for each in layers if (reason := quantised_router(each.adapter, each.router)) is not None]
    if reasons:
        warnings.warn(
            f"{len(reasons)} of {len(layers)} layers get no lens, and nothing folds into their routers: {reasons[0]}; "
            f"{WAY_OUT}",
            stacklevel=5,
        )


def _config_of(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def _decoders(root: nn.Module, scopes: dict[nn.Module, ForwardScope]) -> dict[nn.Module, ForwardScope]:
    """Models that are given labels and shift them into the input of a decoder with routers."""
    found = {}
    for module in root.modules():
        if isinstance(module, PreTrainedModel) and getattr(module.config, "is_encoder_decoder", False):
            decoder = module.get_decoder()
            if decoder in scopes and decoder is not module and "labels" in forward_parameters(module):
                found[module] = scopes[decoder]
    return found


def discover(model: nn.Module) -> list[FoundLayer]:
    """Every layer that can be wrapped; warns of what is refused, and raises if nothing is left."""
    found, refused = find_layers(model)
    if not found and refused:
        raise UnsupportedArchitectureError(
            f"no MoE layer of {type(model).__name__} can be wrapped:\n  "
            + "\n  ".join(map(str, refused))
            + "\ndocs/adding_an_architecture.md shows how to add an architecture."
        )
    if not found:
        raise NoMoELayersError(
            f"{type(model).__name__} has no MoE layer that chronomoe_hf knows "
            f"(searched {sum(1 for _ in model.modules())} modules){_older_release(model)}; is this the model you "
            "meant to wrap?"
        )
    if any(not layer.name for layer in found):
        raise WrapError(
            f"{type(model).__name__} is a router; wrap the model that holds it (experts and padding are beside it)"
        )
    if any(HANDLE in layer.router.__dict__ for layer in found):
        raise AlreadyWrappedError(
            f"this {type(model).__name__} is part of a wrapped model; use that one, or chronomoe_hf.unwrap it first"
        )
    for line in refused:
        warnings.warn(f"chronomoe_hf leaves a layer alone: {line}", stacklevel=5)
    return found


def _older_release(model: nn.Module) -> str:
    """Says so where the family is known, but routes in a way of its own in the installed release."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    if not any(adapter.family == family for adapter in all_adapters()):
        return ""
    installed = version("transformers")
    return f": {family} routes without a router module in Transformers {installed}, and needs a newer release"


def check_layers(root: nn.Module, layers: list[Layer]) -> None:
    """Check that every MoE layer that runs now is one of those that were wrapped.

    Copies that PEFT makes of a wrapped layer and runs in its place are; layers that were added or rebuilt are not.

    Raises:
        WrapError: it is not; names the layers and the way out.
    """
    known = {layer.name: layer.handle for layer in layers}
    found = find_layers(root)[0]
    strange = [one.name for one in found if one.router.__dict__.get(HANDLE) is not known.get(one.name, root)]
    if strange:
        raise WrapError(
            f"{len(strange)} MoE layers are not those that were wrapped (first: {strange[0]}): layers were added or "
            "replaced since. Call chronomoe_hf.unwrap(model), then chronomoe_hf.wrap(model) again"
        )
    sizes = {layer.name: layer.num_experts for layer in layers}
    for one in found:
        if (width := one.adapter.num_experts(one.router)) != sizes.get(one.name, width):
            raise WrapError(
                f"{one.name} has {width} experts now and had {sizes[one.name]} when it was wrapped; call "
                "chronomoe_hf.unwrap(model), then chronomoe_hf.wrap(model) again"
            )


def _make_layer(
    root: nn.Module, layer_id: int, found: FoundLayer, scope: ForwardScope, sums: Sums, config: ChronoConfig
) -> Layer:
    router, adapter, parent = found.router, found.adapter, found.parent
    for one in (found, *found.copies):
        adapter.bind(one.router, one.parent)
    _probe(adapter, router, parent)
    num_experts = adapter.num_experts(router)
    notes = []
    native = config.beta.law == "balance" and config.beta.native and adapter.native_bias(router, parent) is not None
    refused_beta = adapter.refused("beta") if config.beta.law != "none" and not native else None
    if refused_beta is not None:
        notes.append(f"no beta: {refused_beta}")
    state = RouterState(layer_id, num_experts, k_max=config.beta.k_max)
    state.scope = config.beta.scope_in_force
    if config.beta.law == "balance":
        state.k_max = config.beta.balance_cap
    lens = _lens(layer_id, found, config, notes)
    recorder = LayerRecorder(
        layer_id,
        num_experts,
        scope,
        sums,
        config.coherence,
        config.lens.reader,
        input_width=lens.d_model if lens is not None else 0,
        compares=config.veto.enabled,
    )
    if config.coherence.enabled and found.unreadable is not None:
        notes.append(f"no coherence: {found.unreadable}")
    readable = config.coherence.enabled and found.unreadable is None
    place = adapter.native_bias_place(router, parent) if native else None
    return Layer(
        layer_id=layer_id,
        name=found.name,
        adapter=adapter,
        root=root,
        wrapped=Modules(router, parent, found.experts),
        num_experts=num_experts,
        top_k=adapter.top_k(router),
        handle=RouterHandle(state=state, recorder=recorder, lens=lens),
        recorder=recorder,
        reads_experts=readable,
        native_bias=native,
        native_dtype=bias_dtype(adapter, router, parent) if native else None,
        bias_is_parameter=place is not None and place[1] in place[0]._parameters,
        can_steer=refused_beta is None,
        known=notes,
    )


def _lens(layer_id: int, found: FoundLayer, config: ChronoConfig, notes: list[str]) -> ChronoLens | None:
    """The lens of a layer, closed; None where none is asked for, or none can be: then `notes` gets the reason."""
    if not (config.lens.enabled and config.control.enabled):
        return None
    if reason := found.adapter.refused("lens") or quantised_router(found.adapter, found.router):
        notes.append(f"no lens: {reason}")
        return None
    return ChronoLens(
        d_model=int(distributed.whole_shape(found.adapter.weight(found.router))[-1]),
        rank=1,
        layer_id=layer_id,
        train_router=config.lens.train_router,
    )


def _probe(adapter: Adapter, router: nn.Module, parent: nn.Module) -> None:
    """Run the native router once on four made-up tokens and hold its output against the adapter.

    A Transformers release that changes an order or a shape is then refused by name instead of miscounted. Routers
    that need more than hidden states, and weights that are not here yet (meta, ZeRO-3), are not probed.

    Raises:
        ContractError: the output is not what the adapter describes.
    """
    inputs = probe_input(adapter, router) if adapter.linear else None
    if inputs is None:
        return
    extra = [bias] if adapter.bias_arg and (bias := adapter.native_bias(router, parent)) is not None else []
    # Some routers keep what they saw (a capacity, a dtype), and training mode may draw random numbers: leave no trace.
    before = dict(router.__dict__)
    router.training = False
    try:
        output = _first_that_runs(router, inputs, extra)
    finally:
        router.__dict__.clear()
        router.__dict__.update(before)
    if output is None:
        logger.debug("%s was not probed", adapter.router_class)
        return
    probe(adapter, router, output)


def _first_that_runs(router: nn.Module, inputs: Iterable[torch.Tensor], extra: list[torch.Tensor]) -> Any:
    for hidden in inputs:
        # Any error: made-up inputs may be what a router, or the kernel behind a packed weight, does not take.
        with torch.no_grad(), contextlib.suppress(Exception):
            return router(hidden, *extra)
    return None
