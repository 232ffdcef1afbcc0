"""What a report shows of one run, read from its records once.

Shape suffixes: L layers, E experts (the largest layer).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chronomoe_hf.errors import TelemetryError
from chronomoe_hf.metrics import effective_experts
from chronomoe_hf.telemetry.arrays import Array, Frame
from chronomoe_hf.telemetry.events import COUNTS, RECORD_SCHEMA
from chronomoe_hf.telemetry.packed import PackedWindows
from chronomoe_hf.telemetry.per_expert import read_events, read_windows
from chronomoe_hf.telemetry.reader import (
    BASELINES,
    CUTS,
    DIRECTORY,
    EFFECTS,
    LOGS,
    REPLAY,
    SPLITS,
    read_each,
    read_jsonl,
    read_last,
    read_lines,
    read_manifest,
    schema_number,
)
from chronomoe_hf.telemetry.runs import History, Run
from chronomoe_hf.telemetry.views import (
    AlertView,
    Window,
    alert_views,
    last_cases,
    last_proposals,
    number,
    plain_text,
    roles_of,
    whole,
)

MAX_FRAMES = 100  # windows that the page holds in full; of longer runs an even choice, first and last included
_FIELDS = (COUNTS, "phi_slow", "beta")
DECISIONS = "lifecycle_decisions"
_MAX_JSON = 8 * 2**20  # a larger JSON file beside a run is not looked into for a plan's effect
_MAX_FILES = 200


@dataclass
class Governing:
    """What the controller did at one step, over all layers.

    Attributes:
        layers: layers that were decided on.
        acting: layers whose lens was open.
        scale: the largest lens scale.
        pressure: mean pressure.
        reasons: abstain reason -> layers.
    """

    layers: int = 0
    acting: int = 0
    scale: float = 0.0
    pressure: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)


MAX_REPLAY = 400  # windows of replay that are drawn


@dataclass
class RunData:
    """One run.

    Attributes:
        name: of the run; empty where the directory holds no window.
        directory: as given.
        manifest: of the run; empty where unknown.
        windows: training windows, oldest first.
        picked: the windows that the page shows in full.
        frames: step of a picked window -> its per-expert numbers.
        governing: step -> what the controller did.
        alerts: edges, oldest first.
        cases: last word of the dry-run lifecycle on each expert.
        effects: measured effects of plans.
        roles: of the newest window, layer by layer; empty where they were not kept.
        proposals: last word of the dry run on every merge, split and spawn.
        splits: ``(step, experts rewritten, layers)`` of every split.
        loss: ``(step, training loss)`` as Trainer logged it.
        learned: some weight could have changed; False where the run was configured with a learning rate of 0 and logged
            no other.
        resumes: ``(attempt, step)``.
        others: names of other runs in the directory.
        broken: lines and records that could not be read.
        newer: schemas of the windows that a newer version wrote.
        profile: ``profile.json`` of a profile; empty for a training run.
        baseline: layer -> its row of the last baseline record; empty where the run has none.
        eval_loss: ``(step, evaluation loss)`` as Trainer logged it.
        evaluations: ``(step, name)`` -> layer -> mean load of an evaluation, as its Neff / E.
        replay: what every window says of replay, oldest first, at most MAX_REPLAY.
    """

    name: str
    directory: Path
    manifest: dict[str, Any]
    windows: Sequence[Window]
    picked: list[Window]
    frames: dict[int, Frame]
    governing: dict[int, Governing]
    alerts: list[AlertView]
    cases: list[dict[str, Any]]
    effects: list[dict[str, Any]]
    loss: list[tuple[int, float]]
    resumes: list[tuple[int, int]]
    others: list[str]
    broken: int
    splits: list[tuple[int, int, int]] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=dict)
    roles: list[dict[str, Any]] = field(default_factory=list)
    proposals: list[dict[str, Any]] = field(default_factory=list)
    baseline: dict[int, dict[str, Any]] = field(default_factory=dict)
    eval_loss: list[tuple[int, float]] = field(default_factory=list)
    evaluations: dict[tuple[int, str], dict[int, float]] = field(default_factory=dict)
    replay: list[dict[str, Any]] = field(default_factory=list)
    learned: bool = True
    newer: list[int] = field(default_factory=list)

    @property
    def interval(self) -> int | None:
        """Optimizer steps in a window, as the run began with it."""
        return whole(self.manifest.get("interval"), 1) or whole(self.config.get("interval"), 1)

    @property
    def model(self) -> str:
        """Class and name of the model, as text."""
        known = (self.manifest.get("model_class"), self.manifest.get("model_name"))
        words = [plain_text(word, 200) for word in known if isinstance(word, str) and word]
        return " ".join(words) or (self.windows[-1].model_name if self.windows else "") or "unknown model"

    @property
    def config(self) -> dict[str, Any]:
        """The settings in force, as written in the manifest."""
        config = self.manifest.get("config")
        return config if isinstance(config, dict) else {}


def load_run(run_dir: str | Path, name: str | None = None) -> RunData:
    """Read one run of a directory: a Trainer's output_dir, a profile's, or the ``chronomoe`` folder inside it.

    Args:
        run_dir: the directory.
        name: of the run, or its beginning; by default the one that wrote last.

    Raises:
        TelemetryError: no records of ours, or no such run.
    """
    directory = _records_below(Path(run_dir))
    root = directory.parent if directory.name == DIRECTORY else directory
    last = read_last(directory / "snapshots.jsonl", 1, name=name)
    history = last.history
    newest = history.runs[-1] if history.runs else None
    run = last.run or (history.find(name) if name else newest)
    if name is not None and run is None:
        known = ", ".join(plain_text(r.name, 80) for r in history.runs) or "none"
        raise TelemetryError(f"no run {name!r} in {directory}; it holds {known}")
    shown, broken = read_each(directory / "snapshots.jsonl", lambda each: (schema_number(each), _packed(each)), run=run)
    windows = PackedWindows(packed for _, packed in shown if packed is not None)
    manifest = (run.manifest if run is not None else {}) or read_manifest(directory.parent) or {}
    rates = _logged(directory, run, "learning_rate") or _loss(root, "learning_rate")
    picked = pick(windows)
    alerts = [view for record in read_jsonl(directory / "alerts.jsonl", run=run)[0] for view in alert_views([record])]
    lifecycle, measured = (read_jsonl(directory / f"{name}.jsonl", run=run)[0] for name in (DECISIONS, EFFECTS))
    return RunData(
        name="" if run is None else plain_text(run.name, 80),
        directory=root,
        manifest=manifest,
        windows=windows,
        picked=picked,
        frames=_frames(directory, run, {window.step for window in picked}),
        governing=_governing(directory, history, run),
        alerts=alerts,
        cases=last_cases(lifecycle),
        effects=[*_effects(root, directory), *_effects_in(measured)],
        splits=_splits(read_jsonl(directory / f"{SPLITS}.jsonl", run=run)[0]),
        loss=_logged(directory, run) or _loss(root),
        resumes=[] if run is None else list(run.resumes),
        others=[plain_text(r.name, 80) for r in history.runs if run is None or r.name != run.name],
        broken=broken + len(shown) - len(windows),
        profile=_json(directory / "profile.json") or _domain_of(directory, run),
        roles=roles_of(last.records[-1]) if last.records else [],
        proposals=last_proposals(lifecycle, measured),
        baseline=_baseline(read_jsonl(directory / f"{BASELINES}.jsonl", run=run)[0]),
        eval_loss=_logged(directory, run, "eval_loss") or _loss(root, "eval_loss"),
        evaluations=_evaluations(directory, run),
        replay=read_jsonl(directory / f"{REPLAY}.jsonl", run=run)[0][-MAX_REPLAY:],
        newer=[schema for schema, _ in shown if schema > RECORD_SCHEMA],
        learned=manifest.get("learning_rate") != 0 or any(rate > 0 for _, rate in rates),
    )


def _records_below(root: Path) -> Path:
    found = next((d for d in (root / DIRECTORY, root) if any(d.glob("*.jsonl"))), None)
    if not root.exists():
        raise TelemetryError(
            f"there is no directory {root}; give the output_dir of a run or the directory of a profile"
        )
    if found is None:
        raise TelemetryError(
            f"no records in {root} or {root / DIRECTORY}; give the output_dir of a run that wrote telemetry "
            "(TelemetryConfig.jsonl)"
        )
    return found


def relative_load(run: RunData, step: int) -> tuple[Array, list[int]]:
    """Load over the fair share of every expert in one window, ``[L, E]``, and the layer ids.

    NaN beyond a layer's experts and for those that were cut, which take no part in the fair share.
    """
    frame = run.frames[step]
    count_LE = frame.arrays[COUNTS].astype(np.float64)
    count_LE = np.where(count_LE < 0, math.nan, count_LE)
    experts_L = np.isfinite(count_LE).sum(axis=1)
    total_L = np.nansum(count_LE, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative_LE = count_LE * experts_L[:, None] / total_L[:, None]
    return relative_LE, frame.layers


def _packed(record: dict[str, Any]) -> tuple[int, bytes] | None:
    window = Window.from_record(record)
    return None if window is None else PackedWindows.pack(window)


def pick(windows: Sequence[Window], most: int = MAX_FRAMES) -> list[Window]:
    """At most `most` windows, evenly spread, the first and the last among them."""
    if len(windows) <= most:
        return list(windows)
    return [windows[round(i * (len(windows) - 1) / (most - 1))] for i in range(most)]


def _frames(directory: Path, run: Run | None, steps: set[int]) -> dict[int, Frame]:
    found: dict[int, Frame] = {}
    for frame in read_windows(directory, run, _FIELDS):
        newer = frame.step not in found or frame.attempt >= found[frame.step].attempt
        if frame.step in steps and frame.mode != "EVAL" and newer and COUNTS in frame.arrays:
            arrays = {name: value_LE for name, value_LE in frame.arrays.items() if name in _FIELDS}
            found[frame.step] = Frame(**{**vars(frame), "arrays": arrays})
    for record in read_jsonl(directory / f"{CUTS}.jsonl", run=run)[0]:
        _leave_out(record, found)
    return found


def _leave_out(cut: Mapping[str, Any], frames: Mapping[int, Frame]) -> None:
    """Take the counts of experts that were cut out of the windows after the cut: they are not without a token."""
    step, kept = whole(cut.get("step")), cut.get("kept")
    if step is None or not isinstance(kept, list):
        return
    for frame in (frame for frame in frames.values() if frame.step > step):
        count_LE = frame.arrays[COUNTS] = frame.arrays[COUNTS].copy()
        for row, (layer, size) in enumerate(zip(frame.layers, frame.experts, strict=True)):
            if 0 <= layer < len(kept) and isinstance(kept[layer], list):
                stays = {whole(expert) for expert in kept[layer]}
                count_LE[row, [expert for expert in range(size) if expert not in stays]] = -1


def _governing(directory: Path, history: History, run: Run | None) -> dict[int, Governing]:
    """Decisions, added up a step at a time: a long run of many layers has too many to hold."""
    found: dict[int, Governing] = {}
    attempts: dict[int, int] = {}
    for record in _stream(directory / "control_decisions.jsonl"):
        step, attempt = whole(record.get("step")), whole(record.get("attempt")) or 0
        if step is None or history.overwritten(record) or (run and history.run_of(record).name != run.name):
            continue
        if attempt > attempts.get(step, -1):
            found[step], attempts[step] = Governing(), attempt
        elif attempt < attempts[step]:
            continue
        now, scale = found[step], number(record.get("scale")) or 0.0
        now.layers += 1
        now.acting += scale > 0.0
        now.scale = max(now.scale, scale)
        now.pressure += ((number(record.get("pressure")) or 0.0) - now.pressure) / now.layers
        if record.get("abstain_reason") is not None:
            now.reasons[plain_text(record["abstain_reason"], 60)] += 1
    return dict(sorted(found.items()))


def _stream(path: Path) -> Iterator[dict[str, Any]]:
    for _, record in read_lines(path) if path.is_file() else ():
        if record is not None:
            yield record


def _baseline(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Layer -> its row of the newest baseline record that has one."""
    found: dict[int, dict[str, Any]] = {}
    for record in records:
        rows = record.get("layers")
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and (index := whole(row.get("layer_id"))) is not None:
                found[index] = {**row, "source": plain_text(record.get("source") or "windows", 20)}
    return found


