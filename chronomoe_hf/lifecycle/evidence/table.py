"""Evidence: what a run, a live system or a profile knows about every expert. One frozen table.

Shape suffixes: E experts of a layer.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from chronomoe_hf.errors import EvidenceError
from chronomoe_hf.expert_numbers import PER_EXPERT, ExpertNumber
from chronomoe_hf.jsonfiles import parse_json, write_json
from chronomoe_hf.lifecycle.evidence.spec import (
    EvidenceSource,
    LayerSpec,
    Scores,
    plain_record,
    score_list,
    strict_fields,
)
from chronomoe_hf.telemetry import SystemSnapshot, read_manifest
from chronomoe_hf.telemetry.per_expert import newest_events
from chronomoe_hf.telemetry.reader import DIRECTORY

# What is known about the experts of one layer, and how it is put together from the layer's routing events.

# A number that goes by another name in evidence than in events.
_NAMED = {"phi_rows": "rows"}


@dataclass(frozen=True, kw_only=True)
class LayerEvidence:
    """What is known about the experts of one layer; every vector has one entry per expert, None = no evidence.

    Args:
        spec: the layer.
        counts: assignments over the windows read.
        rows: expert outputs read for it (evidence from a sample says so here).
        contribution: sum over its tokens of gate * |output|, estimated over all tokens.
        saliency: mean over its tokens of gate * |output| (REAP, arXiv 2510.13999).
        mean_norm: mean over its tokens of |output| (MAN, arXiv 2606.15716).
        gate_sum: sum of its gates, estimated over all tokens.
        fisher: sum over its tokens of (gate * dL/dgate)^2; opt-in, see :class:`~chronomoe_hf.lifecycle.FisherSums`.
        max_norm: largest |output| of a token; from :func:`~chronomoe_hf.lifecycle.calibrate` only.
        phi_fast, phi_mid, phi_slow: phase coherence, newest reading.
        total_tokens_seen: assignments since the run began, newest reading.
        router_drift: ``|W_e - W_e(start)| / |W_e(start)|`` of its row of the router's weight, newest reading; opt-in,
            see ``lifecycle__router_drift=True``.
    """

    spec: LayerSpec
    counts: tuple[int, ...]
    rows: Scores | None = None
    contribution: Scores | None = None
    saliency: Scores | None = None
    mean_norm: Scores | None = None
    gate_sum: Scores | None = None
    fisher: Scores | None = None
    max_norm: Scores | None = None
    phi_fast: Scores | None = None
    phi_mid: Scores | None = None
    phi_slow: Scores | None = None
    total_tokens_seen: Scores | None = None
    router_drift: Scores | None = None

    def __post_init__(self) -> None:
        num, where = self.spec.num_experts, f"layer {self.spec.layer_id} ({self.spec.name})"
        ok = len(self.counts) == num and all(type(count) is int and count >= 0 for count in self.counts)
        if not ok:
            raise EvidenceError(f"{where}: counts must be {num} whole numbers >= 0, got {self.counts!r}")
        for name in VECTORS:
            value = getattr(self, name)
            if value is not None:
                score_list(value, num, f"{where}: {name}", EvidenceError)

    @property
    def shares(self) -> Scores:
        """Share of the assignments per expert; None where nothing was routed."""
        total = sum(self.counts)
        return tuple(count / total if total else None for count in self.counts)


VECTORS = tuple(item.name for item in dataclasses.fields(LayerEvidence) if item.name not in ("spec", "counts"))
FIELDS = ("spec", "counts", *VECTORS)


def layer_from_events(spec: LayerSpec, events: list[dict[str, Any]]) -> LayerEvidence:
    """What the routing events of a layer, oldest first, say about its experts: sums add up, readings are the newest.

    Raises:
        EvidenceError: an event of another number of experts.
    """
    num = spec.num_experts
    rows = [event["expert_token_counts"] for event in events]
    for values in rows:
        if len(values) != num:
            raise EvidenceError(
                f"layer {spec.layer_id} ({spec.name}): {len(values)} counts for {num} experts; the records are of "
                "another model than the manifest"
            )
    counts = tuple(sum(int(values[expert]) for values in rows) for expert in range(num))
    tokens = [_tokens_of(event) for event in events]
    fields: dict[str, Scores | None] = {}
    for name, number in PER_EXPERT.items():
        if number.evidence:
            fields[_NAMED.get(name, name)] = _together(events, name, number, tokens, num)
    return LayerEvidence(spec=spec, counts=counts, **fields)


def _together(
    events: list[dict[str, Any]], name: str, number: ExpertNumber, tokens: list[list[float | None]], num: int
) -> Scores | None:
    """One number over all events, as the table says that its windows are put together."""
    if number.merge == "newest":
        return _merge(events, name, num, lambda values: values[-1])
    if number.merge == "count mean":
        return _mean(events, name, tokens, num)
    beside = "contribution" if number.needs == "outputs" else "tokens"
    read = [event for event in events if event.get(beside) is not None] or events
    if any(event.get(name) is None for event in read):
        return None  # older records lack it: a part is no sum of all
    return _merge(read, name, num, sum)


def _merge(events: list[dict[str, Any]], name: str, num: int, reduce: Callable[[list[float]], float]) -> Scores | None:
    """`reduce` over the events that carry `name`, expert by expert; None where none does."""
    rows = [event[name] for event in events if event.get(name) is not None]
    if not rows:
        return None
    known = [[float(row[expert]) for row in rows if row[expert] is not None] for expert in range(num)]
    return tuple(float(reduce(values)) if values else None for values in known)


def _tokens_of(event: dict[str, Any]) -> list[float | None]:
    """Tokens that the means of an event are over, expert by expert, as they were estimated from what was read."""
    counts = event["expert_token_counts"]
    sums, means = event.get("contribution"), event.get("saliency")
    if sums is None or means is None:
        return [None] * len(counts)
    each = zip(sums, means, counts, strict=True)  # a mean of 0 does not say over how many
    return [None if a is None or b is None else float(a) / float(b) if b else float(num) for a, b, num in each]


def _mean(events: list[dict[str, Any]], name: str, tokens: list[list[float | None]], num: int) -> Scores | None:
    """Mean over the events that carry `name`, weighted by their `tokens`, expert by expert; None where none does."""
    rows = [(event[name], own) for event, own in zip(events, tokens, strict=True) if event.get(name) is not None]
    if not rows:
        return None
    means: list[float | None] = []
    for expert in range(num):
        pairs = [
            (float(row[expert]), weight) for row, own in rows if (weight := own[expert]) and row[expert] is not None
        ]
        total = sum(weight for _, weight in pairs)
        means.append(sum(value * weight for value, weight in pairs) / total if total else None)
    return tuple(means)


FORMAT = "chronomoe_hf.evidence"
SCHEMA = 1
WINDOWS = 5
"""Windows that are read by default: the newest, so that the evidence is of the experts as they are now."""


class HasEvidence(Protocol):
    """What knows of experts: ``ChronoSystem``, which lies in a room to the right."""

    def evidence(self) -> Evidence:
        """Of its last closed window and the open one."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that is known about the experts of a model, and where it comes from.

    Args:
        source: run, steps and rows read.
        layers: one entry per MoE layer, by layer_id.
    """

    source: EvidenceSource
    layers: tuple[LayerEvidence, ...]

    def __post_init__(self) -> None:
        ids = [layer.spec.layer_id for layer in self.layers]
        if not ids or ids != list(range(len(ids))):
            raise EvidenceError(f"evidence covers the layers 0, 1, 2, ... of a model, got {ids}")

    @classmethod
    def from_system(cls, system: HasEvidence) -> Evidence:
        """The last closed window and the open one of a live system.

        Args:
            system: ``chronomoe_hf.system_of(model)``.

        Raises:
            EvidenceError: nothing has been recorded yet.
        """
        return system.evidence()

    @classmethod
    def from_directory(
        cls, directory: str | os.PathLike[str], *, windows: int = WINDOWS, mode: str | None = None
    ) -> Evidence:
        """The newest records of a run or of a profile.

        Args:
            directory: what the run wrote to (its ``chronomoe`` folder is read), or that folder itself.
            windows: how many of the newest windows are summed.
            mode: ``"TRAIN"``, ``"INFER"`` or ``"EVAL"``; None takes the first of these that was recorded.

        Raises:
            EvidenceError: there are no records, none of that mode, or they do not describe the model.
        """
        root = Path(directory)
        root = root.parent if root.name == DIRECTORY else root
        if windows < 1:
            raise EvidenceError(f"windows must be at least 1, got {windows}")
        path = root / DIRECTORY / "routing_events.jsonl"
        events, chosen, modes = newest_events(path.parent, windows, mode, ("TRAIN", "INFER", "EVAL"))
        manifest = read_manifest(root)
        if not modes or manifest is None:
            missing = "run_manifest.json" if manifest is None else "routing_events.jsonl"
            raise EvidenceError(
                f"no evidence in {root}: {DIRECTORY}/{missing} is missing or empty; give the output_dir of a run that "
                "wrote telemetry (telemetry.jsonl), or the directory of a profile"
            )
        if not events:
            raise EvidenceError(f"{path} has no records of mode {chosen!r}; it has {', '.join(sorted(modes))}")
        return assemble(
            [spec_of(row) for row in manifest.get("layers", [])],
            events,
            kind="run",
            run_id=str(manifest.get("run_id", "")),
            model_class=str(manifest.get("model_class", "")),
            mode=chosen,
            beta_law=_beta_law(manifest),
        )

    def with_vectors(self, **vectors: Sequence[Sequence[float | None]]) -> Evidence:
        """A copy in which per-layer vectors (``fisher=[[...], ...]``) are set.

        Raises:
            EvidenceError: no such vector, another number of layers or experts.
        """
        for name, rows in vectors.items():
            if name not in VECTORS or len(rows) != len(self.layers):
                raise EvidenceError(
                    f"{name} must be one of {', '.join(VECTORS)} with {len(self.layers)} layers, got {len(rows)}"
                )
        layers = []
        for index, layer in enumerate(self.layers):
            changed: dict[str, Any] = {name: tuple(rows[index]) for name, rows in vectors.items()}
            layers.append(dataclasses.replace(layer, **changed))
        return dataclasses.replace(self, layers=tuple(layers))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        layers = [{name: _json(getattr(layer, name)) for name in FIELDS} for layer in self.layers]
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "source": dataclasses.asdict(self.source),
            "layers": layers,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Evidence:
        """Inverse of :meth:`to_dict`.

        Raises:
            EvidenceError: not evidence, another schema, or malformed values.
        """
        record = strict_fields(data, "evidence", ("format", "schema", "source", "layers"), (), EvidenceError)
        if record["format"] != FORMAT or record["schema"] != SCHEMA or not isinstance(record["layers"], list):
            raise EvidenceError(
                f"expected format {FORMAT!r} with schema {SCHEMA}, got {record['format']!r} with {record['schema']!r}"
            )
        layers = [strict_fields(layer, "a layer", FIELDS, VECTORS, EvidenceError) for layer in record["layers"]]
        return cls(
            source=plain_record(EvidenceSource, record["source"], "the source", EvidenceError),
            layers=tuple(
                LayerEvidence(
                    spec=plain_record(LayerSpec, layer["spec"], "a layer's spec", EvidenceError),
                    **{name: _tuple(value) for name, value in layer.items() if name != "spec"},
                )
                for layer in layers
            ),
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as JSON, whole or not at all."""
        return write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evidence:
        """Read what :meth:`save` wrote. Raises EvidenceError where there is none, or it is none."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise EvidenceError(f"no evidence can be read from {path}: {problem}") from None
        return cls.from_dict(parse_json(text, "evidence", EvidenceError))


def _json(value: Any) -> Any:
    if isinstance(value, LayerSpec):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def spec_of(row: Mapping[str, Any]) -> LayerSpec:
    """A row of a layer table as a LayerSpec. Raises EvidenceError where it lacks the routing groups."""
    names = [item.name for item in dataclasses.fields(LayerSpec)]
    if "num_groups" not in row:
        raise EvidenceError(
            "the records do not say how many routing groups a layer has (written by an older version); take the "
            "evidence from the live model (Evidence.from_system) or from a new run"
        )
    return plain_record(LayerSpec, {name: row[name] for name in names if name in row}, "a layer", EvidenceError)


def _beta_law(manifest: Mapping[str, Any]) -> str:
    config = manifest.get("config")
    beta = config.get("beta") if isinstance(config, Mapping) else None
    return str(beta.get("law", "none")) if isinstance(beta, Mapping) else "none"


def from_snapshots(
    snapshots: Sequence[SystemSnapshot | None], specs: list[LayerSpec], *, run_id: str, model_class: str, beta_law: str
) -> Evidence:
    """What the windows of a live system say, oldest first; those without a token say nothing.

    Raises:
        EvidenceError: no window has a token.
    """
    seen = [snapshot for snapshot in snapshots if snapshot is not None and any(s.tokens for s in snapshot.layers)]
    if not seen:
        raise EvidenceError("the system has recorded no token yet; call system.step(...) after a training step")
    events = [
        {item.name: getattr(layer, item.name) for item in dataclasses.fields(layer)} | {"step": snapshot.step}
        for snapshot in seen
        for layer in snapshot.layers
    ]
    source = {"run_id": run_id, "model_class": model_class, "mode": seen[-1].mode, "beta_law": beta_law}
    return assemble(specs, events, kind="system", **source)


def assemble(specs: list[LayerSpec], events: list[dict[str, Any]], **source: Any) -> Evidence:
    """One LayerEvidence per layer from its events, oldest first."""
    by_layer: dict[int, list[dict[str, Any]]] = {spec.layer_id: [] for spec in specs}
    for event in sorted(events, key=lambda event: int(event["step"])):
        by_layer.get(event["layer_id"], []).append(event)
    if not specs:
        raise EvidenceError("the records name no MoE layer; was the run started by chronomoe_hf?")
    layers = [layer_from_events(spec, by_layer[spec.layer_id]) for spec in specs]
    steps = [int(event["step"]) for event in events]
    first = min(int(event["step"]) - max(1, int(event.get("window_steps") or 1)) + 1 for event in events)
    tokens = [sum(int(event.get("tokens") or 0) for event in group) for group in by_layer.values()]
    rows = [value for layer in layers for value in layer.rows or () if value is not None]
    return Evidence(
        source=EvidenceSource(
            first_step=max(0, first), last_step=max(steps), tokens=max(tokens), rows_read=round(sum(rows)), **source
        ),
        layers=tuple(layers),
    )
