"""The records of a profile: those of a run for each domain and for all together, and the summary of a profile.

Shape suffixes: L layers, E experts, R numbers of one accumulator row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from chronomoe_hf import distributed
from chronomoe_hf.jsonfiles import write_bytes, write_json
from chronomoe_hf.metrics import js
from chronomoe_hf.pictures.shown import Looks, Shown
from chronomoe_hf.profiling.looks import profile_looks
from chronomoe_hf.step_state import StepState
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.telemetry import SystemSnapshot, TelemetryWriter, run_manifest
from chronomoe_hf.window.events import layer_events

SUMMARY = "profile.json"
PAIRS = "coactivation.safetensors"
FLOWS = "flow.safetensors"
PROFILE_SCHEMA = 1


class Records:
    """Windows of one stream of text, written as a run's records.

    Args:
        system: of the wrapped model; only its layers and settings are read.
        output_dir: records go to ``<output_dir>/chronomoe``; None writes nothing.
        run_id: of the profile.
        interval: steps in a window.
        model_name: for people.
        about: further entries of the manifest.
    """

    def __init__(
        self,
        system: ChronoSystem,
        output_dir: Path | None,
        *,
        run_id: str,
        interval: int,
        model_name: str,
        about: Mapping[str, Any],
    ) -> None:
        self.system, self.interval, self.run_id, self.model_name = system, interval, run_id, model_name
        self.state = StepState([layer.num_experts for layer in system.layers])
        self.step = 0
        self.window_steps = 0
        self.count_LE = np.zeros((len(system.layers), self.state.row.width), dtype=np.int64)
        self.given_LE = np.zeros(self.count_LE.shape)
        self.last: SystemSnapshot | None = None
        self.writer: TelemetryWriter | None = None
        if output_dir is not None and distributed.is_main():
            self.writer = TelemetryWriter(run_id, output_dir)
            manifest = run_manifest(
                run_id=run_id,
                config=system.config,
                layers=[layer.table_row() for layer in system.layers],
                model_class=type(system.model).__name__,
                model_name=model_name,
                world_size=distributed.world_size(),
                notes=[f"layer {layer.layer_id}: {note}" for layer in system.layers for note in layer.notes],
            )
            self.writer.write_manifest({**manifest, "kind": "profile", **about})

    def add(self, row_LR: Tensor, loss: float | None) -> None:
        """One step's sums over all ranks; closes the window every `interval` steps."""
        if self.state.device != row_LR.device:
            self.state.to_(row_LR.device)
        self.step += 1
        self.window_steps += 1
        self.state.update(row_LR, self.step, self.system.config.veto)
        if self.window_steps == self.interval:
            self.close_window(loss)

    def close_window(self, loss: float | None) -> None:
        """Write what was added since the last window, if anything."""
        if self.window_steps == 0:
            return
        host = self.state.host()
        self.count_LE += np.rint(self.state.row.count(host["window"])).astype(np.int64)
        self.given_LE += np.nan_to_num(self.state.row.expert(host["window"], "contribution"))
        events = layer_events(
            self.system.layers,
            self.state.row,
            host,
            run_id=self.run_id,
            attempt=0,
            step=self.step,
            mode="INFER",
            window_steps=self.window_steps,
            config=self.system.config,
        )
        snapshot = SystemSnapshot.from_events(
            events=events,
            step=self.step,
            run_id=self.run_id,
            model_name=self.model_name,
            n_layers=len(self.system.layers),
            alert_history=None,
            val_loss=loss,
            config=self.system.config.alerts,
        )
        # Nothing was trained: there is nothing to alert about, whatever the level of the load.
        snapshot = dataclasses.replace(snapshot, alerts=[], active_alerts=[])
        if self.writer is not None:
            self.writer.write_many("routing_events", events)
            self.writer.write("snapshots", snapshot)
        self.last = snapshot
        self.state.close_window()
        self.window_steps = 0

    def counts(self) -> list[list[int]]:
        """Assignments per layer and expert so far."""
        return [row[: layer.num_experts].tolist() for row, layer in zip(self.count_LE, self.system.layers, strict=True)]

    def contribution(self) -> list[list[float] | None]:
        """Sum of gate times output norm per layer and expert so far; None for a layer whose outputs are not read."""
        rows = zip(self.given_LE, self.system.layers, strict=True)
        return [
            row[: layer.num_experts].tolist() if layer.experts is not None and row.any() else None
            for row, layer in rows
        ]

    def close(self) -> None:
        """Close the files."""
        if self.writer is not None:
            self.writer.close()


