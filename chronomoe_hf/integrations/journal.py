"""What a launcher and the processes that it starts tell each other: two variables and a file. Imports no torch."""

from __future__ import annotations

import json
import os
from typing import Any

VARIABLE = "CHRONOMOE"
"""Environment variable: the name of a preset, or the path of a ``chronomoe_config.json``."""
JOURNAL = "CHRONOMOE_RUN_JOURNAL"
"""Environment variable: a file that takes one JSON line for each Trainer that was, or was not, attached to."""


def note(**entry: Any) -> None:
    """Add a line to the journal, where there is one. A journal that cannot be written is left alone."""
    path = os.environ.get(JOURNAL)
    if path:
        try:
            with open(path, "a", encoding="utf-8") as journal:
                journal.write(json.dumps(entry) + "\n")
        except OSError:
            return
