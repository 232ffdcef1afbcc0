"""Putting the wrapped classes on a model's routers and experts, and taking them off again.

The owner of the routers, the model whose forward opens the scope, gets a class too, under the name that it has: there
`model.forward(...)` is seen as `model(...)` is.

Swapping the class of an instance keeps its parameters, hooks, state_dict keys and place in the model as they are. Every
wrapped class is made here, once for each native class; a pickled module names the native class and the mixins, from
which a fresh process makes the class again.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import types
from typing import Any

from torch import nn

from chronomoe_hf import distributed
from chronomoe_hf.errors import WrapError
from chronomoe_hf.patches import Adapter, match_class
from chronomoe_hf.recording.experts import ChronoExperts, dispatches_plainly, experts_mixin
from chronomoe_hf.recording.scope import (
    DECODER,
    LABELS,
    SCOPE,
    ChronoOwner,
    ForwardScope,
    Labelled,
    close_decoder,
    close_scope,
    hide_labels,
    open_decoder,
    open_scope,
    show_labels,
)
from chronomoe_hf.router.forward import ChronoRouter
from chronomoe_hf.router.state import HANDLE, RouterHandle
from chronomoe_hf.wrapping.save_pretrained import same_function

_SAME_NAME = ("__module__", "__qualname__", "__doc__")

Mixins = tuple[type[nn.Module], ...]

_CLASSES: dict[tuple[Mixins, type[nn.Module]], type[nn.Module]] = {}
_NATIVE = "chrono_native_class"
_HOOKS = (open_scope, close_scope, open_decoder, close_decoder, show_labels, hide_labels)


# ---- classes -------------------------------------------------------------------------------------------------------


def router_class(adapter: Adapter, native: type[nn.Module]) -> type[nn.Module]:
    """The class ``Chrono<Native>`` = (ChronoRouter, the adapter's mixins, native) of a wrapped router, always the same.

    Args:
        adapter: the facts of the router's class.
        native: class of the router.
    """
    return _class_of((ChronoRouter, *adapter.mixins), native)


def experts_class(experts_call: str, native: type[nn.Module]) -> type[nn.Module]:
    """The class ``Chrono<Native>`` of wrapped experts.

    Args:
        experts_call: the adapter's ``experts_call``; one that has a reader.
        native: class of the experts.
    """
    mixin = experts_mixin(experts_call)
    assert mixin is not None, "experts without a reader are not wrapped"
    return _class_of((mixin,), native)


def _class_of(mixins: Mixins, native: type[nn.Module]) -> type[nn.Module]:
    if issubclass(native, mixins[0]):
        return native
    made = _CLASSES.get((mixins, native))
    if made is None:
        space: dict[str, Any] = {"__module__": __name__, "__reduce_ex__": _reduce_ex, _NATIVE: native}
        name = f"Chrono{native.__name__}"
        if mixins[0] is ChronoRouter:
            space["adapter"] = match_class(native)
            space["input_name"] = list(inspect.signature(native.forward).parameters)[1]
        elif issubclass(mixins[0], ChronoExperts):
            space["plain_dispatch"] = dispatches_plainly(native)
        elif mixins[0] is ChronoOwner:
            # Transformers looks models up by what their class is called: for what a forward may record, for the
            # architecture in config.json, for losses and checkpoints. So nothing of that may change.
            name = native.__name__
            space |= {key: getattr(native, key) for key in _SAME_NAME}
            space["forward"] = _owner_forward(native)
        made = type(name, (*mixins, native), space)
        _CLASSES[(mixins, native)] = made
    return made


def _owner_forward(native: type[nn.Module]) -> Any:
    """``ChronoOwner.forward`` with the signature of the native one, which Trainer and others read."""

    @functools.wraps(native.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ChronoOwner.forward(self, *args, **kwargs)

    return forward


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """How an instance is pickled and copied: its class is made again from parts that can be imported."""
    cls = type(self)
    reduced = getattr(cls, _NATIVE).__reduce_ex__(self, max(2, int(protocol)))
    if _NATIVE not in cls.__dict__ or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return reduced  # a class that someone else made from ours, or one that pickles in its own way
    mixins = cls.__bases__[:-1]
    return (_empty, (mixins, cls.__bases__[-1]), *reduced[2:])


def _empty(mixins: Mixins, native: type[nn.Module]) -> nn.Module:
    cls = _class_of(mixins, native)
    return cls.__new__(cls)


# ---- putting on and taking off -------------------------------------------------------------------------------------


def swap(module: nn.Module, cls: type[nn.Module], handle: RouterHandle) -> None:
    """Give a router or experts module its wrapped class."""
    module.__class__ = cls
    module.__dict__[HANDLE] = handle
    _rebind_hooked_forward(module)


def restore(module: nn.Module) -> None:
    """Give a wrapped module its native class again; `check_restorable` first."""
    module.__class__ = getattr(type(module), _NATIVE)
    del module.__dict__[HANDLE]
    _rebind_hooked_forward(module)


def check_swappable(name: str, module: nn.Module) -> None:
    """Raise WrapError where a swapped class would be bypassed or would break the module."""
    _check_not_sharded(name, module, "call chronomoe_hf.wrap(model) before accelerator.prepare")
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
        raise WrapError(
            f"{name}: something replaced forward on this instance, which would bypass the wrapped router; "
            "wrap the model before tensor or expert parallelism is applied"
        )


def check_restorable(name: str, module: nn.Module) -> None:
    """Raise WrapError, with the way out, where the native class cannot be put back."""
    way_out = "unwrap a model loaded from its checkpoint instead"
    _check_not_sharded(name, module, way_out)
    if _NATIVE not in type(module).__dict__:
        raise WrapError(f"{name}: something gave it the class {type(module).__name__} after it was wrapped; {way_out}")


def _check_not_sharded(name: str, module: nn.Module, way_out: str) -> None:
    # fully_shard mixes its own class into the module's; swapping that class would take the sharding logic out.
    if distributed.is_sharded_module(module):
        raise WrapError(f"{name}: {type(module).__name__} is sharded by FSDP; {way_out}")


def _rebind_hooked_forward(module: nn.Module) -> None:
    # accelerate's hooks put a forward on the instance that calls `_old_forward`, bound to the class of that time.
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)


def add_hooks(scopes: dict[nn.Module, ForwardScope], decoders: dict[nn.Module, ForwardScope]) -> None:
    """Open and close each scope around the forward of its owner; give the scope of a decoder its labels."""
    for owner, scope in scopes.items():
        owner.__dict__[SCOPE] = scope
        if "forward" in owner.__dict__ and "_old_forward" not in owner.__dict__:  # what runs there is not the class's
            owner.register_forward_pre_hook(open_scope, with_kwargs=True)
            owner.register_forward_hook(close_scope, always_call=True)
        else:
            owner.__class__ = _class_of((ChronoOwner,), type(owner))
            _rebind_hooked_forward(owner)
    for model, scope in decoders.items():
        model.__dict__[DECODER] = scope
        model.register_forward_pre_hook(open_decoder, with_kwargs=True)
        model.register_forward_hook(close_decoder, always_call=True)


def add_label_hooks(models: dict[nn.Module, Labelled]) -> None:
    """Show the scopes the labels that these models are given; does nothing where that is done already."""
    for model, labelled in models.items():
        if LABELS not in model.__dict__:
            model.__dict__[LABELS] = labelled
            model.register_forward_pre_hook(show_labels, with_kwargs=True)
            model.register_forward_hook(hide_labels, always_call=True)


def is_a(module: nn.Module, mixin: type[nn.Module]) -> bool:
    """Whether a module has this mixin, or what it was before the package was imported anew."""
    return any(same_function(base, mixin) for base in type(module).__mro__)


def remove_hooks(module: nn.Module) -> None:
    """Undo `add_hooks` and `add_label_hooks` on one module."""
    if SCOPE in module.__dict__ and is_a(module, ChronoOwner) and _NATIVE in type(module).__dict__:
        module.__class__ = getattr(type(module), _NATIVE)
        _rebind_hooked_forward(module)
    # Where FSDP has mixed its class into an owner's, the class stays: without a scope its forward is the native one.
    module.__dict__.pop(SCOPE, None)
    module.__dict__.pop(DECODER, None)
    module.__dict__.pop(LABELS, None)
    for registry in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, value in registry.items() if any(same_function(value, ours) for ours in _HOOKS)]:
            del registry[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
