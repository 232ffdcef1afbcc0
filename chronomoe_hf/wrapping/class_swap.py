"""Putting the wrapped classes on a model's routers and experts, and taking them off again.

Swapping the class of an instance keeps its parameters, hooks, state_dict keys and place in the model as they are.
"""

from __future__ import annotations

import types

from torch import nn

from chronomoe_hf.errors import WrapError
from chronomoe_hf.patches import chrono_class
from chronomoe_hf.recording.experts import chrono_experts_class
from chronomoe_hf.recording.scope import close_scope, open_scope
from chronomoe_hf.router.state import HANDLE
from chronomoe_hf.wrapping.layer import Layer


def swap(layer: Layer) -> None:
    """Give the layer's router, and its experts where they are read, their wrapped classes."""
    swaps = [(layer.router, chrono_class(layer.adapter, type(layer.router)))]
    if layer.experts is not None:
        chrono = chrono_experts_class(layer.adapter.experts_call, type(layer.experts))
        assert chrono is not None, "experts without a reader are dropped when the layer is made"
        swaps.append((layer.experts, chrono))
    for module, chrono in swaps:
        module.__class__ = chrono
        module.__dict__[HANDLE] = layer.handle
        _rebind_hooked_forward(module)


def check_swappable(name: str, module: nn.Module) -> None:
    """Raise WrapError where a swapped class would be bypassed or would break the module."""
    check_not_sharded(name, module, "call chronomoe_hf.wrap(model) before accelerator.prepare")
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
        raise WrapError(
            f"{name}: something replaced forward on this instance, which would bypass the wrapped router; "
            "wrap the model before tensor or expert parallelism is applied"
        )


def check_not_sharded(name: str, module: nn.Module, way_out: str) -> None:
    """Raise WrapError, with the way out, for a module that FSDP has sharded by itself."""
    # fully_shard mixes its own class into the module's; swapping that class would take the sharding logic out.
    if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
        raise WrapError(f"{name}: {type(module).__name__} is sharded by FSDP; {way_out}")


def _rebind_hooked_forward(module: nn.Module) -> None:
    # accelerate's hooks put a forward on the instance that calls `_old_forward`, bound to the class of that time.
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)


def restore(module: nn.Module) -> None:
    """Give a wrapped module its native class again."""
    chrono = type(module)
    module.__class__ = next(cls for cls in chrono.__mro__ if cls.__module__ != chrono.__module__ and not _is_mixin(cls))
    del module.__dict__[HANDLE]
    _rebind_hooked_forward(module)


def _is_mixin(cls: type) -> bool:
    return cls.__module__.startswith("chronomoe_hf.")


def remove_hooks(module: nn.Module) -> None:
    """Remove the hooks of a recording window."""
    for registry, hook in ((module._forward_pre_hooks, open_scope), (module._forward_hooks, close_scope)):
        for key in [key for key, value in registry.items() if value is hook]:
            del registry[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
