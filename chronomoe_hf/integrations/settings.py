"""What a tool's own configuration says about us, as a ChronoConfig. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chronomoe_hf.config import PRESETS, ChronoConfig
from chronomoe_hf.errors import ConfigError, did_you_mean, shown


def read_settings(value: Any, where: str) -> ChronoConfig | None:
    """The settings that a YAML file, an environment variable or a command line gives.

    Args:
        value: the name of a preset; the path of a ``chronomoe_config.json`` or of a folder that holds one; a mapping
            ``{"preset": "balance", "interval": 50, "beta": {"rate": 0.1}}``, whose preset is ``observe`` where it names
            none; True for ``observe``; None or False for nothing.
        where: what gave it, for messages.

    Returns:
        The config; None where nothing is asked for.

    Raises:
        ConfigError: no preset of that name and no file there, an unknown key, a value out of range.
    """
    if value is None or value is False:
        return None
    if isinstance(value, ChronoConfig):
        return value
    if value is True:
        return ChronoConfig.observe()
    if isinstance(value, str | Path):
        return _named(str(value), where)
    if isinstance(value, Mapping):
        given = dict(value)
        preset = given.pop("preset", "observe")
        if not (isinstance(preset, str) and preset in PRESETS):
            raise ConfigError(
                f"{where}: no preset {shown(preset)}{did_you_mean(preset, PRESETS)}; known: {', '.join(PRESETS)}"
            )
        try:
            return ChronoConfig.from_dict({"contract": preset, **given})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    raise ConfigError(
        f"{where}: a {type(value).__name__}; give the name of a preset ({', '.join(PRESETS)}), the path of a "
        "chronomoe_config.json, or a mapping such as {preset: observe, interval: 50}"
    )


def _named(value: str, where: str) -> ChronoConfig:
    if value in PRESETS:
        return ChronoConfig.preset(value)
    if Path(value).exists():
        try:
            return ChronoConfig.from_pretrained(value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    raise ConfigError(
        f"{where}: {shown(value)} is neither a preset{did_you_mean(value, PRESETS)} (known: {', '.join(PRESETS)}) nor "
        "a file or folder that is there"
    )
