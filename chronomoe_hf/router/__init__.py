"""The wrapped router: its slow state, the laws that move beta, and the forward."""

import importlib
from typing import Any

from chronomoe_hf.router.forward import ChronoRouter
from chronomoe_hf.router.state import RouterState

__all__ = ["ChronoRouter", "RouterState"]


def __getattr__(name: str) -> Any:
    """The originals' functions on one router stay importable from here; they lie in a room to the right."""
    if name in ("compute_relevance", "update_beta"):
        return getattr(importlib.import_module("chronomoe_hf.original"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
