"""``chronomoe export``: a checkpoint without the experts that a plan drops."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from chronomoe_hf.cli import models
from chronomoe_hf.cli.output import JsonOption, console, print_json

if TYPE_CHECKING:
    from chronomoe_hf.export import ExportReport
    from chronomoe_hf.lifecycle import PrunePlan, RefitReport


_CHECKS: dict[str, Literal["auto", "logits", "shapes"]] = {"auto": "auto", "logits": "logits", "shapes": "shapes"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(export)


def export(
    model: models.ModelArgument,
    plan: models.PlanOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="New directory for the smaller checkpoint.")],
    refit: Annotated[
        str | None, typer.Option("--refit", help="Text to refit the kept experts on: a file or a Hub name.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Most tokens to refit on.")] = 65_536,
    check: Annotated[
        str, typer.Option("--check", help="auto, logits (loads both checkpoints) or shapes (loads none).")
    ] = "auto",
    drop_unknown: Annotated[
        bool, typer.Option("--drop-unknown", help="Leave out tensors that the model of Transformers does not have.")
    ] = False,
    length: models.LengthOption = 512,
    batch_size: models.BatchOption = 8,
    column: models.ColumnOption = "text",
    device_map: models.DeviceOption = None,
    dtype: models.DtypeOption = "auto",
    tokenizer: models.TokenizerOption = None,
    progress: models.ProgressOption = True,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL without the experts that the plan drops, checked against MODEL under the plan's mask.

    Files are cut a buffer at a time, whatever the size of the model; with --refit the model is loaded.
    """
    if check not in _CHECKS:
        raise typer.BadParameter(f"{check!r} is none of auto, logits, shapes", param_hint="--check")
    models.quiet(progress and not as_json)
    from chronomoe_hf import lifecycle
    from chronomoe_hf.export.live import fresh_target

    made = lifecycle.PrunePlan.load(plan)
    fresh_target(out)
    if refit is None:
        source = models.local_directory(model)
        report = lifecycle.export_checkpoint(source, made, out, check=_CHECKS[check], drop_unknown=drop_unknown)
        refitted = None
    else:
        options = {"tokens": tokens, "length": length, "batch_size": batch_size, "column": column}
        report, refitted = _with_refit(model, made, out, refit, tokenizer or model, dtype, device_map, options)
    if as_json:
        print_json({**report.to_record(), "refit": None if refitted is None else refitted.to_record()})
        return
    screen = console()
    if refitted is not None:
        screen.print(refit_line(refitted))
    for line in lines(report):
        screen.print(line, soft_wrap=True)


def _with_refit(
    model: str,
    made: PrunePlan,
    out: Path,
    data: str,
    tokenizer: str,
    dtype: str,
    device_map: str | None,
    options: dict[str, object],
) -> tuple[ExportReport, RefitReport]:
    from transformers.utils import logging as transformers_logging

    from chronomoe_hf import lifecycle
    from chronomoe_hf.profiling import text_batches

    loaded, reader = models.load_model(model, dtype, device_map), models.load_tokenizer(tokenizer)
    batches = text_batches(loaded, reader, data, **options)  # type: ignore[arg-type]
    layers = sum(bool(layer.dropped) for layer in made.layers)
    with transformers_logging.tqdm(total=layers, unit="layer", desc="refit", leave=False) as bar:
        refitted = lifecycle.refit(loaded, made, batches, progress=lambda line: bar.update())
    report = lifecycle.export(loaded, made, out, tokenizer=reader, refit=refitted if refitted.applied else None)
    return report, refitted


def refit_line(refitted: RefitReport) -> str:
    """What the refit did, in one line."""
    if not refitted.applied:
        return f"refit: not applied, {refitted.reason}"
    return f"refit: KL to the full model {refitted.kl_before:.4f} -> {refitted.kl_after:.4f} on held-out text"


def lines(report: ExportReport) -> list[str]:
    """What was written and how it was checked."""
    if report.max_difference is None:
        checked = "names and shapes of the new files fit their config (logits were not compared)"
    else:
        checked = (
            f"logits are those of the masked model, to {report.max_difference:.1e} (allowed {report.tolerance:.1e})"
        )
    return [
        f"{report.num_experts} -> {report.num_kept} experts a layer, {report.top_k} a token as before",
        f"{report.parameters_before / 1e6:,.1f} -> {report.parameters_after / 1e6:,.1f} million parameters",
        f"{report.bytes_before / 1e6:,.1f} -> {report.bytes_after / 1e6:,.1f} MB in {report.seconds:.1f} s",
        checked,
        *_left(report),
        f"checkpoint: {report.directory}",
    ]


def _left(report: ExportReport) -> list[str]:
    """What the weights alone do not hold."""
    lines = []
    if report.dropped_tensors:
        lines.append(f"{report.dropped_tensors} tensors that the model of Transformers does not have were left out")
    if report.steering is not None:
        lines.append(f"its routing was governed: the folder chronomoe holds {report.steering}")
        lines.append("a plain reload routes without it; wrap(model, state=directory) loads it")
    return lines
