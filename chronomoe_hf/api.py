"""wrap, unwrap and system_of: putting the wrapped classes in and taking them out again."""

from __future__ import annotations

import functools
import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from chronomoe_hf import private
from chronomoe_hf.checkpoint.biases import restore_biases
from chronomoe_hf.checkpoint.folded import save_folded
from chronomoe_hf.checkpoint.store import saved_config, warn_of_unloaded_state
from chronomoe_hf.config import ChronoConfig, PresetName, as_config
from chronomoe_hf.errors import AlreadyWrappedError, ConfigError, NotWrappedError
from chronomoe_hf.recording.scope import Switches, labelled_models
from chronomoe_hf.router.forward import ChronoRouter
from chronomoe_hf.router.state import HANDLE
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.wrapping.build import build_layers, check_layers
from chronomoe_hf.wrapping.class_swap import (
    add_hooks,
    add_label_hooks,
    check_restorable,
    is_a,
    remove_hooks,
    restore,
    swap,
)
from chronomoe_hf.wrapping.discovery import clean_name, find_layers, root_of
from chronomoe_hf.wrapping.fold import require_foldable
from chronomoe_hf.wrapping.native_bias import cast_bias
from chronomoe_hf.wrapping.owner import SYSTEM, find_system, left_over
from chronomoe_hf.wrapping.save_pretrained import bind_save, save_pretrained, unbind_save

TESTED_VERSIONS = ("5.6.0", "5.13.1", "5.16.1", "5.19.0", "5.23.0", "5.24.0")

Model = TypeVar("Model", bound=nn.Module)


def wrap(model: Model, config: ChronoConfig | PresetName | None = None, *, state: str | Path | None = None) -> Model:
    """Make the routing of `model` observable and governable, in place.

    The classes of its routers (and of its experts, to read their outputs) are swapped for subclasses; no
    parameter, buffer or state_dict key is added, and no number changes until something steers.

    Args:
        model: any module that contains MoE layers of Transformers; before FSDP or DeepSpeed `prepare`.
        config: settings, or the name of a preset (``"observe"``); None = those that `state` was saved with, or without
            a state ``ChronoConfig()``, the protect preset.
        state: a checkpoint whose chronomoe state is loaded too, see ``ChronoSystem.load``. If that fails, the model is
            left as it was.

    Returns:
        `model` itself. A second call with the same config (or none) does nothing but load `state`.

    Raises:
        ConfigError: `model` is no torch.nn.Module, or `config` neither a ChronoConfig nor the name of a preset.
        AlreadyWrappedError: wrapped before, with another config.
        NoMoELayersError: nothing routes tokens to experts.
        UnsupportedArchitectureError: every router found is of an unsupported kind; the message says which and why.
        LifecycleError: ``lifecycle.cut.at`` asks for a cut that this model cannot have. Nothing was changed.
        StateError: `state` cannot be loaded, or is of other weights than the model has (WeightMismatchError).
        WrapError: MoE layers were added or replaced since it was wrapped, or it holds several wrapped models.
    """
    _check_model("wrap", model)
    config = as_config(config)
    if state is not None and not isinstance(state, str | os.PathLike):
        raise ConfigError(f"wrap(state=...) takes the directory of a checkpoint, got a {type(state).__name__}")
    system = find_system(model)
    if system is not None:
        _check_same_import(system)
        if config is not None and config != system.config:
            raise AlreadyWrappedError(
                "this model is already wrapped with another config; call chronomoe_hf.unwrap(model) first "
                f"(different: {', '.join(system.config.differences(config))})"
            )
        check_layers(system.model, system.layers)
        bind_save(model, save_pretrained)  # a wrapper that was added since (PEFT) has a save_pretrained of its own
        add_label_hooks(labelled_models(system.model, model, system.sums))
        if state is not None:
            system.load(state)
        return model
    _check_version()
    _clear_left_overs(model)
    root = root_of(model)
    if config is None:
        config = ChronoConfig() if state is None else saved_config(state)
    _install(root, config)
    system = system_of(root)
    add_label_hooks(labelled_models(root, model, system.sums))
    for module in (root, model):
        unbind_save(module, save_folded)
        bind_save(module, save_pretrained)
    restore_biases(root, system.layers, (state, getattr(root, "name_or_path", None)))
    if state is None:
        warn_of_unloaded_state(root, system.layers)
        return model
    try:
        system.load(state)
    except BaseException:
        unwrap(model)
        raise
    return model


