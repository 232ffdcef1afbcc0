"""``chronomoe inspect``: what can be done with a model, from its config alone; ``chronomoe support``: all families."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Annotated

import typer

from chronomoe_hf.cli.output import JsonOption, console, print_json, ranges

if TYPE_CHECKING:
    from rich.console import Console

    from chronomoe_hf.wrapping.support import LayerSupport, ModelSupport

READING = {
    "rows": "from the rows that the backend passes on",
    "replay": "from up to 64 tokens sent through the experts once more, without gradient",
    "division": "one expert a token: its output divided by its weight",
}


def register(app: typer.Typer) -> None:
    """Add ``inspect`` and ``support``."""
    app.command()(inspect)
    app.command()(support)


def inspect(
    model: Annotated[str, typer.Argument(help="Directory that save_pretrained wrote, or a Hub name.")],
    as_json: JsonOption = False,
) -> None:
    """What chronomoe_hf can do with MODEL, layer by layer; reads its config only, no weights."""
    quiet()
    from chronomoe_hf.wrapping.support import inspect_model

    support = inspect_model(model)
    if as_json:
        print_json(support.to_record())
    else:
        print_model(support, console())


def quiet() -> None:
    """No progress bars or advice of Transformers between our lines."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")


def print_model(support: ModelSupport, console: Console) -> None:
    """The tables of `support`."""
    from rich.box import ASCII, SIMPLE_HEAD
    from rich.table import Table

    from chronomoe_hf.patches.registry import CAPABILITIES
    from chronomoe_hf.telemetry.views import plain_text

    count = len(support.layers)
    console.print(f"{plain_text(support.model_class)} ({plain_text(support.model_type)}): {count} MoE layers")
    groups: dict[tuple[object, ...], list[LayerSupport]] = {}
    for layer in support.layers:
        groups.setdefault(_facts(layer), []).append(layer)
    table = Table(box=SIMPLE_HEAD if console.encoding.startswith("utf") else ASCII, show_header=False)
    table.add_column(style="bold")
    columns = [_column(layers, CAPABILITIES) for layers in groups.values()]
    for name in columns[0]:
        table.add_row(name, *(plain_text(column[name]) for column in columns))
    console.print(table)
    for refused in support.refused:
        console.print(f"  left alone: {plain_text(refused)}")


def _facts(layer: LayerSupport) -> tuple[object, ...]:
    """What layers must share to be shown in one column."""
    capabilities = tuple(sorted(layer.capabilities.items())), tuple(sorted(layer.refused.items()))
    numbers = layer.num_experts, layer.top_k, layer.native_bias
    return re.sub(r"\d+", "#", layer.name), layer.router_class, layer.rule, numbers, capabilities


def _column(layers: list[LayerSupport], capabilities: tuple[str, ...]) -> dict[str, str]:
    first = layers[0]
    return {
        "routers": f"{span([layer.name for layer in layers])} ({len(layers)})",
        "class": f"{first.router_class} ({first.family})",
        "rule": first.rule,
        "experts": f"{first.num_experts}, {first.top_k} per token",
        "native bias": "yes" if first.native_bias else "none",
        **{name: _capability(first, name) for name in capabilities},
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


def support(as_json: JsonOption = False) -> None:
    """The Markdown table of all supported families."""
    quiet()
    from chronomoe_hf.wrapping.support import support_rows, support_table

    if as_json:
        print_json(support_rows())
    else:
        print(support_table(), end="")
