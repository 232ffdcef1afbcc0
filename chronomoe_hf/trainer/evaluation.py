"""Which forwards of an evaluation are the policy's own: those of its reference, of KL terms and of generation are not.

In training those passes run without gradient and are left out by that. In an evaluation nothing has a gradient, so
they have to be told apart by what Trainer and TRL do around them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from chronomoe_hf.recording.scope import SCOPE
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.trainer.hooks import Replaced


class PolicyPasses:
    """Switches the recording of an evaluation off around every pass that is not the policy's.

    Left out: ``model.generate``; whatever runs inside ``trainer._prepare_inputs`` (TRL's online trainers generate and
    score there); passes with the adapters disabled or with another adapter than the one in training (the reference
    of DPO, KTO, GRPO and RLOO under PEFT); the pass on the mismatched completions of KTO (``KL_input_ids``).
    """

    def __init__(self, trainer: Trainer, system: ChronoSystem) -> None:
        self.trainer = trainer
        self.switches = system.switches
        self.owners = [module for module in system.model.modules() if SCOPE in module.__dict__]
        self.replaced = Replaced()
        self.handles: list[Any] = []
        self.mismatched: list[Tensor] = []
        self._depth = 0
        self._other_adapter_on = False
        model = trainer.model
        self.adapter = getattr(model, "active_adapter", None)
        self.replaced.replace(trainer, "_prepare_inputs", self._prepare_inputs, "generation there counts as evaluation")
        self.replaced.replace(model, "generate", self._apart)
        if isinstance(self.adapter, str) and hasattr(model, "disable_adapter"):  # a PeftModel
            self.replaced.replace(model, "disable_adapter", self._adapters_off)
            self.replaced.replace(model, "set_adapter", self._other_adapter)

    def close(self) -> None:
        """Put everything back."""
        self.replaced.remove()
        for handle in self.handles:
            handle.remove()

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Forwards in here are not the policy's."""
        self._depth += 1
        self._aim()
        try:
            yield
        finally:
            self._depth -= 1
            self._aim()

    def _aim(self, mismatched: bool = False) -> None:
        self.switches.evaluation = not (self._depth or self._other_adapter_on or mismatched)

    def _apart(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(*args: Any, **kwargs: Any) -> Any:
            with self.apart():
                return original(*args, **kwargs)

        return generate

    def _prepare_inputs(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
            with self.apart():
                inputs = original(*args, **kwargs)
            self.mismatched = []
            if isinstance(inputs, dict):
                self.mismatched = [inputs[name] for name in ("KL_input_ids",) if isinstance(inputs.get(name), Tensor)]
            if not self.mismatched and getattr(self.trainer, "calculate_KL", False) and isinstance(inputs, dict):
                _tell_once(
                    f"{type(self.trainer).__name__} measures a KL, but its batches have no KL_input_ids: its pass on "
                    "mismatched completions counts as evaluation"
                )
            if self.mismatched and not self.handles:
                # Before our own pre-hook, which asks the switch.
                self.handles = [
                    owner.register_forward_pre_hook(self._leave_mismatched_out, prepend=True, with_kwargs=True)
                    for owner in self.owners
                ]
            return inputs

        return prepare_inputs

    def _leave_mismatched_out(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.replaced.active:
            given = [*args[:1], kwargs.get("input_ids")]
            self._aim(any(value is ids for value in given for ids in self.mismatched))

    def _adapters_off(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @contextlib.contextmanager
        def disable_adapter(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with self.apart(), original(*args, **kwargs) as value:
                yield value

        return disable_adapter

    def _other_adapter(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def set_adapter(name: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(name, *args, **kwargs)
            self._other_adapter_on = name != self.adapter
            self._aim()
            return result

        return set_adapter


@functools.cache
def _tell_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def evaluate_apart(trainer: Trainer, system: ChronoSystem, prefix: str, loop: Callable[[], Any]) -> Any:
    """Run an evaluation loop; its forwards are recorded apart, and its metrics gain ``<prefix>_moe/...``.

    Args:
        trainer: whose loop it is.
        system: of its model.
        prefix: of the metrics.
        loop: returns an EvalLoopOutput.
    """
    with recording_policy(trainer, system):
        output = loop()
    snapshot = system.take_evaluation(prefix)
    if snapshot is not None and output.metrics is not None:
        scalars = snapshot.scalars(prefix=f"{prefix}_moe/")
        output.metrics.update({key: value for key, value in scalars.items() if math.isfinite(value)})
    return output


@contextlib.contextmanager
def recording_policy(trainer: Trainer, system: ChronoSystem) -> Iterator[None]:
    """Record the evaluation forwards of the policy, and no others, into the system's evaluation statistics."""
    with system.recording_eval():
        passes = PolicyPasses(trainer, system)
        try:
            yield
        finally:
            passes.close()
