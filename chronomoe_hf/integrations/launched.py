"""The callback that a launcher, a variable or ``report_to`` puts on a Trainer: it takes its settings from there."""

from __future__ import annotations

import logging
import os
from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.errors import NoMoELayersError, WrapError
from chronomoe_hf.integrations.journal import VARIABLE, note
from chronomoe_hf.integrations.settings import read_settings
from chronomoe_hf.trainer.callback import ChronoCallback
from chronomoe_hf.trainer.hooks import calling_trainer
from chronomoe_hf.wrapping.owner import find_system

logger = logging.getLogger("chronomoe_hf")


class LaunchedCallback(ChronoCallback):
    """A ChronoCallback that nobody has written into the script.

    It gives way to one that the script makes itself, and to a config that the script's model is wrapped with. A Trainer
    whose model has no MoE layers is left alone, and so is, as long as nothing is to act, one whose model cannot be
    wrapped.

    Raises:
        ConfigError: the variable ``CHRONOMOE`` names no preset and no config.
    """

    gives_way = True

    def __init__(self) -> None:
        config = read_settings(os.environ.get(VARIABLE) or None, f"the environment variable {VARIABLE}")
        super().__init__(ChronoConfig.observe() if config is None else config)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Wrap before the engine prepares the model, if this Trainer has no other callback of ours."""
        trainer = calling_trainer(self)
        if trainer is None or kwargs.get("model") is None:
            return
        ours = [each for each in trainer.callback_handler.callbacks if isinstance(each, ChronoCallback)]
        if any(not each.gives_way for each in ours) or ours[0] is not self:
            self._leave(trainer)
            return
        preset = self.config.contract if self.config is not None else None
        if find_system(kwargs["model"]) is not None:
            self.config = None  # the script has wrapped it: with those settings
        try:
            super().on_init_end(args, state, control, **kwargs)
        except NoMoELayersError:
            self._leave(trainer)
            name = type(kwargs["model"]).__name__
            logger.info("%s has no MoE layers: not watched", name)
            note(attached=False, trainer=type(trainer).__name__, reason=f"{name} has no MoE layers")
        except WrapError as error:
            self._leave(trainer)
            if preset != "observe":
                raise
            logger.warning("not watched: %s", error)
            note(attached=False, trainer=type(trainer).__name__, reason=str(error).splitlines()[0])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As ``ChronoCallback``, and a line for the launcher."""
        if self.hooks is None and self._gone:
            return
        super().on_train_begin(args, state, control, **kwargs)
        if self.system is not None and state.is_world_process_zero:
            directory = self.system.config.telemetry.output_dir or args.output_dir
            note(
                attached=True,
                trainer="Trainer" if self.hooks is None else type(self.hooks.trainer).__name__,
                preset=self.system.config.contract,
                layers=len(self.system.layers),
                directory=os.path.abspath(str(directory)),
            )

    _gone = False

    def _leave(self, trainer: Trainer) -> None:
        """Off this Trainer for good; its list may be gone through right now, so it gets a new one."""
        self._gone = True
        self.detach()
        handler = trainer.callback_handler
        handler.callbacks = [each for each in handler.callbacks if each is not self]
