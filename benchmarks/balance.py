"""Does governance keep experts alive, how soon, and at what loss?

The Mixtral of `make demo` is pretrained on prose (cached) and fine-tuned on code under one arm after another. Two
shapes are stressed: `e8` (the demo's own: 8 experts, top-2 pretrained, top-1 fine-tuned) and `e32` (32 experts, top-4,
other text), each over the demo's 300 steps and, on more text, over 800 and 600 (`-long`). A fifth setting, `healthy`,
keeps the text and k on a balanced base and must be left alone. Every optimizer step's expert counts are kept, so
"updates until balanced" is exact to the step. The sign rule runs at the best of its rates, swept on the first seed.
Results are written after every run.

    python benchmarks/balance.py                 # all arms, seeds 0 1 2 (about three hours on one idle core)
    python benchmarks/balance.py --settings e8 --output part1      # a part of it, beside others ...
    python benchmarks/balance.py --merge part1 part2               # ... and the parts put together; the later
                                                                   # part's runs replace the earlier one's
    python benchmarks/balance.py --quick         # one seed, a tiny model, two arms, under a minute
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from _balance_job import (
    ARMS,
    BEYOND,
    CHANGED,
    PLAN,
    SETTINGS,
    SIGN_RATES,
    Data,
    Setting,
    arm_config,
    fine_tune,
    prepare,
)
from _balance_measure import FLOOR, SMOOTH, TAIL, TARGET, summarise
from _balance_table import claims, markdown

import chronomoe_hf

RESULTS = Path(__file__).resolve().parent / "results"


def best_sign_rate(setting: Setting, data: Data, seed: int, steps: int, sweep: list[dict[str, Any]]) -> float:
    """The rate with the fewest updates to balance on one seed; ties go to the lower violation. Fills `sweep`."""
    short = dataclasses.replace(setting, steps=steps)
    for rate in (*SIGN_RATES, *BEYOND):
        arm = f"sign@{rate}"
        row = summarise(fine_tune(short, data, arm, seed, arm_config(arm, rate)), setting.interval)
        keys = ("updates_to_reach", "max_violation_tail", "worst_neff_tail", "valid_loss")
        sweep.append({"setting": setting.name, "rate": rate, "seed": seed, "steps": steps, **{k: row[k] for k in keys}})
        print(json.dumps(sweep[-1]), flush=True)
    rows = [row for row in sweep if row["setting"] == setting.name and row["rate"] in SIGN_RATES]
    best = min(rows, key=lambda row: (row["updates_to_reach"] or steps + 1, row["max_violation_tail"]))
    return float(best["rate"])


def header(names: list[str], seeds: list[int]) -> dict[str, Any]:
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
        "configs": {arm: arm_config(arm, SIGN_RATES[-1]).to_dict() for arm in ARMS if arm != "sign"},
        "changed": list(CHANGED),
        "sign_rate": {},
        "sweep": [],
        "runs": [],
        "claims": [],
    }


def write(results: dict[str, Any], output: Path) -> None:
    """balance.json and balance.md, as far as the matrix has come."""
    output.mkdir(parents=True, exist_ok=True)
    results["claims"] = claims(results)
    rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in results["runs"])  # a line each
    text = json.dumps({**results, "runs": "ROWS"}, indent=1, allow_nan=False).replace('"ROWS"', f"[\n  {rows}\n ]")
    (output / "balance.json").write_text(text + "\n", encoding="utf-8")
    notes = output / "balance_notes.md"
    text = markdown(results) + (notes.read_text(encoding="utf-8") if notes.is_file() else "")
    (output / "balance.md").write_text(text, encoding="utf-8")


def run_matrix(results: dict[str, Any], names: list[str], arms: list[str], sweep_steps: int, output: Path) -> None:
    """Every arm of every setting, seed by seed; the first seed also sweeps the sign rule's rate."""
    for seed in results["seeds"]:
        for name in names:
            setting, planned = SETTINGS[name], [arm for arm in PLAN[name] if arm in arms]
            data = prepare(setting, seed)
            if "sign" in planned and name not in results["sign_rate"]:
                results["sign_rate"][name] = best_sign_rate(setting, data, seed, sweep_steps, results["sweep"])
            for arm in planned:
                config = arm_config(arm, results["sign_rate"].get(name, SIGN_RATES[-1]))
                run = fine_tune(setting, data, arm, seed, config)
                row = {"setting": name, "arm": arm, "seed": seed, **summarise(run, setting.interval)}
                results["runs"].append(row)
                shown = ("setting", "arm", "seed", "valid_loss", "worst_neff_tail", "updates_to_reach", "decisions")
                print(json.dumps({key: row[key] for key in shown}), flush=True)
                write(results, output)


def merge(parts: list[Path], output: Path) -> None:
    """Put together what calls with other settings, arms or seeds have written to `parts`; later ones win.

    Raises:
        SystemExit: the parts were made by different versions, or an arm ran under different configurations.
    """
    found = [json.loads((part / "balance.json").read_text(encoding="utf-8")) for part in parts]
    results, order, runs, sweep = found[0], list(SETTINGS), {}, {}
    for each in found:
        known = results["configs"].keys() & each["configs"].keys()
        differ = sorted(arm for arm in known if each["configs"][arm] != results["configs"][arm])
        if differ or each["versions"] != results["versions"]:
            raise SystemExit(f"the parts differ in their versions or in the configs of {differ}; run them again")
        for name in ("settings", "sign_rate", "configs"):
            results[name] |= each[name]
        results["seeds"] = sorted({*results["seeds"], *each["seeds"]})
        runs |= {(order.index(row["setting"]), ARMS.index(row["arm"]), row["seed"]): row for row in each["runs"]}
        sweep |= {(order.index(row["setting"]), row["rate"], row["seed"]): row for row in each["sweep"]}
    results["settings"] = {name: results["settings"][name] for name in SETTINGS if name in results["settings"]}
    results["changed"] = list(CHANGED)
    results["runs"], results["sweep"] = ([rows[key] for key in sorted(rows)] for rows in (runs, sweep))
    write(results, output)


def main(arguments: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a tiny model, arms none and balance")
    parser.add_argument(
        "--settings", nargs="+", choices=sorted(PLAN), default=[name for name in PLAN if name != "quick"]
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sweep-steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=None, help=f"directory (default: {RESULTS.name}/ beside this)")
    parser.add_argument("--merge", nargs="+", type=Path, default=None, help="output directories of earlier calls")
    options = parser.parse_args(arguments)
    if options.merge:
        merge(options.merge, options.output or RESULTS)
        return
    torch.set_num_threads(1)
    names, seeds = (["quick"], [0]) if options.quick else (options.settings, options.seeds)
    output = options.output or (Path("runs") / "balance-quick" if options.quick else RESULTS)
    results = header(names, seeds)
    run_matrix(results, names, options.arms, options.sweep_steps, output)
    for claim in results["claims"]:
        print(f"{'holds' if claim['holds'] else 'FAILS'}: {claim['claim']} ({claim['numbers']})")
    print(f"wrote {output / 'balance.json'}")


if __name__ == "__main__":
    main()
