"""axolotl: ``plugins: [chronomoe_hf.integrations.axolotl.ChronoPlugin]`` and ``chronomoe: {preset: observe}``.

Importing this file needs axolotl.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from chronomoe_hf.errors import ConfigError
from chronomoe_hf.integrations.settings import read_settings
from chronomoe_hf.trainer.attach import attach


class ChronoArgs(BaseModel):
    """What the plugin adds to axolotl's configuration.

    Attributes:
        chronomoe: the name of a preset, the path of a config, or a mapping; see ``read_settings``; ``observe``
            where it is left out.
    """

    chronomoe: bool | str | dict[str, Any] | None = None

    @field_validator("chronomoe")  # type: ignore[untyped-decorator]
    @classmethod
    def _known(cls, value: Any) -> Any:
        """A wrong word is refused when the YAML is read, before a model is loaded."""
        try:
            read_settings(value, "chronomoe")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return value


class ChronoPlugin(BasePlugin):
    """Attaches to the Trainer that axolotl builds, after all its callbacks and before it trains."""

    def get_input_args(self) -> str:
        """Dotted path of the pydantic model."""
        return "chronomoe_hf.integrations.axolotl.ChronoArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """``attach`` with the settings of the YAML; ``chronomoe: false`` attaches nothing."""
        value = cfg.get("chronomoe")
        config = read_settings(True if value is None else _plain(value), "chronomoe")
        if config is not None:
            attach(trainer, config)


def _plain(value: Any) -> Any:
    """axolotl's own mapping answers None for every unknown key; a plain dict does not."""
    return {name: _plain(inner) for name, inner in value.items()} if isinstance(value, dict) else value
