"""The baseline that is there before the first step: a few training batches read forward only, or a profile.

Shape suffixes: L layers, E experts, R numbers of one row.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from chronomoe_hf import distributed
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.in_run.put_back import training_batches
from chronomoe_hf.lifecycle.live.model import (
    Batch,
    forward_arguments,
    uncompiled,
    untouched_randomness,
)
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.telemetry.reader import DIRECTORY, parse_line
from chronomoe_hf.telemetry.views import whole
from chronomoe_hf.wrapping.discovery import root_of

logger = logging.getLogger("chronomoe_hf")

FORWARD_BATCHES = 8  # batches a process that a forward baseline reads
PROFILE = "profile.json"


def set_baseline(system: ChronoSystem, model: nn.Module, batches: Iterable[Batch]) -> None:
    """Take the baseline that ``telemetry.baseline`` asks for, and record it. Collective.

    Nothing of the run changes by it: the forwards are of evaluation, without gradient, and every random state and every
    generator of the data loader is put back. ``"windows"`` does nothing here.

    Args:
        system: of the wrapped model, before its first step.
        model: what to run: the model that trains, or what an engine made of it.
        batches: the training data.

    Raises:
        ConfigError: the directory holds no profile of such a model.
    """
    source = str(system.config.telemetry.baseline)
    if source == "windows":
        return
    if source != "forward":
        layers = _of_profile(Path(source), [layer.num_experts for layer in system.layers])
        system.alerts.reference.set_counts("profile", layers, system.global_step)
    elif (found := _read_forward(system, model, batches)) is not None:
        system.alerts.reference.set_counts("forward", found, system.global_step)
    system.record_baseline()


def _read_forward(system: ChronoSystem, model: nn.Module, batches: Iterable[Batch]) -> dict[int, dict[str, Any]] | None:
    with untouched_randomness(), _untouched_loader(batches):
        read = training_batches(batches, FORWARD_BATCHES)
        names = inspect.signature(type(root_of(uncompiled(model))).forward).parameters
        fed = [{name: value for name, value in batch.items() if name in names} for batch in read]
        # Every rank runs the same number of forwards: under FSDP and ZeRO-3 each of them is a collective.
        fits = all("input_ids" in batch or "inputs_embeds" in batch for batch in fed)
        if not distributed.broadcast_object(bool(fed) and fits):
            logger.warning(
                "telemetry.baseline='forward': these batches are no arguments of the model's forward (%s), "
                "so the first windows of the run are the baseline",
                ", ".join(sorted(read[0])) if read else "there is none",
            )
            return None
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad(), system.recording_eval():
                for batch in fed:
                    model(**forward_arguments(model, batch, logits=False))
        finally:
            for module, mode in modes.items():
                module.training = mode
    return _of_sums(system, system.take_sums("eval").cpu().numpy())


def _of_sums(system: ChronoSystem, row_LR: Any) -> dict[int, dict[str, Any]]:
    """Counts of every layer, and the mean phi of those batches."""
    row, out = system.step_state.row, {}
    for layer in system.layers:
        at, size = layer.layer_id, layer.num_experts
        count_E = np.rint(row.count(row_LR[at])[:size])
        sum_E, weight_E = (row.expert(row_LR[at], name)[:size] for name in ("phi_weighted", "phi_weight"))
        known_E = weight_E > 0
        phi_E = sum_E[known_E] / weight_E[known_E]
        weighted = float((phi_E * count_E[known_E]).sum()), float(count_E[known_E].sum())
        mean = weighted[0] / weighted[1] if weighted[1] > 0 else math.nan
        out[at] = {
            "expert_token_counts": count_E.astype(np.int64).tolist(),
            "coherence_mean": mean if math.isfinite(mean) else None,
        }
    return out


def _of_profile(directory: Path, experts: list[int]) -> dict[int, dict[str, Any]]:
    """Counts of a profile, summed over its domains."""
    path = next((d / PROFILE for d in (directory / DIRECTORY, directory) if (d / PROFILE).is_file()), None)
    way_out = "make one with `chronomoe profile MODEL --data FILE -o DIR`, or use baseline='windows' or 'forward'"
    if path is None:
        raise ConfigError(f"telemetry.baseline is {str(directory)!r}, which holds no profile; {way_out}")
    record = parse_line(path.read_bytes()) or {}
    domains = record.get("domains")
    rows: list[Any] = []
    if isinstance(domains, list):
        rows = [domain.get("counts") for domain in domains if isinstance(domain, dict)]
    if not rows or not all(_fits(counts, experts) for counts in rows):
        raise ConfigError(
            f"the profile in {directory} is of another model: this one has layers of "
            f"{', '.join(map(str, sorted(set(experts))))} experts, {len(experts)} in all; {way_out}"
        )
    return {
        at: {"expert_token_counts": [sum(each) for each in zip(*(counts[at] for counts in rows), strict=True)]}
        for at in range(len(experts))
    }


def _fits(counts: Any, experts: list[int]) -> bool:
    return (
        isinstance(counts, list)
        and [len(row) if isinstance(row, list) else -1 for row in counts] == experts
        and all(whole(count) is not None for row in counts for count in row)
    )


@contextlib.contextmanager
def _untouched_loader(loader: Any) -> Iterator[None]:
    """Generators and epoch counters of a data loader and its samplers are put back after it was read."""
    kept: list[tuple[Any, str, Any]] = []
    queue, seen = [loader], set()
    while queue:
        part = queue.pop()
        if part is None or id(part) in seen or isinstance(part, int | float | str | bool):
            continue
        seen.add(id(part))
        if isinstance(part, torch.Generator):
            kept.append((part, "", part.get_state()))
            continue
        values = getattr(part, "__dict__", {})
        for name in ("epoch", "iteration"):
            if isinstance(values.get(name), int):
                kept.append((part, name, values[name]))
        for name in ("generator", "synchronized_generator", "sampler", "batch_sampler", "base_dataloader"):
            queue.append(getattr(part, name, None))
    try:
        yield
    finally:
        for part, name, value in kept:
            if name:
                setattr(part, name, value)
            else:
                part.set_state(value)
