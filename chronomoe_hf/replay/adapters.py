"""Whether the adapters of a model are those in training: a reference pass under PEFT has them off, or has others on."""

from __future__ import annotations

from typing import Any

from torch import nn


class AdapterWatch:
    """Looks at one of PEFT's layers, which all stand the same way.

    Args:
        root: the model that holds them, if there are any.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._layer: Any = None
        self._trained: tuple[str, ...] | None = None

    def _found(self) -> Any:
        if self._layer is None:
            modules = self.root.modules()
            self._layer = next((m for m in modules if hasattr(m, "disable_adapters") and _active(m) is not None), None)
        return self._layer

    def training(self) -> None:
        """A pass with gradient runs: its adapters are those in training."""
        layer = self._found()
        if layer is not None and not layer.disable_adapters:
            self._trained = _active(layer)

    @property
    def elsewhere(self) -> bool:
        """Whether the running pass is of another policy: the adapters are off, or others are on."""
        layer = self._found()
        if layer is None:
            return False
        if layer.disable_adapters:
            return True
        if self._trained is None:
            self._trained = _active(layer)
        return _active(layer) != self._trained


def _active(layer: Any) -> tuple[str, ...] | None:
    active = getattr(layer, "active_adapters", None)
    return tuple(active) if isinstance(active, list | tuple) else None