def _evaluations(directory: Path, run: Run | None) -> dict[tuple[int, str], dict[int, float]]:
    """Neff / E of every layer in every evaluation."""
    found: dict[tuple[int, str], dict[int, float]] = {}
    for record in read_events(directory, run, "EVAL"):
        step, layer, counts = whole(record.get("step")), whole(record.get("layer_id")), record.get(COUNTS)
        if step is None or layer is None or not isinstance(counts, list) or not counts:
            continue
        known = [whole(count) for count in counts]
        if None in known or not any(known):
            continue
        neff = effective_experts([count for count in known if count is not None])
        if neff is not None:
            found.setdefault((step, plain_text(record.get("evaluation") or "eval", 60)), {})[layer] = neff / len(counts)
    return dict(sorted(found.items()))


def _logged(directory: Path, run: Run | None, name: str = "loss") -> list[tuple[int, float]]:
    """A loss from ``logs.jsonl``."""
    records, _ = read_jsonl(directory / f"{LOGS}.jsonl", run=run)
    pairs = [(whole(record.get("step")), number(record.get(name))) for record in records]
    return sorted((step, loss) for step, loss in pairs if step is not None and loss is not None)


def _loss(root: Path, name: str = "loss") -> list[tuple[int, float]]:
    """A loss from the newest ``trainer_state.json`` of the run or its checkpoints."""
    paths = [*root.glob("checkpoint-*/trainer_state.json"), root / "trainer_state.json"]
    states = [(path.stat().st_mtime, path) for path in paths if path.is_file()]
    for _, path in sorted(states, reverse=True):
        history = (_json(path) or {}).get("log_history")
        entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
        pairs = [(whole(entry.get("step")), number(entry.get(name))) for entry in entries]
        return sorted((step, loss) for step, loss in pairs if step is not None and loss is not None)
    return []


