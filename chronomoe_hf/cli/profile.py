"""``chronomoe profile``: text through a checkpoint, no training; the records of a run, per domain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chronomoe_hf.cli import models
from chronomoe_hf.cli.output import JsonOption, console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from chronomoe_hf.profiling import ProfileReport

DataOption = Annotated[
    list[str] | None,
    typer.Option("--data", help="File (.txt .jsonl .parquet .csv ...) or Hub name; may be repeated."),
]
DomainOption = Annotated[
    list[str] | None, typer.Option("--domain", help="NAME=FILE: text under a name of its own; may be repeated.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(profile)


def profile(
    model: models.ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="New directory for the records.")],
    data: DataOption = None,
    domain: DomainOption = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Most tokens of a domain.")] = 100_000,
    length: models.LengthOption = 1024,
    batch_size: models.BatchOption = 4,
    column: models.ColumnOption = "text",
    device_map: models.DeviceOption = None,
    dtype: models.DtypeOption = "auto",
    tokenizer: models.TokenizerOption = None,
    progress: models.ProgressOption = True,
    as_json: JsonOption = False,
) -> None:
    """Send text through MODEL and record its routing, per domain; no weight changes."""
    sources = named(data or [], domain or [])
    from chronomoe_hf.profiling.data import check_sources

    check_sources(sources, column)  # before minutes of loading a model
    models.quiet(progress and not as_json)
    from chronomoe_hf.profiling import profile as run

    report = run(
        models.load_model(model, dtype, device_map),
        models.load_tokenizer(tokenizer or model),
        sources,
        output_dir=out,
        tokens=tokens,
        length=length,
        batch_size=batch_size,
        column=column,
        model_name=model,
        progress=progress and not as_json,
    )
    if as_json:
        print_json(report.to_record())
    else:
        print_report(report, console())


def named(data: list[str], domain: list[str]) -> dict[str, str]:
    """Sources by domain: ``--domain NAME=FILE``, and ``--data FILE`` under the name of the file."""
    from chronomoe_hf.profiling.data import domain_name

    pairs = [(domain_name(source), source) for source in data]
    for text in domain:
        name, sign, source = text.partition("=")
        if not (name and sign and source):
            raise typer.BadParameter(f"{text!r} is not NAME=FILE", param_hint="--domain")
        pairs.append((name, source))
    if not pairs:
        raise typer.BadParameter("give at least one file", param_hint="--data")
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise typer.BadParameter(f"two sources are called {twice[0]!r}; use --domain NAME=FILE", param_hint="--data")
    return dict(pairs)


def print_report(report: ProfileReport, screen: Console) -> None:
    """A line per domain, their distances, and what to do next."""
    from chronomoe_hf.metrics import effective_experts

    width = max(6, *(len(name) for name in report.domains))
    width = min(width, 24)
    screen.print(f"{'domain':<{width}}  {'tokens':>10} {'loss':>8} {'Neff/E':>7} {'dead':>6}", soft_wrap=True)
    for name, found in report.domains.items():
        used = [n / len(row) for row in found.counts if (n := effective_experts(row)) is not None]
        dead = sum(count == 0 for row in found.counts for count in row)
        loss = "-" if found.loss is None else f"{found.loss:.4f}"
        mean = f"{sum(used) / len(used):.2f}" if used else "-"
        screen.print(f"{name[:width]:<{width}}  {found.tokens:>10} {loss:>8} {mean:>7} {dead:>6}", soft_wrap=True)
    names = list(report.domains)
    apart = [(report.distance(a, b), a, b) for i, a in enumerate(names) for b in names[:i]]
    for distance, a, b in sorted(apart, key=lambda row: -(row[0] or 0.0))[:10]:
        if distance is not None:
            screen.print(f"distance of loads, {b} and {a}: {distance:.3f} (0 the same, 1 no expert shared)"[:78])
    screen.print(f"records: {report.directory}", soft_wrap=True)
    screen.print(f"next: chronomoe report {report.directory} -o report.html", soft_wrap=True)
    screen.print(f"      chronomoe plan {report.directory} --keep 0.75 -o plan.json", soft_wrap=True)