@dataclass(frozen=True, kw_only=True)
class DomainProfile:
    """One domain of a profile.

    Attributes:
        name, source: as given.
        tokens: real tokens fed, sequences: how many they were cut into.
        loss: mean next-token loss in nats; None for a model without a language-model head.
        counts: assignments per layer and expert.
        pairs: per layer, the pairs of experts chosen together most above chance.
        contribution: sum of gate times output norm per layer and expert; None for a layer whose outputs are not read.
    """

    name: str
    source: str
    tokens: int
    sequences: int
    loss: float | None
    counts: list[list[int]]
    pairs: list[list[dict[str, Any]]]
    contribution: list[list[float] | None] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, repr=False)
class ProfileReport(Shown):
    """What a profile found; the records of each domain are below `directory`.

    Attributes:
        directory: where the records are, None if nothing was written.
        run_id, model_name, model_class: whose profile it is.
        layers: table of the MoE layers.
        domains: by name.
        distances: per layer, Jensen-Shannon distance of the domains' loads, ``[domain][domain]`` in [0, 1].
        seconds: wall time.
    """

    directory: str | None
    run_id: str
    model_name: str
    model_class: str
    layers: list[dict[str, Any]]
    domains: dict[str, DomainProfile]
    distances: list[list[list[float | None]]]
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens of all domains."""
        return sum(domain.tokens for domain in self.domains.values())

    def _looks(self) -> Looks:
        return profile_looks(self.model_name or self.model_class, self.layers, list(self.domains.values()))

    def distance(self, one: str, other: str) -> float | None:
        """Mean over layers of the distance between two domains; None where nothing was counted."""
        names = list(self.domains)
        known = [d for layer in self.distances if (d := layer[names.index(one)][names.index(other)]) is not None]
        return sum(known) / len(known) if known else None

    def to_record(self) -> dict[str, Any]:
        """Strict-JSON dictionary, the content of ``profile.json``."""
        names = list(self.domains)
        return {
            "schema": PROFILE_SCHEMA,
            "run_id": self.run_id,
            "model_name": self.model_name,
            "model_class": self.model_class,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "layers": self.layers,
            "domains": [vars(domain) for domain in self.domains.values()],
            "distance": {
                "names": names,
                "mean": [[self.distance(a, b) for b in names] for a in names],
                "layers": self.distances,
            },
        }


def load_distances(counts: Sequence[Sequence[Sequence[int]]]) -> list[list[list[float | None]]]:
    """Jensen-Shannon distance sqrt(JS / ln 2) between the loads of domains.

    Args:
        counts: ``[domain][layer][expert]``.

    Returns:
        ``[layer][domain][domain]`` in [0, 1]; None where a domain counted nothing in the layer.
    """
    out: list[list[list[float | None]]] = []
    for layer in zip(*counts, strict=True):
        loads = [torch.tensor(row, dtype=torch.float64) for row in layer]
        out.append([[_distance(a, b) for b in loads] for a in loads])
    return out


def _distance(a_E: Tensor, b_E: Tensor) -> float | None:
    if not (a_E.sum() > 0 and b_E.sum() > 0):
        return None
    divergence = float(js((a_E / a_E.sum())[None], (b_E / b_E.sum())[None]))
    return math.sqrt(max(divergence, 0.0) / math.log(2.0))


def write_summary(
    directory: Path,
    report: ProfileReport,
    pairs: Mapping[str, Sequence[Tensor]],
    flows: Mapping[str, Sequence[Tensor | None]],
) -> None:
    """``profile.json``, the whole pair counts and the flow between layers.

    ``coactivation.safetensors`` holds ``<domain>.<layer>`` int64 [E, E]; ``flow.safetensors`` the same keys, from a
    layer to the next, where the two are called one after the other.
    """
    folder = directory / "chronomoe"
    for file, tables in ((PAIRS, pairs), (FLOWS, flows)):
        named = {f"{name}.{at}": pair for name, layers in tables.items() for at, pair in enumerate(layers)}
        tensors = {name: value.clone() for name, value in named.items() if value is not None}
        write_bytes(folder / file, safetensors.torch.save(tensors))
    write_json(folder / SUMMARY, report.to_record())
