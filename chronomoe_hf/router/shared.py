"""What a router points to is copied with the whole model, and shared when only a part of the model is copied."""

from __future__ import annotations

import copy
import weakref
from typing import Any, Self

from torch import nn


class SharedInParts:
    """Base of what wrapped modules point to.

    A library that deep-copies a wrapped *part* of a model (PEFT's ``modules_to_save``) runs the copy in the place of
    the original, so the copy must be recorded and governed as that one. A deep copy of the *whole* model is another
    model and gets its own.
    """

    root: weakref.ReferenceType[nn.Module] | None = None
    """The model that owns the system; None = always copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        root = None if self.root is None else self.root()
        if root is not None and id(root) not in memo:
            return self
        twin = memo[id(self)] = type(self).__new__(type(self))
        for name, value in self.__getstate__().items():
            setattr(twin, name, copy.deepcopy(value, memo))
        twin.root = None if root is None else weakref.ref(memo[id(root)])
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "root"}  # its layer sets it again
