"""Every method that is replaced on a Trainer and on what it holds, in one place; ``remove`` puts the originals back."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, Protocol

from torch import nn
from transformers import Trainer

from chronomoe_hf.errors import ConfigError

_MISSING = object()


class Hooked(Protocol):
    """What the replaced methods of a Trainer call: the ChronoCallback."""

    def saving(self, directory: Any, should_save: bool) -> AbstractContextManager[None]:
        """Around ``save_model``."""

    def training(self, resume_from: Any, output_dir: str | None) -> AbstractContextManager[None]:
        """Around ``train``."""

    def evaluating(self, prefix: str, loop: Callable[[], Any]) -> Any:
        """Runs an evaluation loop and returns its output."""

    def model_card_written(self, directory: str) -> None:
        """After ``create_model_card``."""

    def bind(self, model: nn.Module) -> Any:
        """Takes over a model that was rebuilt."""

    def release(self) -> None:
        """Lets go of the model before the next one is made."""

    def detach(self) -> None:
        """Takes everything off."""


class Replaced:
    """Methods replaced on instances; the classes are never touched.

    ``replace`` may be called while another library has replaced the same method before or will do so later: the wrapped
    method is called, and later wrappers are kept. A replacement that cannot be taken off any more passes its calls on.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any, Any]] = []
        self.active = True

    def replace(
        self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]], lost: str = ""
    ) -> None:
        """Put ``make(original)`` in the place of ``owner.name``; an owner without that method is left alone.

        Args:
            owner: the object.
            name: of its method.
            make: what takes the original's place.
            lost: what does not happen where the method is missing, for a warning; empty where that is no fault.
        """
        original = getattr(owner, name, None)
        if original is None:
            if lost:
                warnings.warn(f"{type(owner).__name__} has no {name} any more: {lost}", stacklevel=2)
            return
        ours = make(original)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return ours(*args, **kwargs) if self.active else original(*args, **kwargs)

        self._undo.append((owner, name, call, vars(owner).get(name, _MISSING)))
        # Not setattr: a torch module would look for a parameter of that name first.
        vars(owner)[name] = call

    def has(self, owner: Any, name: str) -> bool:
        """Whether a method of `owner` is replaced by this."""
        return any(one is owner and method == name for one, method, _, _ in self._undo)

    def remove(self) -> None:
        """Put the originals back, the last replacement first."""
        self.active = False
        for owner, name, call, before in reversed(self._undo):
            if vars(owner).get(name) is not call:
                continue  # replaced again since then, by someone who calls ours
            if before is _MISSING:
                del vars(owner)[name]
            else:
                vars(owner)[name] = before
        self._undo.clear()


