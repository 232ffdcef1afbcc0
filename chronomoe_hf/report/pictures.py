"""The pictures of a profile, and of two states of a model, as figures of the page; sums over a profile, never a window.

Shape suffixes: D domains, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chronomoe_hf.pictures.domains import DomainLoads
from chronomoe_hf.pictures.flows import flow_picture
from chronomoe_hf.pictures.loads import Load, before_after_picture, load_picture
from chronomoe_hf.pictures.picture import Picture
from chronomoe_hf.report.data import RunData
from chronomoe_hf.report.figures import Figure
from chronomoe_hf.report.words import listed
from chronomoe_hf.telemetry.events import COUNTS
from chronomoe_hf.telemetry.reader import DIRECTORY
from chronomoe_hf.telemetry.views import number, plain_text, whole

FLOWS = "flow.safetensors"
_MOST_BYTES = 256 * 2**20  # a larger file is left unread


def profile_figures(run: RunData) -> list[Figure]:
    """Which expert serves which domain, those that serve one only, and what hands to what."""
    figures = []
    loads = domain_loads(run)
    if loads is not None:
        figures.append(_load_figure(loads))
    if loads is not None and len(loads.names) > 1:
        figures.append(_pictured(loads.picture(), *loads.table(), sortable=True))
        head, rows = loads.only_table()
        if rows:
            busiest = rows[0]
            text = (
                f"{len(rows)} experts do almost all of their work on one domain; the busiest is expert {busiest[2]} of "
            )
            text += f"layer {busiest[1]}, for {busiest[0]}."
            note = "A cut decided on another domain alone would take them away first."
            figures.append(
                Figure("only", "Experts that only serve one domain", text, None, head, rows, note, sortable=True)
            )
    flows = _flows(run)
    picture = None if flows is None else flow_picture(*flows)
    if picture is not None:
        figures.append(_pictured(picture, [], []))
    return figures


def _load_figure(loads: DomainLoads) -> Figure:
    """Who does the work, over the whole profile."""
    tables = list(zip(*loads.counts, strict=True))
    sums = [[sum(counts) for counts in zip(*layer, strict=True)] for layer in tables]
    layers = [Load(label, row, k) for label, row, k in zip(loads.labels, sums, loads.top_k, strict=True)]
    picture = load_picture(layers, "Who does the work", key="work")
    head = ["layer", "busiest", "x fair share", "idlest with tokens", "x fair share", "without a token"]
    return _pictured(picture, head, [_load_row(layer) for layer in layers])


def _load_row(layer: Load) -> list[str]:
    known = [(value, expert) for expert, value in enumerate(layer.relative) if value is not None]
    used = [pair for pair in known if pair[0] > 0]
    if not used:
        return [layer.label, "-", "-", "-", "-", "-"]
    busy, idle = max(used), min(used)
    dead = [str(expert) for value, expert in known if value == 0]
    return [layer.label, str(busy[1]), f"{busy[0]:.2f}", str(idle[1]), f"{idle[0]:.2f}", listed(dead, 8)]


def baseline_figure(run: RunData) -> Figure | None:
    """Every expert at the baseline of a run and in its last window; None where either is not known."""
    last = run.frames.get(run.windows[-1].step) if run.windows else None
    if last is None or not run.baseline:
        return None
    rows: list[tuple[Load, Load]] = []
    for layer in run.windows[-1].layers:
        entry = run.baseline.get(layer.index, {})
        counts, now = entry.get(COUNTS), last.row(COUNTS, layer.index) if layer.index in last.layers else None
        if not isinstance(counts, list) or not now or len(counts) != len(now):
            continue
        alive = [value is not None and (whole(value) or 0) >= 0 for value in now]
        pair = [[whole(v) if ok else None for v, ok in zip(values, alive, strict=True)] for values in (counts, now)]
        rows.append((Load(layer.layer_id, pair[0], layer.top_k or 1), Load(layer.layer_id, pair[1], layer.top_k or 1)))
    if not rows:
        return None
    names = ("baseline", f"step {run.windows[-1].step}")
    picture = before_after_picture([one for one, _ in rows], [two for _, two in rows], names, same_text=False)
    return _pictured(picture, [], [])


def changed_picture(
    before: Sequence[Sequence[float | None]],
    after: Sequence[Sequence[float | None]],
    top_k: Sequence[int],
    names: tuple[str, str],
    same_text: bool = False,
) -> Picture:
    """Every expert of every layer in two states.

    Args:
        before: assignments ``[L][E]``; None for an expert that takes no part.
        after: the same later.
        top_k: experts per token, length L.
        names: of the two states.
        same_text: both are of the same text.
    """
    one, two = (
        [Load(str(at), list(row), k) for at, (row, k) in enumerate(zip(counts, top_k, strict=True))]
        for counts in (before, after)
    )
    return before_after_picture(one, two, (plain_text(names[0], 40), plain_text(names[1], 40)), same_text)


def _pictured(picture: Picture, head: list[str], rows: list[list[str]], sortable: bool = False) -> Figure:
    return Figure(picture.key, picture.title, picture.sentence, None, head, rows, picture.note, picture, sortable)


def domain_loads(run: RunData) -> DomainLoads | None:
    """The sums of a profile by domain; None where they cannot be read."""
    entries = run.profile.get("domains")
    domains = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    layers = run.profile.get("layers")
    rows = [row for row in layers if isinstance(row, dict)] if isinstance(layers, list) else []
    counts = [_table(domain.get("counts"), whole) for domain in domains]
    shapes = {tuple(len(row) for row in table) for table in counts}
    if not rows or len(shapes) != 1 or len(next(iter(shapes))) != len(rows):
        return None
    given = [_table(domain.get("contribution"), number) for domain in domains]
    whole_given = all(tuple(len(row) for row in table) in shapes for table in given)
    return DomainLoads(
        names=[plain_text(domain.get("name"), 40) for domain in domains],
        labels=[plain_text(row.get("layer_id"), 20) for row in rows],
        top_k=[whole(row.get("top_k"), 1) or 1 for row in rows],
        counts=[[[max(0, round(c or 0)) for c in row] for row in table] for table in counts],
        contribution=given if whole_given else None,
    )


def _table(value: Any, read: Any) -> list[list[Any]]:
    rows = value if isinstance(value, list) else []
    return [[read(cell) for cell in row] if isinstance(row, list) else [] for row in rows]


def _flows(run: RunData) -> tuple[list[str], list[Any], dict[str, list[Any]]] | None:
    """Labels of the layers, and the flow from each to the next: summed over the domains, and of each alone."""
    layers = run.profile.get("layers")
    rows = [row for row in layers if isinstance(row, dict)] if isinstance(layers, list) else []
    path = next((p for p in (run.directory / DIRECTORY / FLOWS, run.directory / FLOWS) if p.is_file()), None)
    if path is None or len(rows) < 2 or path.stat().st_size > _MOST_BYTES:
        return None
    sums: list[Any] = [None] * (len(rows) - 1)
    alone: dict[str, list[Any]] = {}
    for name, table in _tensors(path).items():
        domain, _, number_of = name.rpartition(".")
        at = int(number_of) if number_of.isdecimal() else len(sums)
        if at >= len(sums) or table.ndim != 2 or (table < 0).any():
            continue
        if sums[at] is not None and sums[at].shape != table.shape:
            continue
        sums[at] = table if sums[at] is None else sums[at] + table
        alone.setdefault(plain_text(domain, 40), [None] * len(sums))[at] = table
    return [plain_text(row.get("layer_id"), 20) for row in rows], sums, alone


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return {name: value for name, value in load_file(path).items() if value.dtype == np.int64}
    except (SafetensorError, OSError, ValueError):
        return {}
