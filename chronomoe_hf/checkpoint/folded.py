"""A fold makes the steering state of a directory obsolete: the save that follows removes it and leaves a note."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from chronomoe_hf.checkpoint.state_file import STATE_FOLDER, has_state, read_manifest, remove_state
from chronomoe_hf.errors import StateError
from chronomoe_hf.jsonfiles import write_json
from chronomoe_hf.wrapping.save_pretrained import SAVE_HOOK

NOTE_FILE = "folded.json"


def folded_note(directory: str | Path) -> str | None:
    """Why `directory` has no state, in words, if a fold removed it; else None."""
    path = Path(directory) / STATE_FOLDER / NOTE_FILE
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (
        f"the chronomoe state of {directory} (step {step}) was folded into the weights there and removed: they need no "
        "state; call wrap(model, config) without state="
    )


def forget_note(directory: str | Path) -> None:
    """A new state was written: the note is of the past."""
    with contextlib.suppress(OSError):
        os.unlink(Path(directory) / STATE_FOLDER / NOTE_FILE)


def leave_note(directory: str | Path) -> None:
    """Remove the state in `directory`, if there is one, and note that the weights hold what it held."""
    if not has_state(directory):
        return
    try:
        step = read_manifest(directory)["step"]
    except StateError:
        step = None
    remove_state(directory)
    note = {"format": "chronomoe_hf.folded", "schema": 1, "step": step}
    write_json(Path(directory) / STATE_FOLDER / NOTE_FILE, note)


def save_folded(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    """The model's own ``save_pretrained``; a state that lies there is of the weights before the fold, and goes."""
    result = getattr(type(self), SAVE_HOOK)(self, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        leave_note(save_directory)
    return result
