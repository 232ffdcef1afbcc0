"""What does balance cost or pay? Loss against evenness, for this library's presets and for what people use instead.

A small model is pretrained on one kind of text (cached) and fine-tuned on another under one arm after another. Two
shapes of Mixtral are stressed: `e8` (8 experts, top-2 pretrained, top-1 fine-tuned) and `e32` (32 experts, top-4, other
text), each over 300 steps and, on more text, over 800 and 600 (`-long`). `reverse` goes from code to prose with k
unchanged, and `qwen3` and `deepseek` are other families, k unchanged. Seeds 0 to 2 are for tuning; claims are judged on
seeds 3 to 5, each with a base of its own, by differences to `none` of the same seed. Results are written after every
run. An environment of MALLOC_TRIM_THRESHOLD_=8589934592 and MALLOC_MMAP_THRESHOLD_=33554432 saves a tenth of the time.

    python benchmarks/balance/run.py                 # all arms of all settings (about seven hours on one core)
    python benchmarks/balance/run.py --settings e8 --arms none balance --output part1   # a part, beside others ...
    python benchmarks/balance/run.py --merge part1 part2               # ... and the parts put together; the later
                                                                       # part's runs replace the earlier one's
    python benchmarks/balance/run.py --settings e8 e8-long e32 e32-long --arms none "aux 0.02" revive --seeds 6 7 8 \\
        --output part3                               # the three seeds more; merge them like any other part
    python benchmarks/balance/run.py --changed       # `protect` with one default changed, into balance_changed.*
    python benchmarks/balance/run.py --coherence     # forms of the coherence law, into coherence_study.*
    python benchmarks/balance/run.py --reference   # what `protect` owes debt for, into protect_reference.*
    python benchmarks/balance/run.py --quick         # one seed, a tiny model, four arms, under a minute
"""

from __future__ import annotations

import argparse
import dataclasses
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
from balance.arms import ARMS, CHANGED, SIGN_RATE, arm_config
from balance.coherence_table import markdown as coherence_markdown
from balance.front import markdown, points, targets
from balance.job import (
    CHANGED_PLAN,
    COHERENCE_PLAN,
    COHERENCE_STEPS,
    PLAN,
    REFERENCE_PLAN,
    SETTINGS,
    fine_tune,
    prepare,
)
from balance.measure import FLOOR, SMOOTH, TAIL, TARGET, summarise
from balance.plot import plot
from balance.reference_table import SEEDS as REFERENCE_SEEDS
from balance.reference_table import claims as reference_claims
from balance.reference_table import markdown as reference_markdown
from balance.seeds import FRESH, against_revive
from balance.table import claims
from balance.table import markdown as changed_markdown
from chronomoe_hf import ChronoConfig

RESULTS = Path(__file__).resolve().parents[1] / "results"
TUNING, STUDY = [0, 1, 2], [0, 1]
# File -> what is run, on which seeds, and how it is told.
FILES: dict[str, tuple[dict[str, Any], list[int], Any, Any]] = {
    "balance": (PLAN, list(FRESH), targets, markdown),
    "balance_changed": (CHANGED_PLAN, TUNING, claims, changed_markdown),
    "protect_reference": (REFERENCE_PLAN, list(REFERENCE_SEEDS), reference_claims, reference_markdown),
    "coherence_study": (COHERENCE_PLAN, STUDY, lambda results: [], coherence_markdown),
}


