"""Fitting the layers of a cut model one after the other, or all at once, and keeping what was found.

Shape suffixes: T tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.lifecycle.live.layer_fit import LayerRefit, fit_layer, routed_output
from chronomoe_hf.lifecycle.live.masking import mask_experts
from chronomoe_hf.lifecycle.live.model import Batch
from chronomoe_hf.lifecycle.live.projections import OutputProjections
from chronomoe_hf.lifecycle.live.samples import LayerSamples, collect_samples, sample_bytes, under_mask
from chronomoe_hf.lifecycle.live.streams import Stream, StreamTap, find_streams, full_streams, run_up_to
from chronomoe_hf.lifecycle.live.weights import Changes
from chronomoe_hf.wrapping.discovery import FoundLayer, root_of

logger = logging.getLogger("chronomoe_hf")

# Reading a model layer by layer, the layers before it cut already: the samples of a sequential refit.
#
# What a cut layer loses reaches every layer behind it. A sequential refit fits a layer on what reaches it in the *cut*
# model, towards what the full model has behind it, so that it also makes up for what the layers before it could not.
#
# Shape suffixes: T tokens, D hidden size.

_SAME = 1e-3  # outputs with blocks skipped against those without, relative


class CutReader:
    """Reads the cut model up to one layer after the other.

    From the third layer on, the blocks that were read before are not run again: they hand on what the last of them
    gave. Whether that gives the same is checked once; where it does not, everything is run.

    Args:
        model: in evaluation mode, without gradients.
        layers: all layers of the model.
        drops: ids of the experts that every layer loses.
        fit, check: batches whose tokens come first, and batches held out.

    Attributes:
        skips: whether blocks are skipped.
    """

    skips = True

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[FoundLayer],
        drops: Sequence[tuple[int, ...]],
        fit: Sequence[Batch],
        check: Sequence[Batch],
    ) -> None:
        self.model, self.layers, self.drops = model, layers, drops
        self.fit, self.check = fit, check
        self._modules = dict(root_of(model).named_modules())
        self._held: dict[str, list[Any]] = {}  # block -> its output, by batch
        self._before = ""  # block of the layer that was read before
        self._checked = False

    def read(self, index: int, stream: Stream) -> tuple[LayerSamples, Tensor]:
        """What the layer's experts read with it and all layers before it cut, and its stream ``(T, D)``.

        Args:
            index: the layer; those before it have been fitted.
            stream: its stream.
        """
        layers = self.layers[: index + 1]
        rows: list[tuple[Tensor, ...]] = []
        counts, outputs = 0, []
        block = self._modules[self._before] if self._before else None
        with mask_experts(layers, self.drops[: index + 1]):
            for number, batch in enumerate([*self.fit, *self.check]):
                taken, output = self._one(index, stream, block, number, batch)
                rows.append(taken)
                outputs.append(output)
                counts += taken[0].shape[0] if number < len(self.fit) else 0
        if block is not None and all(output is not None for output in outputs):
            stack = self._before.rpartition(".")[0]
            self._held = {name: held for name, held in self._held.items() if name.rpartition(".")[0] != stack}
            self._held[self._before] = outputs
        self._before = stream.block
        hidden_TD, index_TK, gate_TK, stream_TD = (torch.cat(column) for column in zip(*rows, strict=True))
        return LayerSamples(hidden_TD, counts, index_TK, gate_TK, index_TK, gate_TK), stream_TD

    def _one(
        self, index: int, stream: Stream, block: nn.Module | None, number: int, batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        """One batch: the rows of the layer, and the output of `block`."""
        if not self.skips or not self._held:
            return self._forward(index, stream, block, batch)
        if self._checked:
            with self._skipping(number):
                return self._forward(index, stream, block, batch)
        self._checked = True
        whole = self._forward(index, stream, block, batch)
        try:
            with self._skipping(number):
                short = self._forward(index, stream, block, batch)
            same = all(_close(a, b) for a, b in zip(whole[0], short[0], strict=True))
        except (LifecycleError, RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
            same = False  # whatever the model's trunk does with a block's output, the whole forward is right
        self.skips = same
        return whole

    def _forward(
        self, index: int, stream: Stream, block: nn.Module | None, batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        given: list[Any] = []
        handle = None
        if block is not None:
            handle = block.register_forward_hook(lambda module, args, output: given.append(output))
        try:
            with StreamTap(self.layers[index], stream, last=True) as tap:
                run_up_to(self.model, batch)
                return tap.take(), given[0] if len(given) == 1 else None
        finally:
            if handle is not None:
                handle.remove()

    @contextlib.contextmanager
    def _skipping(self, number: int) -> Iterator[None]:
        """Blocks up to the one whose output is held hand that output on and run nothing."""
        put: list[tuple[nn.Module, Any]] = []
        try:
            for last, held in self._held.items():
                stack, _, at = last.rpartition(".")
                for place in range(int(at) + 1):
                    block = self._modules[f"{stack}.{place}"]
                    put.append((block, block.__dict__.get("forward")))
                    block.__dict__["forward"] = lambda *args, held=held[number], **kwargs: held
            yield
        finally:
            for block, forward in put:
                if forward is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = forward


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return bool((one == other).float().mean() > 1.0 - _SAME)
    size = float(one.float().norm())
    return float((one.float() - other.float()).norm()) <= _SAME * max(size, 1e-30)


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


def versions_of(stored: Sequence[StoredProjections]) -> list[int]:
    """How often the tensors of these projections were written: other numbers say that somebody wrote since."""
    return [each.projections.place(expert)[0]._version for each in stored for expert in each.weights]


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
            zip(cut, find_streams(self.model, [self.layers[i] for i in cut], first_rows(self.fit[0])), strict=True)
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
        return groups_in_memory(self.layers, cut, [*self.fit, *self.check], self.memory_gb)

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


def first_rows(batch: Batch, count: int = 1) -> Batch:
    """The first `count` sequences of a batch."""
    rows = _ids(batch).shape[0]
    return {
        name: value[:count] if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows else value
        for name, value in batch.items()
    }


def num_tokens(batch: Batch) -> int:
    """Tokens of a batch, padding with them."""
    first = _ids(batch)
    return first.shape[0] * first.shape[1]


def _ids(batch: Batch) -> Tensor:
    ids: Tensor = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
    return ids


def within_memory(layers: Sequence[FoundLayer], batches: Sequence[Batch], memory_gb: float, what: str) -> list[Batch]:
    """As many of the first sequences as one layer can be planned or fitted on in that memory; at least one.

    A token of a layer takes its input, three fp32 vectors of that width (the input, a target and what is left of it)
    and its fp32 logits.

    Args:
        layers: that are to be read; the widest counts.
        batches: in the order in which they are used.
        memory_gb: allowed, 10^9 bytes.
        what: who reads, for the warning that fewer tokens are read than given.
    """
    per_token = max(
        sample_bytes(layer, 1)
        + 12 * next(layer.router.parameters()).shape[-1]
        + 4 * layer.adapter.num_experts(layer.router)
        for layer in layers
    )
    allowed, used = int(memory_gb * 1e9 / per_token), 0
    out: list[Batch] = []
    for batch in batches:
        rows, tokens = _ids(batch).shape[0], num_tokens(batch)
        fitting = rows if used + tokens <= allowed else (allowed - used) * rows // tokens
        fitting = max(fitting, 0 if out else 1)
        if fitting > 0:
            out.append(batch if fitting == rows else first_rows(batch, fitting))
            used += num_tokens(out[-1])
        if fitting < rows:
            break
    given = sum(map(num_tokens, batches))
    if used < given:
        logger.warning(
            "%s reads %d of the %d tokens that it was given: memory_gb=%g holds no more of one layer, at %.1f kB a "
            "token; raise memory_gb to read more",
            what,
            used,
            given,
            memory_gb,
            per_token / 1e3,
        )
    return out


def groups_in_memory(
    layers: Sequence[FoundLayer], cut: Sequence[int], batches: list[Batch], memory_gb: float
) -> list[list[int]]:
    """Layers that are read in one pass, so that their inputs fit into the memory allowed."""
    tokens = sum(map(num_tokens, batches))
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
