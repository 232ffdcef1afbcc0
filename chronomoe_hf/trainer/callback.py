"""Trainer glue. The callback forwards to the system; no arithmetic lives here."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from chronomoe_hf.checkpoint.state_file import has_state
from chronomoe_hf.config import ChronoConfig, PresetName, as_config
from chronomoe_hf.errors import ChronoError, ConfigError, TelemetryError
from chronomoe_hf.in_run.baseline import set_baseline
from chronomoe_hf.in_run.dry_run import measure_dry_run
from chronomoe_hf.in_run.split_at_start import split_at_start
from chronomoe_hf.recording.scope import SCOPE
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.telemetry import SystemSnapshot
from chronomoe_hf.trainer.binding import Binding
from chronomoe_hf.trainer.evaluation import evaluate_apart
from chronomoe_hf.trainer.hooks import (
    TrainerHooks,
    calling_trainer,
    plain_engine,
    refuse_data_parallel,
    require_plain_engine,
)
from chronomoe_hf.trainer.lines import say_verdict
from chronomoe_hf.trainer.logs import WindowLog, logs_now, record_log
from chronomoe_hf.trainer.model_card import write_model_card
from chronomoe_hf.trainer.printed import keep_short
from chronomoe_hf.trainer.replay import ReplayHooks
from chronomoe_hf.trainer.resume_weights import ResumePath, check_weights, restore
from chronomoe_hf.wrapping.save_pretrained import state_saved

logger = logging.getLogger("chronomoe_hf")


class ChronoCallback(TrainerCallback):
    """Calls the system at every optimizer step, writes records, and adds ``moe/...`` scalars to the logs.

    ``Trainer(callbacks=[ChronoCallback(config)])`` does what ``attach`` does after it. It goes to the front of the
    Trainer's callbacks by itself, so that TensorBoard, W&B and trackio see its scalars. Without a Trainer, call
    ``system_of(model).step(global_step)`` after each optimizer step yourself.

    Args:
        config: settings for a model that is not wrapped yet, or the name of a preset; None = the default preset.

    Attributes:
        attached: it stands first among the Trainer's callbacks.
        gives_way: to a callback or a config that the script makes itself (what a launcher puts there).

    Raises:
        ConfigError: `config` is neither a ChronoConfig nor the name of a preset.
    """

    gives_way = False

    def __init__(self, config: ChronoConfig | PresetName | None = None) -> None:
        self.config = as_config(config)
        self.attached = False
        self.hooks: TrainerHooks | None = None
        self.resume_path = ResumePath()
        self._binding = Binding(self._left)
        self._replay: ReplayHooks | None = None
        self._new_run = True
        self._log = WindowLog()

    # ---- which model, which Trainer ------------------------------------------------------------------------------

    @property
    def system(self) -> ChronoSystem | None:
        """The ChronoSystem of the model that trains; None before there is one and after :meth:`detach`."""
        return self._binding.system

    def bind(self, model: nn.Module) -> ChronoSystem:
        """Make `model` the one that is watched: wrap it if needed, and let go of the one before.

        Raises:
            WrapError: it cannot be wrapped, or is wrapped with another config.
        """
        if self.system is not None and self.config is None:
            self.config = self.system.config  # the next model gets the same settings, also where they came with it
        return self._binding.bind(model, self.config)

    def release(self) -> None:
        """Let go of the model before the next one is made."""
        if self.system is not None and self.config is None:
            self.config = self.system.config
        self._binding.release()

    def hook(self, trainer: Trainer) -> None:
        """Replace the methods of `trainer` that have to know of us, once, and stand first among its callbacks."""
        refuse_data_parallel(trainer)
        if self.hooks is None or self.hooks.trainer is not trainer:
            if self.hooks is not None:
                self.hooks.remove()
            self.hooks = TrainerHooks(trainer, self)
        # First in the list: what reports after us sees our numbers. A new list: the old one may be gone through now.
        others = [callback for callback in trainer.callback_handler.callbacks if callback is not self]
        trainer.callback_handler.callbacks = [self, *others]
        keep_short(self.hooks.replaced, others)
        self.attached = True

    def hook_replay(self) -> None:
        """Replace what replay needs on the Trainer, once for each model.

        Raises:
            ConfigError: its settings and those of replay cannot be had together.
        """
        if self.hooks is None or self.system is None:
            return
        if self._replay is not None:
            if self._replay.system is self.system and self._replay.trainer is self.hooks.trainer:
                return
            self._replay.remove()
        self._replay = ReplayHooks(self.hooks.trainer, self.system)

    def detach(self) -> None:
        """Undo ``attach``; see there for the function of the same name."""
        self.release()
        self._left()

    def _left(self) -> None:
        """The model is not wrapped any more, or the callback was removed: nothing of ours stays on the Trainer."""
        self._log.pending = None
        self.attached = False
        if self._replay is not None:
            self._replay.remove()
            self._replay = None
        if self.hooks is None:
            return
        self.hooks.remove()
        handler = self.hooks.trainer.callback_handler
        # A new list: the handler may be going through the old one right now.
        handler.callbacks = [callback for callback in handler.callbacks if callback is not self]
        self.hooks = None

    # ---- events ----------------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Wrap before the engine prepares the model."""
        if kwargs.get("model") is not None:
            trainer = calling_trainer(self)
            if trainer is not None:
                self.hook(trainer)
            self.bind(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bind the model that trains, open the record files and drop leftovers of earlier forwards."""
        resumed = state.global_step > 0
        total = state.max_steps
        if self.hooks is None:
            self._begin_unknown(resumed)
        if self.hooks is not None:  # what prints may have been added since
            keep_short(self.hooks.replaced, self.hooks.trainer.callback_handler.callbacks)
        system = self.bind(kwargs["model"])
        self.hook_replay()
        if not resumed:
            system.cut.schedule(total)  # before anything changes
            system.fit_interval(total)
        again = not self._new_run  # a second start within one train(), with a smaller batch
        system.begin(new_run=self._new_run)
        self._new_run = False
        self._log.pending = None
        directory = self.resume_path.at(args.output_dir, state.global_step)
        saved = restore(system, directory, state.global_step) if resumed else None
        system.cut.schedule(total, state.global_step)
        output_dir = Path(system.config.telemetry.output_dir or args.output_dir)
        try:
            begun = state.global_step if resumed or again else None
            system.open_telemetry(output_dir, resume_step=begun, learning_rate=args.learning_rate)
        except TelemetryError as error:
            # Training must not die for its telemetry; statistics and scalars go on.
            logger.error("%s; training goes on without record files", error)
        if not (resumed or again) or not system.alerts.reference.data["layers"]:
            self._set_baseline(system, kwargs)
        if system.config.lifecycle.revive.at == "start" and not (resumed or again):
            require_plain_engine(self.hooks.trainer if self.hooks is not None else None)
            split_at_start(system, kwargs["model"], kwargs.get("optimizer"), kwargs["train_dataloader"])
        if resumed:
            system.cut.record(system.records.writer)
        if resumed:  # after the records are open, so that a mismatch is among them
            check_weights(system, kwargs["model"], directory, saved, state.global_step)

    def _set_baseline(self, system: ChronoSystem, kwargs: dict[str, Any]) -> None:
        """The baseline before the first step; under an engine that shards weights, the engine's model runs."""
        model, trainer = kwargs["model"], None if self.hooks is None else self.hooks.trainer
        if trainer is not None and not plain_engine(trainer):
            model = trainer.model_wrapped
        set_baseline(system, model, kwargs["train_dataloader"])

    def _begin_unknown(self, resumed: bool) -> None:
        """Training begins under a Trainer that was built before this callback was added to it."""
        trainer = calling_trainer(self)
        if resumed:
            raise ConfigError(
                "ChronoCallback was added to a Trainer that exists already, so it does not know which checkpoint is "
                "resumed; call chronomoe_hf.attach(trainer) before trainer.train()"
            )
        self._new_run = True
        if trainer is not None:
            self.hook(trainer)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop before weights move by a gradient of another routing than that of the loss."""
        if self.system is not None:
            self.system.replay.check()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the step. Collective: runs on every rank."""
        if self.system is None:
            return
        self._log_alone(control)  # a window whose entry never came
        snapshot = self.system.step(state.global_step)
        if snapshot is None and state.global_step >= state.max_steps:
            snapshot = self.system.close_window()
        if snapshot is not None:
            self._window_closed(self.system, snapshot)
            if not (control.should_log or logs_now(args, state)):
                self._log_alone(control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the scalars of the last closed window to a training log entry (once per window)."""
        logs: dict[str, Any] | None = kwargs.get("logs")
        if self.system is None or logs is None:
            return
        record_log(self.system, state, logs)
        if not {"loss", "train_runtime"} & logs.keys():
            return
        if "train_runtime" in logs:  # the last entry of a run
            self._close_last_window(self.system)
        self._log.merge(self.system, logs, state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """With ``lifecycle__measuring__enabled=True``: what the plan of the moment would cost, on the same batches."""
        system, batches = self.system, kwargs.get("eval_dataloader")
        if system is not None and system.config.lifecycle.measuring.enabled and batches is not None:
            model = kwargs["model"] if self.hooks is None else self.hooks.trainer.model_wrapped
            measure_dry_run(system, model, batches)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the last, shorter window and the record files; follow Trainer to the best checkpoint."""
        if self.system is None:
            return
        system = self.system
        self._close_last_window(system)
        self._log_alone(control)
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None:
            manifest = system.load(best, on_missing=system.config.checkpoint.on_missing, check_weights=False)
            saved = None if manifest is None else manifest.get("fingerprint")
            check_weights(system, kwargs["model"], Path(best), saved, state.global_step)
        recorded = None if system.records.writer is None else system.records.writer.directory.parent
        system.close_telemetry()
        system.require_saved()
        if recorded is not None:
            say_verdict(recorded)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Fallback where no method of the Trainer is replaced: it has written its checkpoint, ours goes beside it."""
        if self.system is None or self.hooks is not None:
            return
        directory = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.system.config.checkpoint.save and args.should_save and directory.is_dir() and not has_state(directory):
            self.system.save(directory)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Hub push uploads output_dir without the checkpoints, so the state must lie there too."""
        if self.system is None or args.output_dir is None or not state.is_world_process_zero:
            return
        if self.system.config.checkpoint.save:
            self.system.save(args.output_dir)

    # ---- around the Trainer's methods ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def saving(self, directory: Any, should_save: bool) -> Iterator[None]:
        """Around ``save_model``: our state is written first, so a checkpoint that Trainer finishes always has it."""
        system = self.system
        if system is None or not system.config.checkpoint.save:
            yield
            return
        if should_save and directory is not None:
            system.save(directory)
        with state_saved(system):
            yield

    def model_card_written(self, directory: str) -> None:
        """After ``create_model_card``: the card says how the experts were used."""
        if self.system is not None:
            write_model_card(directory, self.system)

    @contextlib.contextmanager
    def training(self, resume_from: Any, output_dir: str | None) -> Iterator[None]:
        """Around ``train``: a new run begins unless it is a resume, and a run that breaks off is put in order."""
        self.resume_path.set(resume_from, output_dir)
        self._new_run = True
        try:
            yield
        except BaseException as error:  # KeyboardInterrupt too: what was recorded stays, the half step is dropped
            self._broken_off(whole=not isinstance(error, ChronoError))
            raise

    def _broken_off(self, whole: bool) -> None:
        system = self.system
        if system is None:
            return
        for module in system.model.modules():
            scope = module.__dict__.get(SCOPE)
            if scope is not None:
                scope.abandon()  # torch calls no always_call hook for a KeyboardInterrupt
        system.discard()
        if whole:  # after an error of our own the open window may lack a part
            system.close_window()
        system.close_telemetry(completed=False)

    def evaluating(self, prefix: str, loop: Callable[[], Any]) -> Any:
        """Run an evaluation loop; its forwards are recorded apart, and its metrics gain ``<prefix>_moe/...``."""
        system = self.system
        if system is None or self.hooks is None or not system.config.telemetry.evaluation:
            return loop()
        return evaluate_apart(self.hooks.trainer, system, prefix, loop)

    # ---- logging ---------------------------------------------------------------------------------------------------

    def _close_last_window(self, system: ChronoSystem) -> None:
        snapshot = system.close_window()
        if snapshot is not None:
            self._window_closed(system, snapshot)

    def _window_closed(self, system: ChronoSystem, snapshot: SystemSnapshot) -> None:
        self._log.closed(system, snapshot)
        self._log.publish(
            self.hooks.trainer.callback_handler.callbacks if self.hooks is not None else (), system, snapshot
        )

    def _log_alone(self, control: TrainerControl) -> None:
        if self.system is not None and self.hooks is not None:
            self._log.log_alone(self.system, self.hooks.trainer, control)
