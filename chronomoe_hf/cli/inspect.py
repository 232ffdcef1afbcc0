"""The ``chronomoe`` command."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chronomoe_hf.errors import ChronoError
from chronomoe_hf.patches.registry import CAPABILITIES
from chronomoe_hf.telemetry import read_jsonl
from chronomoe_hf.wrapping.support import LayerSupport, ModelSupport, inspect_model, support_table

READING = {
    "rows": "from the rows that the backend passes on",
    "replay": "from up to 64 tokens sent through the experts once more, without gradient",
    "division": "one expert a token: its output divided by its weight",
}
BARS = "▁▂▃▄▅▆▇█"

app = typer.Typer(help="Look at mixture-of-experts models and runs.", no_args_is_help=True, add_completion=False)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Directory that save_pretrained wrote, or a Hub name.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """What chronomoe_hf can do with MODEL, layer by layer; reads its config only, no weights."""
    _quiet()
    support = inspect_model(model)
    if as_json:
        print(json.dumps(support.to_record(), indent=2, allow_nan=False))
    else:
        _print_model(support, Console())


@app.command()
def support() -> None:
    """The Markdown table of all supported families."""
    _quiet()
    print(support_table(), end="")


@app.command()
def tail(
    run_dir: Annotated[Path, typer.Argument(help="A run's output_dir, or the chronomoe directory inside it.")],
    windows: Annotated[int, typer.Option("--windows", "-n", min=1, help="How many windows back.")] = 20,
) -> None:
    """The last windows of a run, layer by layer."""
    path = next(
        (p for p in (run_dir / "chronomoe" / "snapshots.jsonl", run_dir / "snapshots.jsonl") if p.is_file()), None
    )
    if path is None:
        raise ChronoError(
            f"no snapshots.jsonl in {run_dir} or {run_dir / 'chronomoe'}; a run writes one there when its first window "
            "closes (TelemetryConfig.jsonl)"
        )
    records, broken = read_jsonl(path)
    if not records:
        raise ChronoError(f"{path} holds no window yet")
    _print_run(records[-windows:], broken, Console())


def main() -> None:
    """Entry point: errors of ours are one message, not a traceback."""
    try:
        app()
    except ChronoError as error:
        Console(stderr=True).print(f"[bold red]error[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")


# ---- inspect -------------------------------------------------------------------------------------------------------


def _print_model(support: ModelSupport, console: Console) -> None:
    count = len(support.layers)
    console.print(f"[bold]{escape(support.model_class)}[/] ({escape(support.model_type)}): {count} MoE layers")
    groups: dict[tuple[object, ...], list[LayerSupport]] = {}
    for layer in support.layers:
        groups.setdefault(_facts(layer), []).append(layer)
    table = Table(box=SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold")
    columns = [_column(layers) for layers in groups.values()]
    for name in columns[0]:
        table.add_row(name, *(escape(column[name]) for column in columns))
    console.print(table)
    for refused in support.refused:
        console.print(f"  left alone: {refused}", markup=False, highlight=False)


def _facts(layer: LayerSupport) -> tuple[object, ...]:
    """What layers must share to be shown in one column."""
    capabilities = tuple(sorted(layer.capabilities.items())), tuple(sorted(layer.refused.items()))
    numbers = layer.num_experts, layer.top_k, layer.native_bias
    return re.sub(r"\d+", "#", layer.name), layer.router_class, layer.rule, numbers, capabilities


def _column(layers: list[LayerSupport]) -> dict[str, str]:
    first = layers[0]
    return {
        "routers": f"{span([layer.name for layer in layers])} ({len(layers)})",
        "class": f"{first.router_class} ({first.family})",
        "rule": first.rule,
        "experts": f"{first.num_experts}, {first.top_k} per token",
        "native bias": "yes" if first.native_bias else "none",
        **{name: _capability(first, name) for name in CAPABILITIES},
    }


def _capability(layer: LayerSupport, name: str) -> str:
    reason = layer.refused.get(name)
    if reason is not None:
        return f"no: {reason}"
    return f"yes, {READING[layer.capabilities[name]]}" if name == "coherence" else layer.capabilities[name]


def span(names: list[str]) -> str:
    """``model.layers.0-3,5.gate`` for names that differ in one number; else the first and the last."""
    parts = [re.split(r"(\d+)", name) for name in names]
    differing = [at for at, values in enumerate(zip(*parts, strict=True)) if len(set(values)) > 1]
    if not differing:
        return names[0]
    if len(differing) > 1:
        return f"{names[0]} .. {names[-1]}"
    (at,) = differing
    return "".join([*parts[0][:at], ranges([int(part[at]) for part in parts]), *parts[0][at + 1 :]])


def ranges(numbers: list[int]) -> str:
    """``0-3,5`` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# ---- tail ----------------------------------------------------------------------------------------------------------


def _print_run(records: list[dict[str, Any]], broken: int, console: Console) -> None:
    last = records[-1]
    steps = [record["step"] for record in records]
    console.print(f"[bold]{escape(str(last['run_id']))}[/], steps {steps[0]} to {steps[-1]}, {len(steps)} windows")
    table = Table(box=SIMPLE_HEAD)
    for name in ("layer", "Neff/E", "", "max violation", "", "dead", "phi mean", ""):
        table.add_column(name, justify="right" if name else "left")
    history = [record["layers"] for record in records]
    for index, layer in enumerate(history[-1]):
        past = [layers[index] for layers in history]
        neff = [None if p["n_effective"] is None else p["n_effective"] / p["n_experts"] for p in past]
        violation = [p["max_violation"] for p in past]
        phi = [p["coherence_mean"] for p in past]
        ceiling = layer["max_violation_ceiling"] or 1.0
        table.add_row(
            str(layer["layer_id"]),
            *(_number(neff[-1]), sparkline(neff, 0.0, 1.0)),
            *(_number(violation[-1]), sparkline(violation, 0.0, ceiling)),
            "-" if layer["dead"] is None else f"{layer['dead']}/{layer['n_experts']}",
            *(_number(phi[-1]), sparkline(phi, -1.0, 1.0)),
        )
    console.print(table)
    for alert in last["active_alerts"]:
        where = "run" if alert["layer_id"] is None else f"layer {alert['layer_id']}"
        console.print(f"  {alert['kind']}, {where}, since step {alert['step']}: {alert['detail']}", markup=False)
    if broken:
        console.print(f"  {broken} broken lines were skipped")


def sparkline(values: list[float | None], low: float, high: float) -> str:
    """One block character a value, on the fixed scale `low` to `high`; a blank where there is no evidence."""
    top = len(BARS) - 1
    spread = high - low
    return "".join(
        " " if value is None else BARS[min(top, max(0, round((value - low) / spread * top)))] for value in values
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
