"""What replay must know of a layer, and which layers and models it refuses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from chronomoe_hf.config import ReplayConfig
from chronomoe_hf.errors import ConfigError, UnsupportedArchitectureError

_NUMBER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class ReplayLayer:
    """One wrapped layer.

    Args:
        layer_id: position among the wrapped layers.
        name: path of its router.
        num_experts, top_k: E and k.
        refused: why its choice cannot be repeated; None = it can.
        by_token: its experts follow from the token id, so there is nothing to repeat.
        samples: its experts are drawn at random in training mode.
    """

    layer_id: int
    name: str
    num_experts: int
    top_k: int
    refused: str | None = None
    by_token: bool = False
    samples: bool = False

    @property
    def decoder(self) -> int | None:
        """Index of the decoder layer that holds it, read off its name; None where it names none."""
        found = _NUMBER.findall(self.name)
        return int(found[-1]) if found else None


def replayable(layers: Sequence[ReplayLayer], config: ReplayConfig, num_owners: int, root: str) -> list[ReplayLayer]:
    """The layers whose choices are compared and repeated.

    Args:
        layers: of the model.
        config: settings.
        num_owners: modules whose forward owns routers (2 in an encoder-decoder model with routers in both).
        root: class name of the model.

    Raises:
        UnsupportedArchitectureError: a layer's choice cannot be repeated.
        ConfigError: this mode cannot be had with this model.
    """
    kept = [layer for layer in layers if not layer.by_token]
    wrong = next((layer for layer in kept if layer.refused), None)
    if wrong is not None:
        raise UnsupportedArchitectureError(f"{wrong.name}: choices cannot be repeated: {wrong.refused}")
    if config.mode == "off":
        return kept
    if num_owners > 1:
        raise ConfigError(
            f"replay.mode={config.mode!r}: {root} has routers under {num_owners} owners (encoder and decoder), and "
            "the choices of a decoder depend on more than its own tokens; only replay.recompute works there"
        )
    sampled = next((layer for layer in kept if layer.samples), None)
    if sampled is not None and config.mode == "old":
        raise ConfigError(
            f"replay.mode='old': {sampled.name} draws its experts at random in training and weighs them by a coin, "
            "which no second pass can repeat; use mode='rollout', where ratio and choice are exact, or "
            "mode='measure'"
        )
    return kept
