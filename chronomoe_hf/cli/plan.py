"""``chronomoe plan``: from the records of a run or a profile to a plan of which experts stay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chronomoe_hf.cli import models
from chronomoe_hf.cli.output import JsonOption, console, print_json, ranges

if TYPE_CHECKING:
    from rich.console import Console

    from chronomoe_hf.lifecycle import PrunePlan

EVERY = 1_000_000_000


THIN = 100  # assignments per expert, on average, below which a ranking is mostly chance


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(plan)


def plan(
    directory: Annotated[Path, typer.Argument(help="Directory of a run or of a profile.")],
    keep: Annotated[float, typer.Option("--keep", help="Experts that stay: a fraction below 1, or their number.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Plan file to write.")] = None,
    rank: Annotated[
        str, typer.Option("--rank", help="contribution, reap, frequency, mean_norm, fisher, phi or random.")
    ] = "contribution",
    multiple_of: Annotated[int, typer.Option("--multiple-of", min=1, help="Survivors: a multiple of this.")] = 1,
    protect: Annotated[
        list[str] | None, typer.Option("--protect", help="LAYER:EXPERT that must stay; may be repeated.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="Newest windows to read; 5 of a run, all of a profile.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of --rank random.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Choose which experts stay, the same number in every layer; nothing is cut."""
    from chronomoe_hf.errors import PlanError
    from chronomoe_hf.lifecycle import RANKS, Evidence, plan_prune
    from chronomoe_hf.telemetry import read_manifest

    if rank not in RANKS:
        raise typer.BadParameter(f"{rank!r} is none of {', '.join(RANKS)}", param_hint="--rank")
    root = directory.parent if directory.name == "chronomoe" else directory
    manifest = read_manifest(root) or {}
    if windows is None:
        windows = EVERY if manifest.get("kind") == "profile" else 5
    if out is not None and out.exists():
        raise PlanError(f"{out} exists already; name a new file")
    made = plan_prune(
        Evidence.from_directory(directory, windows=windows),
        keep=int(keep) if keep >= 1 and keep.is_integer() else keep,
        rank=rank,
        protect=models.experts(protect, "--protect"),
        multiple_of=multiple_of,
        seed=seed,
    )
    if out is not None:
        made.save(out)
    if as_json:
        print_json(made.to_dict())
    else:
        print_plan(made, out, console(), int(keep) if keep >= 1 and keep.is_integer() else None)


def print_plan(made: PrunePlan, out: Path | None, screen: Console, asked: int | None = None) -> None:
    """What goes, layer by layer."""
    source = made.source
    num_experts = made.specs[0].num_experts
    screen.print(f"{made.num_kept} of {num_experts} experts stay in each of {len(made.layers)} layers, by {made.rank}")
    screen.print(
        f"evidence: {source.kind} {source.run_id or '-'}, {source.mode}, steps {source.first_step} to "
        f"{source.last_step}, {source.tokens} tokens",
        soft_wrap=True,
    )
    for layer in made.layers:
        gone = ranges(list(layer.dropped))
        text = f"layer {layer.spec.layer_id:>3} drops {gone or 'none'}"
        screen.print(text if len(text) <= 79 else f"{text[:76]}...", soft_wrap=True)
    for note in made.notes:
        screen.print(f"note: {note}")
    per_expert = source.tokens * made.specs[0].top_k / num_experts
    if per_expert < THIN:
        screen.print(f"note: thin evidence, {per_expert:.0f} assignments an expert (below {THIN}): profile more text")
    if asked is not None and asked != made.num_kept:
        screen.print(f"note: {asked} experts were asked for; {made.num_kept} is what --multiple-of allows")
    if out is None:
        screen.print("note: nothing was saved; -o plan.json writes the plan")
    if out is not None:
        screen.print(f"plan: {out}", soft_wrap=True)
        screen.print(f"next: chronomoe measure MODEL --plan {out} --data HELD_OUT_TEXT", soft_wrap=True)
