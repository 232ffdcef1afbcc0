"""Finding the state of a directory for every rank, and what to do where there is none."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.manifest import MANIFEST_FILE, OLD_MANIFEST_FILE
from chronomoe_hf.checkpoint.state_file import STATE_FOLDER, has_state, read_state
from chronomoe_hf.errors import StateError, StateMissingError

OnMissing = Literal["auto", "fresh", "raise"]


def read_for_all(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The state in `directory`, read by the main process and given to every rank; None where there is none. Collective.

    Raises:
        StateError: torn, foreign, or of another schema; the message names the file and the way out.
    """
    found: Any = None
    if distributed.is_main():
        try:
            found = read_state(directory) if has_state(directory) else None
        except StateError as error:
            found = error
    found = distributed.broadcast_object(found)
    if isinstance(found, StateError):
        raise found
    return None if found is None else (found[0], found[1])


def missing(directory: str | Path, on_missing: OnMissing, acted: bool) -> None:
    """There is no state in `directory`: warn, or raise.

    Args:
        directory: where the state was looked for.
        on_missing: as in ``CheckpointConfig``.
        acted: the live run has been governed.

    Raises:
        StateMissingError: `on_missing` is ``"raise"``, or ``"auto"`` and the run has been governed.
    """
    if on_missing == "raise" or (on_missing == "auto" and acted):
        raise StateMissingError(
            f"no chronomoe state in {directory} (neither {STATE_FOLDER}/{MANIFEST_FILE} nor {OLD_MANIFEST_FILE})"
            f"{', although this run has been governed: routing would change silently' if acted else ''}; pass the "
            "directory of a checkpoint that was saved with chronomoe_hf, or on_missing='fresh' (in CheckpointConfig "
            "for a Trainer) to start with beta = 0"
        )
    warnings.warn(f"no chronomoe state in {directory}: starting with fresh statistics and beta = 0", stacklevel=4)