def _install(root: nn.Module, config: ChronoConfig) -> None:
    switches = Switches()
    built = build_layers(root, config, switches)
    system = ChronoSystem(root, built.layers, config, switches)
    for holder in built.bias_holders:
        cast_bias(*holder, torch.float32)
    for module, cls, handle in built.swaps:
        swap(module, cls, handle)
    add_hooks(built.scopes, built.decoders)
    root.__dict__[SYSTEM] = system


def unwrap(model: Model, fold: bool = False) -> Model:
    """Take everything out again: classes, hooks and attributes are as before `wrap`.

    Args:
        model: a wrapped model.
        fold: first write what folds exactly into the router weights and biases. Where something did,
            ``save_pretrained`` then removes a state that it finds in its directory: it would act a second time.

    Raises:
        NotWrappedError: `model` carries no ChronoSystem.
        WrapError: FSDP has sharded a router or its experts as units of their own (their classes cannot be put back),
            or, with `fold`, a weight that would change is sharded, or an open lens belongs to a router whose weight is
            quantised or carries an adapter that is not merged. Nothing was changed.
    """
    _check_model("unwrap", model)
    if _clear_left_overs(model) and find_system(model) is None:
        return model
    system = system_of(model)
    modules = dict.fromkeys([*model.named_modules(), *system.model.named_modules()])
    wrapped = {module: clean_name(path) for path, module in modules if HANDLE in module.__dict__}
    for module, name in wrapped.items():
        check_restorable(name, module)
    if fold:
        require_foldable(system.model, system.layers)
    folded = fold and any(report.folded for report in system.fold())
    _give_biases_their_dtype_back(system)
    for module in wrapped:
        if is_a(module, ChronoRouter):
            system.layers[module.router_state.layer_id].adapter.unbind(module)
        restore(module)
    for _, module in modules:
        _remove_all(module)
    system.close_telemetry()
    system.cut.unwrapped()
    for left in list(system.on_unwrap):
        left()
    if folded:
        for module in (system.model, model):
            bind_save(module, save_folded)
    return model


def _remove_all(module: nn.Module) -> None:
    remove_hooks(module)
    unbind_save(module, save_pretrained)
    module.__dict__.pop(SYSTEM, None)


def _clear_left_overs(model: nn.Module) -> bool:
    """Clear shallow copies of models that were unwrapped through another copy; whether there was one."""
    found = [module for module in model.modules() if left_over(module)]
    for module in found:
        _remove_all(module)
    return bool(found)


def _check_same_import(system: object) -> None:
    if not isinstance(system, ChronoSystem):
        raise AlreadyWrappedError(
            "this model was wrapped before chronomoe_hf was imported anew (sys.modules was cleared); call "
            "chronomoe_hf.unwrap(model), then chronomoe_hf.wrap(model, config) again"
        )


def _give_biases_their_dtype_back(system: ChronoSystem) -> None:
    dtypes = {layer.name: layer.native_dtype for layer in system.layers if layer.native_dtype is not None}
    for found in find_layers(system.model)[0]:
        for one in (found, *found.copies):
            bias_E = one.adapter.native_bias(one.router, one.parent)
            if found.name in dtypes and bias_E is not None and bias_E.dtype == torch.float32:
                cast_bias(one.adapter, one.router, one.parent, dtypes[found.name])


def system_of(model: nn.Module) -> ChronoSystem:
    """The ChronoSystem of a wrapped model, through any wrapper around it.

    Raises:
        NotWrappedError: there is none; call ``chronomoe_hf.wrap(model)`` first.
        WrapError: `model` holds several wrapped models.
    """
    _check_model("system_of", model)
    system: ChronoSystem | None = find_system(model)
    if system is None:
        raise NotWrappedError(f"{type(model).__name__} is not wrapped; call chronomoe_hf.wrap(model) first")
    return system


def _check_model(verb: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        if isinstance(getattr(model, "model", None), nn.Module):  # a Trainer, a pipeline
            raise ConfigError(
                f"{verb}() takes a model and got a {kind}; give its model (trainer.model), or for a Trainer call "
                "chronomoe_hf.attach(trainer) and detach(trainer)"
            )
        raise ConfigError(
            f"{verb}() takes a model (torch.nn.Module) and got a {kind}; load it first, for example with "
            "AutoModelForCausalLM.from_pretrained(...)"
        )


@functools.cache
def _check_version() -> None:
    installed = version("transformers")
    for path, lost in private.absent().items():
        warnings.warn(f"chronomoe_hf does not find {path} any more: {lost}", stacklevel=3)
    if installed not in TESTED_VERSIONS:
        warnings.warn(
            f"chronomoe_hf is tested with Transformers {', '.join(TESTED_VERSIONS)}; {installed} is installed. Each "
            "router is still held against its adapter when it is wrapped, and refused if its outputs have changed.",
            stacklevel=3,
        )
