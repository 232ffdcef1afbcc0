"""What does it cost to cut experts away, by which rank, and what does the refit give back?

Small models (`e8`, `e32`: the Mixtrals of benchmarks/balance; `qwen3`: a Qwen3-MoE; `deepseek`: a DeepSeek-V3 with
sigmoid routing, four expert groups and a shared expert) are pretrained on prose, fine-tuned on code while the library
observes, and cut by 12.5, 25 and 50 % with every rank. Costs are paired rises of the loss on held-out documents of the
fine-tuning text. The cut is a mask, which equals the smaller checkpoint.

    python benchmarks/prune/run.py                       # all shapes, seeds 0 1 2 (about 90 minutes on one core)
    python benchmarks/prune/run.py --shapes e8 --seeds 0 # a part; what the results file holds already is kept
    python benchmarks/prune/run.py --exported            # the default rank's cuts on the first seed again, as
                                                         # exported checkpoints: the realised cost
    python benchmarks/prune/run.py --settings --shapes e8 deepseek   # the refit with other settings, first seed
    python benchmarks/prune/run.py --refit               # the refitted cuts again, in place of those that are there
    python benchmarks/prune/run.py --fresh               # half of the experts on seeds 3 4 5, which nothing was
                                                         # chosen on
    python benchmarks/prune/run.py --free                # free budgets per layer for rows that lack them
    python benchmarks/prune/run.py --heal --shapes e8    # healing, a cut in the middle, after `balance`, mean norms
    python benchmarks/prune/run.py --layer-cost          # time and peak memory of refitting one layer of
                                                         # Qwen3-30B-A3B's shape
    python benchmarks/prune/run.py --render              # Markdown and plot from the results file
    python benchmarks/prune/run.py --quick --output DIR  # one tiny model, under a minute
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import chronomoe_hf
from prune.table import markdown, plot

RESULTS = Path(__file__).resolve().parents[1] / "results"
FRESH = (3, 4, 5)


def load(path: Path) -> dict[str, Any]:
    """The results so far, or an empty table."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return {"rows": [], "settings": [], "layer_cost": [], "versions": {}, "machine": ""}


def save(results: dict[str, Any], directory: Path) -> None:
    """JSON, Markdown and plot."""
    results["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "chronomoe_hf": chronomoe_hf.__version__,
    }
    results["machine"] = f"{platform.machine()}, {torch.get_num_threads()} thread"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "prune_quality.json").write_text(json.dumps(results, indent=1) + "\n")
    (directory / "prune_quality.md").write_text(markdown(results))
    if results["rows"]:
        plot(results, directory / "prune_quality.png")


def settings(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Other settings of the refit, first seed."""
    from prune.cuts import refit_settings

    others = [row for row in results["settings"] if row["shape"] not in options.shapes]
    results["settings"] = others + [row for shape in options.shapes for row in refit_settings(shape, 0)]


def heal(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Healing, a cut in the middle, after `balance`, mean norms; what is there is kept."""
    from prune import heal as maker

    parts = (("mean_norm", "rows"), ("balanced", "balance"), ("healing", "healing"))
    for shape, seed in _pairs(options):
        for make, part in parts:
            rows = results.setdefault(part, [])
            mine = [row for row in rows if (row["shape"], row["seed"]) == (shape, seed)]
            if not any(part != "rows" or row["rank"] == "mean_norm" for row in mine):
                rows += getattr(maker, make)(shape, seed)
                save(results, options.output)


def fresh(results: dict[str, Any], options: argparse.Namespace) -> None:
    """The goal of the refit on seeds that nothing was chosen on."""
    from prune.cuts import fresh as made

    for seed in FRESH:
        for shape in options.shapes:
            rows = [row for row in results.get("fresh", []) if (row["shape"], row["seed"]) != (shape, seed)]
            results["fresh"] = rows + made(shape, seed)
            save(results, options.output)


def refit(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Rows with a refit, in place of those that are there."""
    from prune.cuts import refits

    for shape, seed in _pairs(options):
        new = {(row["cut"], row["rank"]): row for row in refits(shape, seed)}
        for at, row in enumerate(results["rows"]):
            if row["refit"] and (row["shape"], row["seed"]) == (shape, seed):
                results["rows"][at] = new[row["cut"], row["rank"]]
        save(results, options.output)


def free(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Free budgets per layer for rows that lack them."""
    from prune.cuts import free_budgets

    has = {(row["shape"], row["seed"]) for row in results["rows"] if row["rank"] == "free budgets"}
    for shape, seed in sorted({(row["shape"], row["seed"]) for row in results["rows"]} - has):
        results["rows"] += free_budgets(shape, seed)
        save(results, options.output)


def exported(results: dict[str, Any], options: argparse.Namespace) -> None:
    """The default rank's cuts on the first seed as exported checkpoints."""
    from prune.cuts import exported as made

    for shape in options.shapes:
        new = {(row["cut"], row["refit"]): row for row in made(shape, 0)}
        for row in results["rows"]:
            found = new.get((row["cut"], row["refit"]))
            if found is not None and (row["shape"], row["seed"], row["rank"]) == (shape, 0, "contribution"):
                row |= {"rise_exported": found["rise"], "error_exported": found["error"]}
        save(results, options.output)


def layer_cost(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Time and memory of one layer of a real model's shape."""
    from prune.layer_cost import layer_cost as made

    results["layer_cost"] = made()


def cuts(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Every rank at every size; what is there is kept."""
    from prune.cuts import run

    for shape, seed in [("quick", 0)] if options.quick else _pairs(options):
        if not any((row["shape"], row["seed"]) == (shape, seed) for row in results["rows"]):
            results["rows"] += run(shape, seed)
            save(results, options.output)


def render(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Nothing new: the page and the plot are written again."""


PARTS = (render, layer_cost, settings, heal, fresh, refit, free, exported)


def _pairs(options: argparse.Namespace) -> list[tuple[str, int]]:
    return [(shape, seed) for seed in options.seeds for shape in options.shapes]


def main() -> None:
    """Command line, see the top of this file."""
    parser = argparse.ArgumentParser(description="cost of cutting experts, with and without refit")
    parser.add_argument("--shapes", nargs="+", default=["e8", "e32", "qwen3", "deepseek"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    for part in PARTS:
        name = part.__name__.replace("_", "-")
        parser.add_argument(f"--{name}", dest="part", action="store_const", const=part, help=part.__doc__)
    options = parser.parse_args()
    results = load(options.output / "prune_quality.json")
    (options.part or cuts)(results, options)
    save(results, options.output)


if __name__ == "__main__":
    main()
