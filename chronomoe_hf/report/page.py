"""One run, or two side by side, as one self-contained HTML file that opens offline under a strict CSP."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from chronomoe_hf.errors import ChronoError
from chronomoe_hf.jsonfiles import write_text
from chronomoe_hf.pictures import page as pictures_page
from chronomoe_hf.report import figures, figures_acting, figures_replay, figures_roles
from chronomoe_hf.report.against import against
from chronomoe_hf.report.compare import compare
from chronomoe_hf.report.data import RunData, load_run, profile_counts
from chronomoe_hf.report.domains import domain_names, domains
from chronomoe_hf.report.evaluation import evaluation
from chronomoe_hf.report.figures import Figure
from chronomoe_hf.report.pictures import baseline_figure, profile_figures
from chronomoe_hf.report.verdict import judge
from chronomoe_hf.telemetry.events import COUNTS
from chronomoe_hf.telemetry.layers import LOAD_NUMBERS
from chronomoe_hf.telemetry.views import plain_text

METRICS = (*LOAD_NUMBERS, "coherence_mean")
_TEMPLATES = "templates"


def write_report(
    run_dir: str | Path,
    output: str | Path | None = None,
    *,
    run: str | None = None,
    other: str | Path | Sequence[str | Path] | None = None,
    against: str | Path | None = None,
) -> Path:
    """Write the report of a run.

    Args:
        run_dir: a run's output_dir, a profile's directory, or the ``chronomoe`` folder inside it.
        output: the file; by default ``report.html`` in the run's directory.
        run: name of the run, or its beginning, where the directory holds several; by default the last.
        other: other runs' directories, to put all of them on one page.
        against: a profile or a run from before, to show what changed since.

    Returns:
        The file written.

    Raises:
        TelemetryError: there are no records, or no such run.
        ChronoError: the file cannot be written.
    """
    data = load_run(run_dir, run)
    target = data.directory / "report.html" if output is None else Path(output)
    directories = [other] if isinstance(other, str | os.PathLike) else list(other or ())
    before = None if against is None else load_run(against)
    return write_page(render(data, *map(load_run, directories), before=before), target)


def write_page(html: str, target: Path) -> Path:
    """Write a whole page or nothing.

    Raises:
        ChronoError: the file cannot be written.
    """
    try:
        write_text(target, html)
    except OSError as error:
        raise ChronoError(f"the report cannot be written to {target}: {error}; name another file with -o") from error
    return target


def render(run: RunData, *others: RunData, before: RunData | None = None) -> str:
    """The page as text: of `run`, beside `others`, and changed since `before`."""
    shown = sections(run)
    compared = compare([run, *others]) if others else None
    if compared is not None:
        shown.insert(0, compared.figure)
    if before is not None:
        shown.insert(0, against(run, before))
    specs = {figure.key: figure.spec for figure in shown if figure.spec is not None}
    pictures = {figure.picture.key: figure.picture.to_spec() for figure in shown if figure.picture is not None}
    style = pictures_page.part("pictures.css") + _file("style.css")
    script = _file("charts.js") + pictures_page.part("pictures.js")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["ticks"] = _ticks
    template = environment.from_string(_file("page.html"))
    return template.render(
        run=run,
        compared=compared,
        verdict=judge(run),
        figures=shown,
        facts=_facts(run),
        config=json.dumps(run.config, indent=1, sort_keys=True),
        style=Markup(style),
        script=Markup(script),
        policy=pictures_page.policy(style, script),
        data=_block(data_block(run)),
        specs=_block(specs),
        pictures=_block(pictures),
        glossary=Markup(pictures_page.glossary_section()),
    )


def sections(run: RunData) -> list[Figure]:
    """The plots in reading order."""
    if not run.windows:
        return [figures_acting.timeline(run)]
    if domain_names(run):
        return [*domains(run), *profile_figures(run), *figures_acting.lifecycle(run)]
    return [
        figures.effective_experts(run),
        *evaluation(run),
        figures.work(run),
        *([] if (changed := baseline_figure(run)) is None else [changed]),
        figures.imbalance(run),
        figures.coherence(run),
        figures_acting.governor(run),
        *figures_acting.lifecycle(run),
        *figures_replay.replay(run),
        *figures_roles.roles(run),
        figures_acting.timeline(run),
    ]


def data_block(run: RunData) -> dict[str, Any]:
    """The numbers behind the page as the records have them: a picked window and layer each, and the last counts."""
    layers = figures.layer_ids(run)
    last = run.frames.get(run.windows[-1].step) if run.windows else None
    counts = None
    if last is not None:
        counts = {str(layer): last.row(COUNTS, layer) for layer in last.layers}
    if run.profile and (sums := profile_counts(run)):
        counts = {str(at): list(row) for at, row in enumerate(sums)}
    return {
        "run": run.name,
        "model": run.model,
        "steps": [window.step for window in run.picked],
        "layers": [label for _, label in layers],
        "metrics": {name: [[_finite(v) for v in row] for row in _metric(run, name)] for name in METRICS},
        "last_counts": counts,
        "verdict": judge(run).to_record(),
        "alerts_in_force": [f"{a.kind} {a.where}" for a in (run.windows[-1].active if run.windows else [])],
        "loss": [list(pair) for pair in run.loss[-1:]],
    }


def _metric(run: RunData, name: str) -> list[list[float]]:
    return list(figures.matrix(run, lambda layer: layer.get(name)).tolist())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _of_a_step(run: RunData) -> str:
    """What the time of our own is a part of: a step, how long it took where the times of two windows tell."""
    known = [(window.time, window.step) for window in run.windows[-2:] if window.time is not None]
    if len(known) < 2 or known[1][1] <= known[0][1] or known[1][0] <= known[0][0]:
        return " a step in the last window"
    return f" of {1000 * (known[1][0] - known[0][0]) / (known[1][1] - known[0][1]):.3g} ms a step in the last window"


def _facts(run: RunData) -> list[tuple[str, str]]:
    """Small print: where the numbers come from."""
    manifest = run.manifest
    versions = manifest.get("versions")
    listed = (
        [f"{plain_text(n, 40)} {plain_text(v, 40)}" for n, v in versions.items()] if isinstance(versions, dict) else []
    )
    last = run.windows[-1] if run.windows else None
    overhead = None if last is None else last.scalars.get("step_ms", last.scalars.get("overhead_ms"))
    facts = [
        ("run", run.name or "unknown"),
        ("records", plain_text(run.directory)),
        ("started", plain_text(manifest.get("created") or "unknown", 60)),
        ("processes", plain_text(manifest.get("world_size") or "unknown", 20)),
        ("versions", ", ".join(listed) or "unknown"),
        ("windows", f"{len(run.windows)}, of which {len(run.picked)} are drawn"),
        ("our own time in step()", "unknown" if overhead is None else f"{overhead:.2f} ms{_of_a_step(run)}"),
        ("records skipped", str(run.broken)),
        ("other runs in the directory", ", ".join(run.others) or "none"),
        ("written", datetime.now(UTC).isoformat(timespec="seconds")),
    ]
    notes = manifest.get("notes")
    if isinstance(notes, list) and notes:
        facts.append(("notes of the run", "; ".join(plain_text(note, 300) for note in notes[:20])))
    return facts


def _ticks(text: str) -> Any:
    """Escaped text in which what stands between backticks is code."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(p) if i % 2 else Markup.escape(p) for i, p in enumerate(parts)
    )


def _file(name: str) -> str:
    return resources.files("chronomoe_hf.report").joinpath(_TEMPLATES, name).read_text(encoding="utf-8")


def _block(value: Any) -> Any:
    return Markup(pictures_page.block(value))
