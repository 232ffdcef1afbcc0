"""Asking one checkpoint after another, in any client's environment: a checkpoint that fails stops no other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def ask_each(out: str, directories: Sequence[str], ask: Callable[[str], dict[str, Any]]) -> None:
    """Write what `ask` says of every directory, or its error, to `out`; after each, so that nothing is lost.

    Args:
        out: JSON file, directory -> answer.
        directories: checkpoints.
        ask: the answer of one.
    """
    results: dict[str, Any] = {}
    for directory in directories:
        try:
            results[directory] = ask(directory)
        except Exception as error:
            results[directory] = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
        print(directory, results[directory], flush=True)
        Path(out).write_text(json.dumps(results, indent=1))
