"""The guard: a fault of our own in a forward turns recording off, and the model goes on.

What the model itself raises passes through untouched: the guard stands only around what is added to a forward. In a
compiled graph there is no guard: a fault shows while it is traced.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch

logger = logging.getLogger("chronomoe_hf")

Part = Literal["routing", "outputs"]
"""What is off after a fault: everything of a layer, or only what is read of its experts' outputs."""


class Faults:
    """What has failed so far, shared by all layers of a model: only the first fault is told as a warning.

    Attributes:
        first: the first fault, in words; None = there was none.
    """

    def __init__(self) -> None:
        self.first: str | None = None

    def tell(self, where: str, part: Part, error: Exception) -> str:
        """Log a fault and return it in words."""
        what = "its routing is not recorded any more" if part == "routing" else "its experts' outputs are not read"
        words = f"{what}, since chronomoe_hf failed in a forward: {type(error).__name__}: {_first_line(error)}"
        level = logging.INFO if self.first is not None else logging.WARNING
        logger.log(
            level,
            "%s: %s. The model is not affected and training goes on; please report this",
            where,
            words,
            exc_info=error if self.first is None else None,
        )
        self.first = self.first or words
        return words


def guarded(failed: Callable[[Exception], None], part: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a part of ours; where it fails, `failed` gets the error and None is returned."""
    if torch.compiler.is_compiling():
        return part(*args, **kwargs)
    try:
        return part(*args, **kwargs)
    except Exception as error:
        failed(error)
        return None


def _first_line(error: Exception) -> str:
    text = str(error)
    return text.splitlines()[0][:300] if text else "no message"
