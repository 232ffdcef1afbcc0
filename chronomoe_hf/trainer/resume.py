"""Saving and resuming under Trainer: where state is written, and how it is found again."""

from __future__ import annotations

import os
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from chronomoe_hf.system import ChronoSystem


class ResumePath:
    """Directory that the running ``train()`` resumes from, if it is known."""

    def __init__(self) -> None:
        self.directory: Path | None = None

    def set(self, given: str | os.PathLike[str] | bool | None, output_dir: str | None) -> None:
        """Note what was passed to ``train``; True means the last checkpoint of `output_dir`."""
        found = get_last_checkpoint(output_dir) if given is True and output_dir is not None else given
        self.directory = Path(found) if isinstance(found, str | os.PathLike) else None

    def at(self, output_dir: str | None, global_step: int) -> Path:
        """The noted directory, or Trainer's default name for that step."""
        return self.directory or Path(output_dir or ".") / f"checkpoint-{global_step}"


def restore(system: ChronoSystem, directory: Path, step: int) -> dict[str, str] | None:
    """Restore state from a checkpoint. Collective.

    Returns:
        The fingerprint of the checkpoint's weights, for :func:`check_weights`; None where there is none.

    Raises:
        StateMissingError, StateCorruptError, StateMismatchError, StateSchemaError: see ``ChronoSystem.load``.
        StateError: the state there is of another step.
    """
    manifest = system.load(directory, on_missing=system.config.checkpoint.on_missing, step=step)
    return None if manifest is None else manifest.get("fingerprint")
