"""The wrapped router: its slow state, the laws that move beta, and the forward."""

import importlib
from typing import TYPE_CHECKING, Any

from chronomoe_hf.router.forward import ChronoRouter
from chronomoe_hf.router.state import RouterState

if TYPE_CHECKING:
    from chronomoe_hf.original import compute_relevance as compute_relevance
    from chronomoe_hf.original import update_beta as update_beta

__all__ = ["ChronoRouter", "RouterState"]

# The originals' functions on one router stay importable from here; they lie in a room to the right.
_HOME_OF = dict.fromkeys(("compute_relevance", "update_beta"), "chronomoe_hf.original")

# A type checker reads the imports above; it would take any name for granted if it saw this function.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _HOME_OF:
            return getattr(importlib.import_module(_HOME_OF[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
