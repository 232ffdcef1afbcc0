"""``chronomoe candidates``: the experts that the dry-run lifecycle holds a case against, with its evidence."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from chronomoe_hf.cli.output import JsonOption, RunDirectory, console, print_json, records_directory
from chronomoe_hf.errors import TelemetryError

DECISIONS = "lifecycle_decisions.jsonl"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(candidates)


def candidates(
    run_dir: RunDirectory,
    run: Annotated[str | None, typer.Option("--run", help="Name of a run, or its beginning; else the newest.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Withdrawn cases too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Experts that could be pruned, merged or split, by the run's own evidence; a dry run, no weight was touched."""
    directory = records_directory(run_dir)
    name, found, proposals = read(directory, run)
    kept = [case for case in found if everything or case["state"] != "withdrawn"]
    proposals = [each for each in proposals if everything or each["state"] != "withdrawn"]
    if as_json:
        print_json({"run": name, "dry_run": True, "candidates": kept, "proposals": proposals})
        return
    screen = console()
    screen.print(f"{name}: {len(kept)} experts with a case against them (a dry run)")
    if kept:
        titles = f"{'layer':>5} {'expert':>6}  {'case':<17} {'state':<9} {'since':>6}"
        screen.print(f"{titles} {'tokens':>8} {'share':>6} {'phi':>6} {'rank':>7}", soft_wrap=True)
    for case in kept:
        rank = f"{_short(case['contribution_rank'], '.0f')}/{_short(case['num_experts'], '.0f')}"
        screen.print(
            f"{case['layer_id'][:5]:>5} {case['expert'][:6]:>6}  {case['reason'][:17]:<17} {case['state'][:9]:<9} "
            f"{_short(case['step'], '.0f'):>6} {_tokens(case['total_tokens_seen']):>8} "
            f"{_short(case['share'], '.4f'):>6} {_short(case['phi_slow'], '.2f'):>6} {rank:>7}",
            soft_wrap=True,
        )
    if proposals:
        many = "1 proposal" if len(proposals) == 1 else f"{len(proposals)} proposals"
        screen.print(f"{many} from roles; below each, edits and their rise of the loss")
        screen.print("of a split also both experts' load, before -> after (1 = a fair share)")
        screen.print(f"{'layer':>5}  {'proposal':<8} {'experts':<9} {'state':<9} {'since':>6} {'score':>5}")
    for each in proposals:
        screen.print(
            f"{each['layer_id'][:5]:>5}  {each['proposal']:<8} {each['experts'][:9]:<9} {each['state'][:9]:<9} "
            f"{_short(each['step'], '.0f'):>6} {_short(each['score'], '.2f'):>5}",
            soft_wrap=True,
        )
        for name in each["competing"]:
            rise = _short(each["measured"].get(name), "+.5f")
            screen.print(f"         {name[:24]:<24} {rise:>9}{_load(each['loads'].get(name))}", soft_wrap=True)


def read(directory: Any, name: str | None) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """The last word on every case and on every proposal of a run, in order of layer and expert.

    Raises:
        TelemetryError: no such run.
    """
    from chronomoe_hf.telemetry.reader import EFFECTS, read_jsonl, read_last
    from chronomoe_hf.telemetry.views import last_cases, last_proposals, plain_text

    last = read_last(directory / "snapshots.jsonl", 1, name=name)
    if last.run is None:
        known = ", ".join(plain_text(run.name, 80) for run in last.history.runs) or "none yet"
        raise TelemetryError(f"no such run in {directory}; it holds {known}")
    records, _ = read_jsonl(directory / DECISIONS, run=last.run)
    effects, _ = read_jsonl(directory / f"{EFFECTS}.jsonl", run=last.run)
    return plain_text(last.run.name, 80), last_cases(records), last_proposals(records, effects)


def _load(load: tuple[list[int], list[float], list[float]] | None) -> str:
    if load is None:
        return ""
    _, before, after = load
    return f"  {before[0]:.2f} {before[1]:.2f} -> {after[0]:.2f} {after[1]:.2f}"


def _short(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _tokens(value: float | None) -> str:
    return _short(value, ".0f" if value is not None and value < 1e8 else ".2e")
