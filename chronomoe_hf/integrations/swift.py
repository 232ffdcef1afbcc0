"""ms-swift: ``external_plugins`` takes the file that ``python -m chronomoe_hf.integrations.swift`` prints.

    swift sft train.yaml --external_plugins $(python -m chronomoe_hf.integrations.swift) --callbacks chronomoe

ms-swift has no key for our settings: they come from the variable ``CHRONOMOE`` (a preset, or the path of a config),
else ``observe``. (``chronomoe run -- swift sft train.yaml`` needs neither key.) Nothing of ms-swift is imported here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.integrations.journal import VARIABLE
from chronomoe_hf.integrations.settings import read_settings

PLUGIN = Path(__file__).resolve().parent / "swift_plugin" / "chronomoe_for_swift.py"
"""In a folder of its own: ms-swift puts the folder of a plugin first on its path."""


def callback(args: Any, trainer: Any) -> Any:
    """As ms-swift makes a callback: from its arguments and its Trainer.

    Raises:
        ConfigError: the variable names no settings.
    """
    from chronomoe_hf.trainer.callback import ChronoCallback

    config = read_settings(os.environ.get(VARIABLE) or None, f"the environment variable {VARIABLE}")
    return ChronoCallback(ChronoConfig.observe() if config is None else config)


if __name__ == "__main__":
    print(PLUGIN)
