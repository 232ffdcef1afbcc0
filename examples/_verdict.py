"""The last page of the main job: what became of the experts, per layer and arm, in numbers that a reader can check."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from chronomoe_hf import LayerSnapshot, SystemSnapshot
from chronomoe_hf.report import write_report

DASH = "-"
_CAPTION = "Losses on held-out code. Violation: the worst layer's, of its ceiling."


@dataclasses.dataclass(frozen=True)
class Arm:
    """One fine-tuning run.

    Attributes:
        preset: of ChronoConfig.
        snapshot: the last telemetry window of the training.
        loss_before, loss_after: on held-out text of the new domain, nats per token.
        seconds: wall time of ``trainer.train()``.
        output_dir: what the run wrote.
    """

    preset: str
    snapshot: SystemSnapshot
    loss_before: float
    loss_after: float
    seconds: float
    output_dir: Path


def layer_row(layer: LayerSnapshot, alerts: list[str]) -> dict[str, Any]:
    """The numbers shown for one layer; None where there is no evidence."""
    phi = [value for value in layer.phi_slow or [] if value is not None]
    violation, ceiling = layer.max_violation, layer.max_violation_ceiling
    return {
        "layer": layer.layer_id,
        "name": layer.layer_name,
        "n_experts": layer.n_experts,
        "neff_fraction": None if layer.n_effective is None else layer.n_effective / layer.n_experts,
        "dead": layer.dead_experts,
        "max_violation": violation,
        "max_violation_of_ceiling": violation / ceiling if violation is not None and ceiling else None,
        "phi_min": min(phi) if phi else None,
        "phi_max": max(phi) if phi else None,
        "alerts": alerts,
    }


def arm_record(arm: Arm) -> dict[str, Any]:
    """Everything the verdict says about one arm, JSON-ready."""
    active: dict[int | None, list[str]] = {}
    for alert in arm.snapshot.active_alerts:
        active.setdefault(alert.layer_id, []).append(alert.kind)
    return {
        "preset": arm.preset,
        "step": arm.snapshot.step,
        "loss_before": arm.loss_before,
        "loss_after": arm.loss_after,
        "seconds": round(arm.seconds, 1),
        "layers": [layer_row(layer, active.get(layer.layer_id, [])) for layer in arm.snapshot.layers],
    }


def save_verdict(arms: list[Arm]) -> Path:
    """Write ``verdict.json`` beside the arms' directories and return its path."""
    path = arms[0].output_dir.parent / "verdict.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [arm_record(arm) for arm in arms]
    path.write_text(json.dumps(records, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def save_report(arms: list[Arm]) -> Path:
    """Write ``report.html`` beside the arms' directories, the last arm beside the first, and return its path."""
    other = arms[0].output_dir if len(arms) > 1 else None
    return write_report(arms[-1].output_dir, arms[0].output_dir.parent / "report.html", other=other)


def notice(records: list[dict[str, Any]]) -> list[str]:
    """What to look at first, in three lines: experts, loss, and where the rest is told."""

    def experts(record: dict[str, Any]) -> str:
        rows = record["layers"]
        worst = min((row["neff_fraction"] for row in rows if row["neff_fraction"] is not None), default=None)
        return f"{_number(worst)} of its experts effective in the worst layer, {sum(r['dead'] or 0 for r in rows)} dead"

    last, first = records[-1], records[0]
    lines = [f"{last['preset']} ends with {experts(last)}"]
    loss = f"Its loss on held-out text ends at {last['loss_after']:.3f}"
    if len(records) > 1:
        lines[0] += f"; {first['preset']} with {experts(first)}."
        loss += (
            f", {last['loss_after'] - first['loss_after']:+.3f} beside {first['preset']}; one run of each says little"
        )
    return [lines[0].rstrip(".") + ".", f"{loss}.", "The report:"]


def print_verdict(arms: list[Arm], path: Path, console: Console | None = None, report: Path | None = None) -> None:
    """Print one table per arm, one line per arm that sums it up, the files written, and what to notice."""
    console = console or Console()
    records = [arm_record(arm) for arm in arms]
    for record in records:
        console.print(_layer_table(record))
    console.print(_summary_table(records))
    console.print("Files", style="bold")
    for arm in arms:
        for file in sorted(item for item in arm.output_dir.rglob("*") if item.is_file()):
            console.print(f"  {file}  {_size(file.stat().st_size)}", highlight=False, soft_wrap=True)
    console.print(f"  {path}  {_size(path.stat().st_size)}", highlight=False, soft_wrap=True)
    if report is not None:
        console.print("\nWhat to notice", style="bold")
        for line in notice(records):
            console.print(f"  {line}", highlight=False)
        console.print(f"  {report}", highlight=False, soft_wrap=True)


def _layer_table(record: dict[str, Any]) -> Table:
    title = f"{record['preset']}: last window, step {record['step']}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0))
    for name in ("layer", "Neff/E", "dead", "max violation", "of ceiling", "phi slow", "active alerts"):
        table.add_column(name, justify="left" if name == "active alerts" else "right")
    for row in record["layers"]:
        share = row["max_violation_of_ceiling"]
        phi = DASH if row["phi_min"] is None else f"{row['phi_min']:+.2f} .. {row['phi_max']:+.2f}"
        neff = row["neff_fraction"]
        table.add_row(
            str(row["layer"]),
            _number(neff),
            DASH if row["dead"] is None else f"{row['dead']}/{row['n_experts']}",
            _number(row["max_violation"]),
            DASH if share is None else f"{share:.0%}",
            phi,
            ", ".join(row["alerts"]) or "none",
            style="red" if row["dead"] or (neff is not None and neff < 0.4) else None,
        )
    return table


def _summary_table(records: list[dict[str, Any]]) -> Table:
    table = Table(
        title="Verdict",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0),
        caption=_CAPTION,
        caption_justify="left",
    )
    names = ("arm", "loss before", "after", "worst Neff/E", "dead", "violation", "alerts")
    for name in names:
        table.add_column(name, justify="left" if name == "arm" else "right")
    for record in records:
        rows = record["layers"]
        violations = [row["max_violation_of_ceiling"] for row in rows if row["max_violation_of_ceiling"] is not None]
        table.add_row(
            record["preset"],
            f"{record['loss_before']:.3f}",
            f"{record['loss_after']:.3f}",
            _number(min((row["neff_fraction"] for row in rows if row["neff_fraction"] is not None), default=None)),
            str(sum(row["dead"] or 0 for row in rows)),
            f"{max(violations):.0%}" if violations else DASH,
            str(sum(len(row["alerts"]) for row in rows)),
        )
    return table


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1024:.1f} KiB" if num_bytes < 1024**2 else f"{num_bytes / 1024**2:.1f} MiB"
