"""A wrapped model as a card, a table and a picture."""

from __future__ import annotations

from typing import Any

from chronomoe_hf.pictures.shown import Looks, Shown
from chronomoe_hf.telemetry.looks import window_looks
from chronomoe_hf.telemetry.snapshots import SystemSnapshot
from chronomoe_hf.wrapping.layer import Layer


class ShownSystem(Shown):
    """Base of ChronoSystem: what it shows is its newest window."""

    model: Any
    layers: list[Layer]
    config: Any
    global_step: int
    last_snapshot: SystemSnapshot | None

    def snapshot(self) -> SystemSnapshot:
        """The open window."""
        raise NotImplementedError

    def __repr__(self) -> str:
        sizes = sorted({(layer.num_experts, layer.top_k) for layer in self.layers})
        shape = ", ".join(f"{experts} experts, k {k}" for experts, k in sizes)
        name, step = type(self.model).__name__, self.global_step
        return f"<ChronoSystem of {name}: {len(self.layers)} MoE layers, {shape}, step {step}>"

    def _looks(self) -> Looks:
        closed = self.last_snapshot
        found = window_looks(self.snapshot() if closed is None else closed)
        law = self.config.beta.law
        acts = f"beta: {law}" if law != "none" else "nothing steers"
        title = f"{type(self.model).__name__}, watched ({acts})"
        which = "the last closed window" if closed is not None else "the open window"
        hint = ".snapshot() is the open window; .to_pandas() has a row for every expert"
        sentence = f"{found.sentence} Numbers of {which}."
        return Looks(title, sentence, found.numbers, found.rows, found.picture, hint)
