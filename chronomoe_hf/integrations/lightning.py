"""Lightning: ``Trainer(callbacks=[ChronoLightningCallback("observe")])``. Importing this file needs Lightning.

State goes into Lightning's own checkpoint, under the callback's key, and comes back from there. Lightning's checkpoints
resume exactly at the end of an epoch; one from the middle of an epoch begins its data anew, with or without us.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from chronomoe_hf.api import system_of, wrap
from chronomoe_hf.errors import WrapError
from chronomoe_hf.integrations.settings import read_settings
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.telemetry import SystemSnapshot

if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
    from pytorch_lightning import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback


class ChronoLightningCallback(Callback):
    """Watches (and, by config, governs) the routing of the model inside a LightningModule.

    A model that is wrapped already keeps its settings. Scalars go to every logger of the Trainer (``moe/...``, and
    ``val_moe/...`` after a validation), records below ``<directory>/chronomoe``.

    Args:
        config: as ``read_settings`` takes it; None = ``observe``.
        directory: of the records; None = Lightning's ``log_dir``, else ``default_root_dir``.

    Attributes:
        system: of the model, from ``fit`` on.

    Raises:
        ConfigError: `config` names no settings.
    """

    def __init__(self, config: Any = None, directory: str | Path | None = None) -> None:
        self.config = read_settings(True if config is None else config, "ChronoLightningCallback")
        self.directory = directory
        self.system: ChronoSystem | None = None
        self._loaded: dict[str, Any] | None = None
        self._evaluation: AbstractContextManager[None] | None = None
        self._global_step = 0

    @property
    def state_key(self) -> str:
        """Under which Lightning keeps our state; the same whatever the settings."""
        return "chronomoe"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wrap before the strategy prepares the model."""
        if stage == "fit" and self.config is not None:
            try:
                self.system = system_of(pl_module)
            except WrapError:
                self.system = system_of(wrap(pl_module, self.config))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the records; a checkpoint's state comes back here."""
        system, state = self.system, self._loaded
        if system is None:
            return
        system.begin(new_run=state is None)
        if state is not None:
            system.load_state_dict(state)
        self._loaded, self._global_step = None, int(trainer.global_step)
        directory = self.directory or trainer.log_dir or trainer.default_root_dir
        system.open_telemetry(directory, resume_step=None if state is None else system.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One step of the system for each step of the optimizer. Collective: runs on every rank."""
        if self.system is None or trainer.global_step == self._global_step:
            return  # still accumulating
        self._global_step = int(trainer.global_step)
        self._log(trainer, "moe/", self.system.step(self.system.global_step + 1))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """What validation routes is counted apart."""
        if self.system is not None and not trainer.sanity_checking and self.system.config.telemetry.evaluation:
            self._evaluation = self.system.recording_eval()
            self._evaluation.__enter__()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Its numbers, as ``val_moe/...``."""
        if self._stop_evaluation():
            assert self.system is not None
            self._log(trainer, "val_moe/", self.system.take_evaluation("val"))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the last, shorter window and the record files."""
        if self.system is not None:
            self._log(trainer, "moe/", self.system.close_window())
            self.system.close_telemetry()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The half step is dropped, what was recorded stays."""
        self._stop_evaluation()
        if self.system is not None:
            self.system.discard()
            self.system.close_telemetry()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint: tensors and text, so that ``torch.load(weights_only=True)`` reads it."""
        if self.system is None:
            return {}
        state = self.system.state_dict()
        return {"tensors": state["tensors"], "meta": json.dumps(state["meta"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint; loaded when training starts."""
        if state_dict:
            tensors: dict[str, Tensor] = state_dict["tensors"]
            self._loaded = {"tensors": tensors, "meta": json.loads(state_dict["meta"])}

    def _stop_evaluation(self) -> bool:
        running, self._evaluation = self._evaluation, None
        if running is None:
            return False
        running.__exit__(None, None, None)
        return True

    def _log(self, trainer: Any, prefix: str, snapshot: SystemSnapshot | None) -> None:
        if snapshot is None or self.system is None or not self.system.config.telemetry.scalars:
            return
        scalars = {prefix + name.removeprefix("moe/"): value for name, value in snapshot.scalars().items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=int(trainer.global_step))
