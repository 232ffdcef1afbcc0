"""Which model a callback watches, and what it does to that model on the way in and out."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

from torch import nn

from chronomoe_hf.api import system_of, unwrap, wrap
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.errors import WrapError
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.wrapping.owner import find_system

logger = logging.getLogger("chronomoe_hf")


class Binding:
    """The model that a callback watches, from :meth:`bind` to :meth:`release`.

    Several trainers may watch one model; the last that lets go unwraps it, if one of them wrapped it.

    Args:
        left: called after someone else has unwrapped the model; held weakly.

    Attributes:
        system: of the model; None while there is none.
    """

    def __init__(self, left: Callable[[], None]) -> None:
        self.system: ChronoSystem | None = None
        self._model: nn.Module | None = None
        self._wrapped_here = False
        # The model must not keep an old Trainer alive through its callback.
        self._left = weakref.WeakMethod(left)

    def bind(self, model: nn.Module, config: ChronoConfig | None) -> ChronoSystem:
        """Watch `model`, wrapped if it is not, and let go of the one before.

        Raises:
            WrapError: it cannot be wrapped, or is wrapped with another config.
        """
        if self.system is not None and find_system(model) is self.system:
            wrap(model, config)
            self._model = model
            return self.system
        self.release()
        new = find_system(model) is None
        self.system = system_of(wrap(model, config))
        self._model = model
        self._wrapped_here = new or any(other._wrapped_here for other in self._others(self.system))
        self.system.on_unwrap.append(self.unwrapped)
        return self.system

    def release(self) -> None:
        """Let go of the model: what was wrapped for a Trainer is unwrapped, what came wrapped stays wrapped."""
        system, model, self.system, self._model = self.system, self._model, None, None
        if system is None or model is None:
            return
        if self.unwrapped in system.on_unwrap:
            system.on_unwrap.remove(self.unwrapped)
        system.close_telemetry()
        if self._wrapped_here and find_system(model) is system and not self._others(system):
            try:
                unwrap(model)
            except WrapError as error:
                logger.warning("the model stays wrapped: %s", error)

    def unwrapped(self) -> None:
        """The model has been unwrapped by someone else."""
        self.system = self._model = None
        left = self._left()
        if left is not None:
            left()

    def _others(self, system: ChronoSystem) -> list[Binding]:
        bindings = [getattr(each, "__self__", None) for each in system.on_unwrap]
        return [b for b in bindings if isinstance(b, Binding) and b is not self and b._left() is not None]