def _json(path: Path) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > _MAX_JSON:
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _effects(*directories: Path) -> list[dict[str, Any]]:
    """Measured effects of plans in the JSON files of the run's folders, as ``measure`` and ``export`` leave them."""
    found = []
    for directory in dict.fromkeys(directories):
        for path in sorted(directory.glob("*.json"))[:_MAX_FILES]:
            record = _json(path) or {}
            for candidate in (record, record.get("effect"), record.get("export")):
                effect = _effect(candidate, path.name)
                if effect is not None:
                    found.append(effect)
    return found


def _splits(records: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """Step, experts rewritten, and layers in which they were; splits that found nothing idle are left out."""
    found = []
    for record in records:
        step, copies, layers = whole(record.get("step")), whole(record.get("copies")), record.get("layers")
        if step is None or not copies or not isinstance(layers, list):
            continue
        found.append((step, copies, sum(isinstance(each, Mapping) and bool(each.get("copies")) for each in layers)))
    return found


def _effects_in(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    effects = [_effect(record, f"step {plain_text(record.get('step'), 20)}") for record in records]
    return [effect for effect in effects if effect is not None]


def _effect(record: Any, where: str) -> dict[str, Any] | None:
    """Rank, survivors and rise of the loss of a plan, beside its controls; None for anything else."""
    if not isinstance(record, Mapping) or not isinstance(record.get("plan"), Mapping):
        return None
    if number(record["plan"].get("delta_loss")) is None:
        return None
    controls = record.get("random")
    listed = controls if isinstance(controls, list) else []
    rises = [number(each.get("delta_loss")) for each in listed if isinstance(each, Mapping)]
    known = [rise for rise in rises if rise is not None]
    worst = record.get("worst")
    return {
        "where": plain_text(where, 80),
        "rank": plain_text(record.get("rank"), 40),
        "kept": whole(record.get("num_kept")),
        "loss": number(record.get("loss")),
        "rise": number(record["plan"].get("delta_loss")),
        "error": number(record["plan"].get("delta_loss_error")),
        "random": sum(known) / len(known) if known else None,
        "worst": number(worst.get("delta_loss")) if isinstance(worst, Mapping) else None,
    }


def _domain_of(directory: Path, run: Run | None) -> dict[str, Any]:
    """What ``profile.json`` would say of one domain's own directory, which has none; empty for a training run."""
    manifest = {} if run is None else run.manifest
    if manifest.get("kind") != "profile":
        return {}
    total_LE: Array | None = None
    for frame in read_windows(directory, run, (COUNTS,)):
        if COUNTS in frame.arrays:
            count_LE = np.clip(np.nan_to_num(frame.arrays[COUNTS].astype(np.float64)), 0.0, None)
            total_LE = count_LE if total_LE is None or total_LE.shape != count_LE.shape else total_LE + count_LE
    layers = [row for row in manifest.get("layers") or [] if isinstance(row, dict)]
    if total_LE is None or len(layers) != len(total_LE):
        return {}
    sizes = [whole(row.get("num_experts"), 1) or total_LE.shape[1] for row in layers]
    counts = [[round(float(c)) for c in count_E[:size]] for count_E, size in zip(total_LE, sizes, strict=True)]
    top_k = whole(layers[0].get("top_k"), 1) or 1
    name = directory.parent.name
    return {
        "tokens": sum(counts[0]) // top_k,
        "layers": layers,
        "domains": [{"name": name, "tokens": sum(counts[0]) // top_k, "counts": counts}],
    }


def profile_counts(run: RunData) -> list[list[int]]:
    """Assignments per layer and expert of a profile, summed over its domains; empty where they cannot be read."""
    domains = run.profile.get("domains")
    tables = [d.get("counts") for d in domains if isinstance(d, dict)] if isinstance(domains, list) else []
    out: list[list[int]] = []
    for table in tables:
        rows = table if isinstance(table, list) else []
        known = [[whole(count) or 0 for count in row] for row in rows if isinstance(row, list) and row]
        if not out:
            out = known
        elif [len(row) for row in known] == [len(row) for row in out]:
            out = [[a + b for a, b in zip(one, two, strict=True)] for one, two in zip(out, known, strict=True)]
    return out
