"""attach and detach: one line before ``trainer.train()``, and the way back."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from chronomoe_hf.api import wrap
from chronomoe_hf.config import ChronoConfig, PresetName, as_config
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.trainer.callback import ChronoCallback
from chronomoe_hf.trainer.hooks import refuse_data_parallel
from chronomoe_hf.trainer.lines import say_attached


def attach(trainer: Trainer, config: ChronoConfig | PresetName | None = None) -> ChronoCallback:
    """Watch (and, by config, govern) the routing of a Trainer's model: the one line before ``trainer.train()``.

    Wraps ``trainer.model`` if needed, puts the callback first so that every reporter sees its scalars, and records
    evaluation apart from training (``eval_moe/...``). A Trainer that makes its model anew (``model_init``,
    ``hyperparameter_search``) gets each new model wrapped with the same settings.

    Args:
        trainer: a Transformers Trainer or a subclass (TRL, Seq2SeqTrainer), before ``train()``.
        config: settings, or the name of a preset (``"observe"``); None = those the model was wrapped
            with, else the protect preset.

    Returns:
        The callback; ``callback.system`` is the ChronoSystem. A second call returns the first's callback.

    Raises:
        ConfigError: `trainer` is no Trainer, or it would run nn.DataParallel, whose replicas lose what is recorded, or
            its settings and those of replay cannot be had together.
        WrapError: the model cannot be wrapped, see ``wrap``.
    """
    check_trainer(trainer, "attach")
    config = as_config(config)
    callback = _callback_of(trainer)
    if callback is not None and callback.gives_way and config is not None:
        callback.detach()
        callback = _callback_of(trainer)
    if callback is not None and callback.attached and callback.hooks is not None:
        if trainer.model is not None:
            wrap(trainer.model, config)
            callback.bind(trainer.model)
        return callback
    refuse_data_parallel(trainer)
    callback = ChronoCallback(config) if callback is None else callback
    callback.config = config or callback.config
    if trainer.model is not None:  # after a hyperparameter search there is none until the next train()
        callback.bind(trainer.model)
    callback.hook(trainer)
    try:
        callback.hook_replay()
    except ConfigError:
        detach(trainer)
        raise
    if callback.system is not None:
        say_attached(trainer, callback.system)
    return callback


def detach(trainer: Trainer) -> None:
    """Undo :func:`attach`: the callback and every replaced method come off, and what ``attach`` wrapped is unwrapped.

    A model that you wrapped yourself stays wrapped. ``unwrap(model)`` and ``trainer.remove_callback`` of our callback
    do the same. A Trainer without our callback is left as it is.

    Args:
        trainer: as given to ``attach``.

    Raises:
        ConfigError: `trainer` is no Trainer.
    """
    check_trainer(trainer, "detach")
    while (callback := _callback_of(trainer)) is not None:
        callback.detach()
        trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if c is not callback]


def check_trainer(trainer: Any, verb: str) -> None:
    """Raise ConfigError unless `trainer` is a Transformers Trainer."""
    if isinstance(trainer, Trainer):
        return
    way_out = (
        "for a model without a Trainer, call chronomoe_hf.wrap(model) and system_of(model).step(n) after each "
        "optimizer step (unwrap(model) takes it off)"
        if isinstance(trainer, nn.Module)
        else "give a transformers.Trainer or a subclass of it"
    )
    raise ConfigError(f"{verb}() takes a Trainer and got a {type(trainer).__name__}; {way_out}")


def _callback_of(trainer: Trainer) -> ChronoCallback | None:
    return next((c for c in trainer.callback_handler.callbacks if isinstance(c, ChronoCallback)), None)
