"""``model.save_pretrained`` writes our state beside the weights, also without a Trainer."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from chronomoe_hf.wrapping.owner import find_system

SAVE_HOOK = "save_pretrained"
_saved: set[int] = set()  # systems whose state has been written already by whoever calls save_pretrained now


@contextlib.contextmanager
def state_saved(system: object) -> Iterator[None]:
    """Inside, ``save_pretrained`` writes weights only: the caller has written the system's state."""
    _saved.add(id(system))
    try:
        yield
    finally:
        _saved.discard(id(system))


def same_function(found: Any, ours: Any) -> bool:
    """Whether `found` is `ours`, or what it was before the package was imported anew (a notebook does that)."""
    return found is ours or _full_name(found) == _full_name(ours)


def _full_name(function: Any) -> tuple[Any, Any]:
    return getattr(function, "__module__", None), getattr(function, "__qualname__", None)


def bind_save(model: nn.Module, function: Callable[..., Any]) -> None:
    """Make `function` the model's ``save_pretrained``; bound on the instance, so a deep copy binds its own."""
    if hasattr(type(model), SAVE_HOOK) and SAVE_HOOK not in model.__dict__:
        model.__dict__[SAVE_HOOK] = types.MethodType(function, model)


def unbind_save(model: nn.Module, function: Callable[..., Any]) -> None:
    """Undo :func:`bind_save`."""
    hook = model.__dict__.get(SAVE_HOOK)
    if isinstance(hook, types.MethodType) and same_function(hook.__func__, function):
        del model.__dict__[SAVE_HOOK]


def save_pretrained(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    """The model's own ``save_pretrained``, with our state in a folder ``chronomoe`` beside the weights."""
    result = getattr(type(self), SAVE_HOOK)(self, save_directory, *args, **kwargs)
    system = find_system(self)
    if system is not None and system.config.checkpoint.save and kwargs.get("is_main_process", True):
        if id(system) not in _saved:
            system.save(save_directory)
        system.store.weights_written(save_directory, system.governed)
    return result
