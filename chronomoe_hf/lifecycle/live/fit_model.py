"""Fitting the layers of a cut model one after the other, or all at once, and keeping what was found.

Shape suffixes: T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from chronomoe_hf.lifecycle.cut_reader import CutReader
from chronomoe_hf.lifecycle.live.layer_fit import LayerRefit, fit_layer, routed_output
from chronomoe_hf.lifecycle.live.model import Batch
from chronomoe_hf.lifecycle.live.projections import OutputProjections
from chronomoe_hf.lifecycle.live.samples import LayerSamples, collect_samples, sample_bytes, under_mask
from chronomoe_hf.lifecycle.live.streams import find_streams, full_streams
from chronomoe_hf.lifecycle.live.weights import Changes
from chronomoe_hf.wrapping.discovery import FoundLayer


@dataclass
class StoredProjections:
    """Projections of one layer that are not in the model: new ones before the exchange, old ones after it.

    Args:
        projections: the layer's.
        weights: by expert, as the model stores them.
    """

    projections: OutputProjections
    weights: dict[int, Tensor]

    def write(self, changes: Changes) -> None:
        """Write them into the model; `changes` remembers what was there."""
        for expert, weight in self.weights.items():
            changes.write(*self.projections.place(expert), weight)


def exchange_all(stored: Sequence[StoredProjections]) -> None:
    """Put stored projections into the model, and keep those that were there."""
    for each in stored:
        for expert, weight in each.weights.items():
            each.weights[expert] = each.projections.exchange(expert, weight)


@dataclass
class Fitting:
    """The fit of all layers: what it reads, and what it has found so far."""

    model: nn.Module
    layers: Sequence[FoundLayer]
    drops: Sequence[tuple[int, ...]]
    projections: dict[int, OutputProjections]
    fit: list[Batch]
    check: list[Batch]
    ridge: float
    sweeps: int
    memory_gb: float
    progress: Callable[[str], None] | None
    stored: list[StoredProjections] = field(default_factory=list)
    reports: list[LayerRefit] = field(default_factory=list)

    def at_once(self, cut: Sequence[int]) -> None:
        """Every layer on the inputs of the full model; nothing is written."""
        for group in self._groups(cut):
            masks = [under_mask(self.layers[i], self.drops[i]) for i in group]
            tapes = collect_samples(self.model, [self.layers[i] for i in group], masks, self.fit, self.check)
            for index, samples in zip(group, tapes, strict=True):
                self._fit(index, samples, None)

    def sequential(self, cut: Sequence[int]) -> None:
        """Every layer on what the cut and refitted layers before it give; the old weights are back at the end."""
        streams = dict(
            zip(cut, find_streams(self.model, [self.layers[i] for i in cut], _small(self.fit[0])), strict=True)
        )
        reader = CutReader(self.model, self.layers, self.drops, self.fit, self.check)
        try:
            for group in self._groups(cut):
                exchange_all(self.stored)  # the full model
                try:
                    of_group = [self.layers[i] for i in group], [streams[i] for i in group]
                    wanted = full_streams(self.model, *of_group, [*self.fit, *self.check])
                finally:
                    exchange_all(self.stored)
                for index in group:
                    samples, now_TD = reader.read(index, streams[index])
                    gap_TD = (wanted.pop(0).float() - now_TD.float()) / streams[index].factor
                    target_TD = routed_output(self.projections[index], samples) + gap_TD
                    if self._fit(index, samples, target_TD):
                        exchange_all(self.stored[-1:])
        finally:
            exchange_all(self.stored)

    def _groups(self, cut: Sequence[int]) -> list[list[int]]:
        return groups_in_memory(self.model, self.layers, cut, [*self.fit, *self.check], self.memory_gb)

    def _fit(self, index: int, samples: LayerSamples, target_TD: Tensor | None) -> bool:
        kept = [e for e in range(self.projections[index].num_experts) if e not in self.drops[index]]
        report, weights = fit_layer(
            index, self.projections[index], samples, kept, ridge=self.ridge, sweeps=self.sweeps, target_TD=target_TD
        )
        self.reports.append(report)
        if report.applied:
            self.stored.append(StoredProjections(self.projections[index], weights))
        if self.progress is not None:
            self.progress(
                f"layer {index}: error on held-out tokens {report.error_before:.4f} -> {report.error_after:.4f}"
            )
        return report.applied


def _small(batch: Batch) -> Batch:
    """One sequence of a batch."""
    first = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
    rows = first.shape[0]
    return {
        name: value[:1] if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows else value
        for name, value in batch.items()
    }


def groups_in_memory(
    model: nn.Module, layers: Sequence[FoundLayer], cut: Sequence[int], batches: list[Batch], memory_gb: float
) -> list[list[int]]:
    """Layers that are read in one pass, so that their inputs fit into the memory allowed."""
    tokens = sum((b["input_ids"] if "input_ids" in b else b["inputs_embeds"][..., 0]).numel() for b in batches)
    groups: list[list[int]] = []
    used = 0.0
    for index in cut:
        size = sample_bytes(layers[index], tokens) / 1e9
        if not groups or used + size > memory_gb:
            groups.append([])
            used = 0.0
        groups[-1].append(index)
        used += size
    return groups
