"""Saving and resuming under Trainer: where state is written, and how it is found again."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from chronomoe_hf.errors import StateError
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.wrapping.save_pretrained import state_saved


def hook_trainer(trainer: Trainer, system: ChronoSystem) -> ResumePath:
    """Wrap ``save_model`` (state beside every checkpoint) and ``train`` (to know what is resumed) on the instance.

    Returns:
        Where the path given to ``train(resume_from_checkpoint=...)`` is kept.
    """
    path = ResumePath()
    save_model, train = trainer.save_model, trainer.train

    def saving(self: Trainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        directory = output_dir if output_dir is not None else self.args.output_dir
        if system.config.checkpoint.save and self.args.should_save and directory is not None:
            # Before the weights: a checkpoint that Trainer regards as complete then always has our state.
            system.save(directory)
        with state_saved(system):
            save_model(output_dir, _internal_call)

    def training(self: Trainer, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        path.set(resume_from_checkpoint, self.args.output_dir)
        return train(resume_from_checkpoint, *args, **kwargs)

    trainer.save_model = types.MethodType(saving, trainer)  # type: ignore[method-assign]
    trainer.train = types.MethodType(training, trainer)  # type: ignore[method-assign]
    return path


class ResumePath:
    """Directory that the running ``train()`` resumes from, if it is known."""

    def __init__(self) -> None:
        self.directory: Path | None = None

    def set(self, given: str | bool | None, output_dir: str | None) -> None:
        """Note what was passed to ``train``; True means the last checkpoint of `output_dir`."""
        found = get_last_checkpoint(output_dir) if given is True and output_dir is not None else given
        self.directory = Path(found) if isinstance(found, str) else None

    def at(self, output_dir: str | None, global_step: int) -> Path:
        """The noted directory, or Trainer's default name for that step."""
        return self.directory or Path(output_dir or ".") / f"checkpoint-{global_step}"


def restore(system: ChronoSystem, directory: Path, step: int) -> dict[str, str] | None:
    """Restore state from a checkpoint. Collective.

    Returns:
        The fingerprint of the checkpoint's weights, for :func:`check_weights`; None where there is none.

    Raises:
        StateMissingError, StateCorruptError, StateMismatchError, StateSchemaError: see ``persistence.load``.
        StateError: the state there is of another step.
    """
    manifest = system.load(directory)
    if manifest is not None and manifest["step"] != step:
        raise StateError(
            f"{directory} holds chronomoe state of step {manifest['step']}, but the Trainer resumes at step {step}; "
            "the files of two checkpoints are mixed up"
        )
    return None if manifest is None else manifest.get("fingerprint")
