"""Settings of replay: which pass chooses the experts of which other one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chronomoe_hf.config.base import ConfigBase, between, positive

ReplayMode = Literal["off", "measure", "old", "rollout"]
RecomputeMode = Literal["off", "count", "pin"]


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(ConfigBase):
    """Routing of one pass compared with that of another, or repeated in it (``docs/replay.md``).

    Args:
        mode: ``"off"``; ``"measure"``, compare rollout, old-policy and gradient pass, and change no bit; ``"old"``,
            the gradient pass repeats the choices of the old-policy pass (R2); ``"rollout"``, both repeat those of the
            engine that sampled (R3).
        on_missing: ``"native"``, a token without a record chooses itself (and is counted); ``"raise"`` stops.
        min_coverage: alert below this share of tokens with a record.
        max_mismatch: in the first batch with records, a larger share of (token, layer) unlike the live choice raises:
            the records then belong to other tokens, layers or weights.
        max_bytes: host memory for records, in bytes; the oldest go first.
        layers: the layer axis of an engine's routes: ``"moe"``, MoE layers only; ``"all"``, every decoder layer;
            ``"auto"``, read off its length.
        k3: ROUTING_MISMATCH needs a k3 KL above this, in nats, beside a mismatch.
        recompute: the recompute of activation checkpointing: ``"count"`` the choices that differ from its forward, or
            ``"pin"`` them to it. For every training, not only reinforcement learning.
    """

    mode: ReplayMode = "off"
    on_missing: Literal["native", "raise"] = "native"
    min_coverage: float = 0.9
    max_mismatch: float = 0.5
    max_bytes: int = 2 * 2**30
    layers: Literal["auto", "moe", "all"] = "auto"
    k3: float = 1e-3
    recompute: RecomputeMode = "off"

    @property
    def on(self) -> bool:
        """Whether anything is compared or repeated at all."""
        return self.mode != "off" or self.recompute != "off"

    def _check(self) -> None:
        between("replay.min_coverage", self.min_coverage, 0.0, 1.0)
        between("replay.max_mismatch", self.max_mismatch, 0.0, 1.0)
        positive("replay.max_bytes", self.max_bytes)
        positive("replay.k3", self.k3)
