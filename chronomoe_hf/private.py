"""Names of torch and Transformers that are not public: asked for once, each with what happens without it.

Nothing here raises when a name is gone. `absent` says what is missing, and ``wrap`` tells the user once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

# Name -> what is lost without it.
USED = {
    "torch._C._current_graph_task_id": (
        "a forward that activation checkpointing runs again is not told from a first one: where a whole model is "
        "checkpointed from outside, it is counted twice"
    ),
    "torch._C._functorch.maybe_current_level": "forwards inside torch.func transforms cannot be left out; avoid them",
    "transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS": (
        "expert outputs are read by sending a few tokens through the experts again"
    ),
    "transformers.integrations.moe.ExpertsInterface": (
        "expert outputs are read by sending a few tokens through the experts again"
    ),
}


def find(path: str) -> Any:
    """What is at a dotted path, None where that is nothing."""
    module, _, name = path.rpartition(".")
    try:
        found: Any = importlib.import_module(module)
    except ImportError:  # not a module (torch._C._functorch is an attribute), or one that is gone
        found = find(module) if "." in module else None
    return getattr(found, name, None)


def absent(used: dict[str, str] = USED) -> dict[str, str]:
    """Which of the names are not there, and what is lost."""
    return {path: lost for path, lost in used.items() if find(path) is None}


_task: Callable[[], int] | None = find("torch._C._current_graph_task_id")
_level: Callable[[], Any] | None = find("torch._C._functorch.maybe_current_level")
EXPERTS_TABLE: Any = find("transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS")
EXPERTS_INTERFACE: type | None = find("transformers.integrations.moe.ExpertsInterface")


def in_backward() -> bool:
    """Whether autograd runs backward now, in which activation checkpointing runs forwards again; False if unknown."""
    return _task is not None and _task() != -1


def in_transform() -> bool:
    """Whether torch.func.grad or its like runs now, whose tensors may not be added to ours; False if unknown."""
    return _level is not None and _level() is not None