def argument(
    method: str, original: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The value that `original`, Trainer's `method` or what stands for it, gets for `name`; None if it gets none."""
    if name in kwargs:
        return kwargs[name]
    names = list(inspect.signature(original).parameters)
    if name not in names:  # a subclass that takes *args passes them on to Trainer's own method
        names = list(inspect.signature(getattr(Trainer, method)).parameters)[1:]
    if name in names and names.index(name) < len(args):
        return args[names.index(name)]
    return None


class TrainerHooks:
    """What ``attach`` replaces on one Trainer.

    ========================  =======================================================================
    method                    why
    ========================  =======================================================================
    ``save_model``            our state beside every set of weights
    ``train``                 what is resumed from, a new run id, and tidying up when it raises
    ``create_model_card``     the card gets a section about the routing
    ``call_model_init``       a rebuilt model is wrapped before the engine prepares it
    ``evaluation_loop``       evaluation is recorded apart, under its own prefix
    printing callbacks'       they show three of our scalars; trackers get all (``printed``)
    ``on_log``,
    ``on_evaluate``
    callback handler's        ``trainer.remove_callback(callback)`` detaches
    ``remove_callback``,
    ``pop_callback``
    ========================  =======================================================================

    Args:
        trainer: the Trainer; held until :meth:`remove`.
        callback: what the methods call.
    """

    def __init__(self, trainer: Trainer, callback: Hooked) -> None:
        self.trainer = trainer
        self.callback = callback
        self.replaced = Replaced()
        self.replaced.replace(trainer, "save_model", self._save_model, "no chronomoe state is written with weights")
        self.replaced.replace(trainer, "train", self._train, "no state is restored on a resume")
        self.replaced.replace(trainer, "create_model_card", self._create_model_card)
        self.replaced.replace(trainer, "call_model_init", self._call_model_init, "rebuilt models are not wrapped")
        self.replaced.replace(trainer, "evaluation_loop", self._evaluation_loop, "evaluation is not recorded")
        for name in ("remove_callback", "pop_callback"):
            self.replaced.replace(trainer.callback_handler, name, self._callback_removed)

    def remove(self) -> None:
        """Take every replaced method off again."""
        self.replaced.remove()

    def _save_model(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def save_model(*args: Any, **kwargs: Any) -> Any:
            given = argument("save_model", original, "output_dir", args, kwargs)
            directory = self.trainer.args.output_dir if given is None else given
            with self.callback.saving(directory, self.trainer.args.should_save):
                return original(*args, **kwargs)

        return save_model

    def _train(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def train(*args: Any, **kwargs: Any) -> Any:
            given = argument("train", original, "resume_from_checkpoint", args, kwargs)
            with self.callback.training(given, self.trainer.args.output_dir):
                return original(*args, **kwargs)

        return train

    def _create_model_card(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def create_model_card(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self.trainer.is_world_process_zero():
                self.callback.model_card_written(self.trainer.args.output_dir)
            return result

        return create_model_card

    def _call_model_init(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call_model_init(*args: Any, **kwargs: Any) -> Any:
            self.callback.release()  # before the new model is made: two would not fit where one just fits
            model = original(*args, **kwargs)
            self.callback.bind(model)
            return model

        return call_model_init

    def _evaluation_loop(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
            prefix = argument("evaluation_loop", original, "metric_key_prefix", args, kwargs)
            return self.callback.evaluating(prefix or "eval", lambda: original(*args, **kwargs))

        return evaluation_loop

    def _callback_removed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def removed(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if not any(known is self.callback for known in self.trainer.callback_handler.callbacks):
                self.callback.detach()
            return result

        return removed


def plain_engine(trainer: Trainer | None) -> bool:
    """Whether every process holds the whole model: no engine, or DDP."""
    engine = _engine_of(trainer)
    return engine == "no" or engine.startswith("multi_")


def _engine_of(trainer: Trainer | None) -> str:
    return "no" if trainer is None else str(trainer.accelerator.distributed_type.value).lower()


def require_plain_engine(trainer: Trainer | None) -> None:
    """Raise ConfigError under an engine that shards weights or optimizer state: no expert can be copied there."""
    if plain_engine(trainer):
        return
    engine = _engine_of(trainer)
    raise ConfigError(
        f"lifecycle__revive__at='start' rewrites experts in place, but under {engine} weights or optimizer state are "
        "sharded over the ranks. Split first, in one process: wrap(model, ChronoConfig.revive()), "
        "lifecycle.apply(model, lifecycle.plan_split(model, batches)), save_pretrained, and train from that checkpoint "
        "with ChronoConfig.balance()"
    )


def refuse_data_parallel(trainer: Trainer) -> None:
    """Raise ConfigError for a Trainer that would run nn.DataParallel, whose replicas lose what a forward records."""
    if trainer.args.n_gpu > 1:
        raise ConfigError(
            f"this Trainer would use nn.DataParallel on {trainer.args.n_gpu} GPUs, which throws away what the forward "
            "records; start it with torchrun or accelerate launch (DDP), or set CUDA_VISIBLE_DEVICES to one GPU"
        )


def calling_trainer(callback: object) -> Trainer | None:
    """The Trainer whose event `callback` is handling, or None.

    Transformers hands callbacks no Trainer: neither the arguments of an event nor the handler that calls, which holds
    model, optimizer and loaders, name it. The one that called is on the call stack, with the callback in its list.
    The other way would be to replace ``Trainer.__init__`` for every Trainer of the process; this only looks, at the two
    events where a run begins, and not at all where ``attach(trainer)`` was called.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and any(known is callback for known in owner.callback_handler.callbacks):
            return owner
        frame = frame.f_back
    return None