def header(names: list[str], seeds: list[int], arms: list[str]) -> dict[str, Any]:
    """What a reader needs to repeat the numbers."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "chronomoe_hf": chronomoe_hf.__version__,
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
        "seeds": seeds,
        "settings": {name: dataclasses.asdict(SETTINGS[name]) for name in names},
        "measures": {"smooth": SMOOTH, "tail": TAIL, "target": TARGET, "floor": FLOOR},
        "configs": {arm: arm_config(arm).to_dict() for arm in arms},
        "changed": list(CHANGED),
        "sign_rate": dict.fromkeys(names, SIGN_RATE),
        "sweep": [],
        "runs": [],
        "claims": [],
    }


def write(results: dict[str, Any], output: Path, name: str = "balance") -> None:
    """balance.json and balance.md, as far as the matrix has come."""
    output.mkdir(parents=True, exist_ok=True)
    _, _, judge, tell = FILES[name]
    results["claims"] = judge(results)
    if name == "balance":
        results["points"] = {
            each: {one.arm: one._asdict() for one in points(results, each)} for each in results["settings"]
        }
        results["more_seeds"] = against_revive(results)
    rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in results["runs"])  # a line each
    text = json.dumps({**results, "runs": "ROWS"}, indent=1, allow_nan=False).replace('"ROWS"', f"[\n  {rows}\n ]")
    (output / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    notes = output / f"{name}_notes.md"
    text = tell(results)
    text += notes.read_text(encoding="utf-8") if notes.is_file() else ""
    (output / f"{name}.md").write_text(text, encoding="utf-8")


def run_matrix(results: dict[str, Any], arms: list[str], output: Path, name: str) -> None:
    """Every arm of every setting, seed by seed."""
    plan = FILES[name][0]
    for shape in results["settings"].values():
        setting = dataclasses.replace(SETTINGS[shape["name"]], steps=shape["steps"])
        for seed in results["seeds"]:
            planned = [arm for arm in arms if arm in plan[setting.name] or arm not in ARMS]
            data = prepare(setting, seed)
            for arm in planned:
                run = fine_tune(setting, data, arm, seed, arm_config(arm))
                row = {"setting": setting.name, "arm": arm, "seed": seed, **summarise(run, setting.interval)}
                results["runs"].append(row)
                shown = ("setting", "arm", "seed", "valid_loss", "neff_tail", "dead_tail", "seconds")
                print(json.dumps({key: row[key] for key in shown}), flush=True)
                write(results, output, name)


def merge(parts: list[Path], output: Path, name: str = "balance") -> None:
    """Put together what calls with other settings, arms or seeds have written to `parts`; later ones win.

    Raises:
        SystemExit: the parts were made by different versions, or an arm ran under different configurations.
    """
    found = [json.loads((part / f"{name}.json").read_text(encoding="utf-8")) for part in parts]
    results, order, runs, sweep = found[0], list(SETTINGS), {}, {}
    for each in found:
        known = results["configs"].keys() & each["configs"].keys()
        # Read back first: a setting that a later version added has its default in the earlier one's file.
        read = [{arm: _acting(part["configs"][arm]) for arm in known} for part in (results, each)]
        differ = sorted(arm for arm in known if read[0][arm] != read[1][arm])
        if differ or each["versions"] != results["versions"]:
            raise SystemExit(f"the parts differ in their versions or in the configs of {differ}; run them again")
        for key in ("settings", "sign_rate", "configs"):
            results[key] |= each[key]
        results["seeds"] = sorted({*results["seeds"], *each["seeds"]})
        runs |= {(order.index(row["setting"]), arm_order(row["arm"]), row["seed"]): row for row in each["runs"]}
        sweep |= {(order.index(row["setting"]), row["rate"], row["seed"]): row for row in each["sweep"]}
    results["settings"] = {key: results["settings"][key] for key in SETTINGS if key in results["settings"]}
    results["changed"] = list(CHANGED)
    results["runs"], results["sweep"] = ([rows[key] for key in sorted(rows)] for rows in (runs, sweep))
    write(results, output, name)
    if name == "balance":
        plot(results, output / "balance_front.png")


def _acting(config: dict[str, Any]) -> dict[str, Any]:
    """A config as this version reads it, without the settings of a law that never acts."""
    read = ChronoConfig.from_dict(config).to_dict()
    return {**read, "beta": {"law": "none"}} if read["beta"]["law"] == "none" else read


def arm_order(arm: str) -> tuple[int, str]:
    """Known arms in their order, then those with a parameter in their name."""
    return (ARMS.index(arm) if arm in ARMS else len(ARMS), arm)


def main(arguments: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a tiny model, four arms")
    parser.add_argument("--changed", action="store_true", help="the ablations of protect, seeds 0 to 2")
    parser.add_argument("--coherence", action="store_true", help="forms of the coherence law, seeds 0 and 1")
    parser.add_argument("--reference", action="store_true", help="what protect owes debt for, seeds 9 to 11")
    parser.add_argument("--settings", nargs="+", choices=sorted({*PLAN, *CHANGED_PLAN, *REFERENCE_PLAN}), default=None)
    parser.add_argument(
        "--arms",
        nargs="+",
        default=None,
        help=f"of {', '.join(ARMS)}, sign@RATE, zone@..., revive@..., revive + aux ...",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=None)
    parser.add_argument("--output", type=Path, default=None, help=f"directory (default: {RESULTS.name}/ beside this)")
    parser.add_argument("--merge", nargs="+", type=Path, default=None, help="output directories of earlier calls")
    options = parser.parse_args(arguments)
    name = "balance_changed" if options.changed else "coherence_study" if options.coherence else "balance"
    name = "protect_reference" if options.reference else name
    plan, usual, _, _ = FILES[name]
    if options.merge:
        merge(options.merge, options.output or RESULTS, name)
        return
    torch.set_num_threads(1)
    names, seeds = options.settings or [each for each in plan if each != "quick"], options.seeds
    if options.quick:
        names, seeds = ["quick"], [0]
    output = options.output or (Path("runs") / "balance-quick" if options.quick else RESULTS)
    arms = options.arms or list(dict.fromkeys(arm for each in names for arm in plan[each]))
    results = header(names, seeds or usual, arms)
    if name == "coherence_study":
        for shape in results["settings"].values():
            shape["steps"] = COHERENCE_STEPS
    run_matrix(results, arms, output, name)
    if name == "balance":
        plot(results, output / "balance_front.png")
    for claim in results["claims"]:
        print(f"{'holds' if claim['holds'] else 'FAILS'}: {claim['claim']} ({claim['numbers']})")
    print(f"wrote {output / f'{name}.json'}")


if __name__ == "__main__":
    main()
