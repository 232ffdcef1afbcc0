"""Trainer glue. The callback forwards to the system; no arithmetic lives here."""

from __future__ import annotations

import logging
import math
import types
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from chronomoe_hf.api import system_of, wrap
from chronomoe_hf.checkpoint.state_file import has_state
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.errors import ChronoError, ConfigError, TelemetryError
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.telemetry import SystemSnapshot
from chronomoe_hf.trainer.resume import ResumePath, hook_trainer, restore
from chronomoe_hf.trainer.weight_repair import check_weights

logger = logging.getLogger("chronomoe_hf")


class ChronoCallback(TrainerCallback):
    """Folds at every optimizer step, writes telemetry, and adds ``moe/...`` scalars to the logs.

    Prefer :func:`attach`, which also makes the scalars reach TensorBoard, W&B and trackio. Without a Trainer, call
    ``system_of(model).step(global_step)`` after each optimizer step yourself.

    Args:
        config: settings for a model that is not wrapped yet; None = the default preset.
    """

    def __init__(self, config: ChronoConfig | None = None) -> None:
        self.config = config
        self.system: ChronoSystem | None = None
        self.attached = False
        self.resume_path = ResumePath()
        self._unlogged: SystemSnapshot | None = None
        self._unfit: set[int] = set()  # layers already named

    def bind(self, model: nn.Module) -> ChronoSystem:
        """Wrap `model` if needed and remember its system."""
        self.system = system_of(wrap(model, self.config))
        return self.system

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Wrap before the engine prepares the model."""
        if kwargs.get("model") is not None:
            self.bind(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the record files and drop leftovers of earlier forwards."""
        system = self.system or self.bind(kwargs["model"])
        if not self.attached:
            warnings.warn(
                "ChronoCallback was passed as callbacks=[...]: TensorBoard, W&B and trackio run before it and will not "
                "see moe/... numbers; use chronomoe_hf.attach(trainer) instead",
                stacklevel=2,
            )
            self.attached = True  # say it once
        system.begin()
        resumed = state.global_step > 0
        directory = self.resume_path.at(args.output_dir, state.global_step)
        saved = restore(system, directory, state.global_step) if resumed else None
        output_dir = Path(system.config.telemetry.output_dir or args.output_dir)
        try:
            system.open_telemetry(output_dir, resume_step=state.global_step if resumed else None)
        except TelemetryError as error:
            # Training must not die for its telemetry; statistics and scalars go on.
            logger.error("%s; training goes on without record files", error)
        if resumed:  # after the records are open, so that a mismatch is among them
            check_weights(system, kwargs["model"], directory, saved, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Fold the step. Collective: runs on every rank."""
        system = self._system()
        snapshot = system.step(state.global_step)
        if snapshot is None and state.global_step >= state.max_steps:
            snapshot = system.close_window()
        if snapshot is not None:
            self._unlogged = snapshot
            self._announce(snapshot)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the scalars of the last closed window to a training log entry (once per window)."""
        logs: dict[str, Any] | None = kwargs.get("logs")
        system = self._system()
        if logs is None or "loss" not in logs or self._unlogged is None or not system.config.telemetry.scalars:
            return
        scalars = self._unlogged.scalars()
        if system.config.telemetry.per_layer_scalars:
            scalars |= self._unlogged.layer_scalars()
        self._unlogged = None
        logs.update(scalars)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(scalars)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the last, shorter window and the record files; follow Trainer to the best checkpoint."""
        system = self._system()
        system.close_window()
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None:
            manifest = system.load(best)
            saved = None if manifest is None else manifest.get("fingerprint")
            check_weights(system, kwargs["model"], Path(best), saved, state.global_step)
        system.close_telemetry()
        system.require_saved()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Fallback for a callback that was not attached: Trainer has written its checkpoint, ours goes beside it."""
        system = self._system()
        directory = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if system.config.checkpoint.save and args.should_save and directory.is_dir() and not has_state(directory):
            system.save(directory)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Hub push uploads output_dir without the checkpoints, so the state must lie there too."""
        system = self._system()
        if system.config.checkpoint.save and state.is_world_process_zero and args.output_dir is not None:
            system.save(args.output_dir)

    def _system(self) -> ChronoSystem:
        if self.system is None:
            raise ChronoError("ChronoCallback has no model yet; pass it to a Trainer or call bind(model)")
        return self.system

    def _announce(self, snapshot: SystemSnapshot) -> None:
        for alert in snapshot.alerts:
            log = logger.warning if alert.state == "raised" else logger.info
            log("step %d: %s", snapshot.step, alert)
        system = self._system()
        unfit = {d.layer_id for d in system.decisions if d.abstain_reason == "lens_unfit"} - self._unfit
        if unfit:
            self._unfit |= unfit
            logger.warning(
                "step %d: layers %s call for support, but a lens would scatter their tokens (spread above "
                "lens_spread_max = %g), so they are only watched; ChronoConfig.balance() needs no lens",
                snapshot.step,
                ", ".join(map(str, sorted(unfit))),
                system.config.control.lens_spread_max,
            )


def attach(trainer: Trainer, config: ChronoConfig | None = None) -> ChronoCallback:
    """Watch (and, by config, govern) the routing of a Trainer's model: the one line before ``trainer.train()``.

    Wraps ``trainer.model`` if needed, puts the callback first so that every reporter sees its scalars, and records
    evaluation apart from training (``eval_moe/...``).

    Args:
        trainer: a Transformers Trainer or a subclass (TRL, Seq2SeqTrainer), before ``train()``.
        config: settings; None = those the model was wrapped with, else the protect preset.

    Returns:
        The callback; ``callback.system`` is the ChronoSystem. A second call returns the first's callback.

    Raises:
        ConfigError: the trainer would run nn.DataParallel, whose replicas lose what the forward records.
        WrapError: the model cannot be wrapped, see ``wrap``.
    """
    for existing in trainer.callback_handler.callbacks:
        if isinstance(existing, ChronoCallback) and existing.attached:
            wrap(trainer.model, config)
            return existing
    if trainer.args.n_gpu > 1:
        raise ConfigError(
            f"this Trainer would use nn.DataParallel on {trainer.args.n_gpu} GPUs, which throws away what the forward "
            "records; start it with torchrun or accelerate launch (DDP), or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    callback = next((c for c in trainer.callback_handler.callbacks if isinstance(c, ChronoCallback)), None)
    if callback is None:
        callback = ChronoCallback(config)
    else:
        trainer.callback_handler.callbacks.remove(callback)
        callback.config = config or callback.config
    callback.bind(trainer.model)
    callback.attached = True
    trainer.callback_handler.callbacks.insert(0, callback)
    _record_evaluation(trainer, callback)
    callback.resume_path = hook_trainer(trainer, callback.bind(trainer.model))
    return callback


def _record_evaluation(trainer: Trainer, callback: ChronoCallback) -> None:
    """Wrap ``trainer.evaluation_loop`` on the instance: its forwards are recorded apart, its metrics gain ours."""
    original = trainer.evaluation_loop

    def evaluation_loop(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        system = callback.system
        if system is None or not system.config.telemetry.evaluation:
            return original(*args, **kwargs)
        with system.recording_eval():
            output = original(*args, **kwargs)
        snapshot = system.take_evaluation()
        if snapshot is not None and output.metrics is not None:
            scalars = snapshot.scalars(prefix="eval_moe/")
            output.metrics.update({key: value for key, value in scalars.items() if math.isfinite(value)})
        return output

    trainer.evaluation_loop = types.MethodType(evaluation_loop, trainer)  # type: ignore[method-assign]
