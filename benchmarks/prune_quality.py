"""What does it cost to cut experts away, by which rank, and what does the refit give back?

Small models (`e8`, `e32`: the Mixtrals of benchmarks/balance.py; `qwen3`: a Qwen3-MoE; `deepseek`: a DeepSeek-V3 with
sigmoid routing, four expert groups and a shared expert) are pretrained on prose, fine-tuned on code while the library
observes, and cut by 12.5, 25 and 50 % with every rank. Costs are paired rises of the loss on held-out documents of the
fine-tuning text. The cut is a mask, which equals the smaller checkpoint.

    python benchmarks/prune_quality.py                       # all shapes, seeds 0 1 2 (about 90 minutes on one core)
    python benchmarks/prune_quality.py --shapes e8 --seeds 0 # a part; what the results file holds already is kept
    python benchmarks/prune_quality.py --exported            # the default rank's cuts on the first seed again, as
                                                             # exported checkpoints: the realised cost
    python benchmarks/prune_quality.py --settings --shapes e8 deepseek   # the refit with other settings, first seed
    python benchmarks/prune_quality.py --refit               # the refitted cuts again, in place of those that are there
    python benchmarks/prune_quality.py --fresh               # half of the experts on seeds 3 4 5, which nothing was
                                                             # chosen on
    python benchmarks/prune_quality.py --free                # free budgets per layer for rows that lack them
    python benchmarks/prune_quality.py --heal --shapes e8    # healing, a cut in the middle, after `balance`, mean norms
    python benchmarks/prune_quality.py --layer-cost          # time and peak memory of refitting one layer of
                                                             # Qwen3-30B-A3B's shape
    python benchmarks/prune_quality.py --render              # Markdown and plot from the results file
    python benchmarks/prune_quality.py --quick --output DIR  # one tiny model, under a minute
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from _prune_table import markdown, plot

import chronomoe_hf

RESULTS = Path(__file__).resolve().parent / "results"
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


def main() -> None:
    """Command line, see the top of this file."""
    parser = argparse.ArgumentParser(description="cost of cutting experts, with and without refit")
    parser.add_argument("--shapes", nargs="+", default=["e8", "e32", "qwen3", "deepseek"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--layer-cost", action="store_true")
    parser.add_argument("--exported", action="store_true")
    parser.add_argument("--settings", action="store_true", help="other settings of the refit, first seed")
    parser.add_argument("--refit", action="store_true", help="make the rows with a refit anew")
    parser.add_argument("--fresh", action="store_true", help="the goal of the refit on seeds 3 to 5")
    parser.add_argument("--free", action="store_true", help="add free budgets per layer to rows that lack them")
    parser.add_argument("--heal", action="store_true", help="healed, cut in the middle, after balance, mean norms")
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args()
    results = load(arguments.output / "prune_quality.json")
    if arguments.render:
        save(results, arguments.output)
        return
    if arguments.layer_cost:
        from _prune_layer_cost import layer_cost

        results["layer_cost"] = layer_cost()
        save(results, arguments.output)
        return
    from _prune_cuts import exported, free_budgets, fresh, refit_settings, refits, run

    if arguments.settings:
        others = [row for row in results["settings"] if row["shape"] not in arguments.shapes]
        results["settings"] = others + [row for shape in arguments.shapes for row in refit_settings(shape, 0)]
        save(results, arguments.output)
        return

    if arguments.heal:
        import _prune_heal

        parts = (("mean_norm", "rows"), ("balanced", "balance"), ("healing", "healing"))
        for seed in arguments.seeds:
            for shape in arguments.shapes:
                for make, part in parts:
                    rows = results.setdefault(part, [])
                    mine = [row for row in rows if (row["shape"], row["seed"]) == (shape, seed)]
                    if not any(part != "rows" or row["rank"] == "mean_norm" for row in mine):
                        rows += getattr(_prune_heal, make)(shape, seed)
                        save(results, arguments.output)
        return

    if arguments.fresh:
        for seed in FRESH:
            for shape in arguments.shapes:
                rows = [row for row in results.get("fresh", []) if (row["shape"], row["seed"]) != (shape, seed)]
                results["fresh"] = rows + fresh(shape, seed)
                save(results, arguments.output)
        return

    if arguments.refit:
        for seed in arguments.seeds:
            for shape in arguments.shapes:
                new = refits(shape, seed)
                keys = [(row["cut"], row["rank"]) for row in new]
                for at, row in enumerate(results["rows"]):
                    if row["refit"] and (row["shape"], row["seed"]) == (shape, seed):
                        results["rows"][at] = new[keys.index((row["cut"], row["rank"]))]
                save(results, arguments.output)
        return

    if arguments.free:
        for shape, seed in sorted({(row["shape"], row["seed"]) for row in results["rows"]}):
            if not any(
                row["rank"] == "free budgets" and (row["shape"], row["seed"]) == (shape, seed)
                for row in results["rows"]
            ):
                results["rows"] += free_budgets(shape, seed)
                save(results, arguments.output)
        return

    if arguments.exported:
        for shape in arguments.shapes:
            for new in exported(shape, 0):
                for row in results["rows"]:
                    found = (row["shape"], row["seed"], row["rank"]) == (shape, 0, "contribution")
                    if found and row["cut"] == new["cut"] and row["refit"] == new["refit"]:
                        row |= {"rise_exported": new["rise"], "error_exported": new["error"]}
            save(results, arguments.output)
        return
    shapes, seeds = (["quick"], [0]) if arguments.quick else (arguments.shapes, arguments.seeds)
    for seed in seeds:
        for shape in shapes:
            if any(row["shape"] == shape and row["seed"] == seed for row in results["rows"]):
                continue
            results["rows"] += run(shape, seed)
            save(results, arguments.output)


if __name__ == "__main__":
    main()
