"""Putting replay on a wrapped model: what it must know of the layers, and who asks it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.recording.scope import Switches
from chronomoe_hf.replay.layers import ReplayLayer
from chronomoe_hf.replay.session import Replay
from chronomoe_hf.wrapping.layer import Layer


def make_replay(root: nn.Module, layers: Sequence[Layer], config: ChronoConfig, switches: Switches) -> Replay:
    """The ``system.replay`` of a model; its routers and scopes ask it only where it is on.

    Raises:
        UnsupportedArchitectureError, ConfigError: the model, or what else is configured, cannot have it.
    """
    specs = [
        ReplayLayer(
            layer_id=layer.layer_id,
            name=layer.name,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            refused=layer.adapter.refused("replay"),
            by_token=layer.adapter.by_token,
            samples=layer.adapter.samples,
        )
        for layer in layers
    ]
    owners = {layer.recorder.scope for layer in layers}
    replay = Replay(config.replay, root, specs, len(owners), counts_own=config.beta.law == "balance")
    if replay.on:
        switches.watcher = replay.passes
        for layer in layers:
            layer.handle.replay = replay.passes
    return replay
