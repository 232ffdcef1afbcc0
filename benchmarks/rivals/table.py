"""Errors of a reading against the recount, and the page that benchmarks/rivals/run.py writes from its JSON."""

from __future__ import annotations

import math
from typing import Any

Row = dict[str, Any]
EXACT = 1e-6


def errors(got: Any, truth: Any) -> Row:
    """How far a reading is from the truth.

    Args:
        got: a tool's `Reading`; fewer or other layers and experts than the truth make its figures None.
        truth: the recount's `Reading`, its entropy of the same definition as `got`'s.
    """
    expected = sum(map(sum, truth.counts))
    dead = {(at, e) for at, layer in enumerate(truth.dead) for e in layer}
    row: Row = {"tokens_counted": sum(map(sum, got.counts)), "tokens": expected, "dead": len(dead)}
    if [len(layer) for layer in got.counts] != [len(layer) for layer in truth.counts]:
        return {**row, "shape": [len(layer) for layer in got.counts], "right": False}
    off = sum(abs(a - b) for x, y in zip(got.counts, truth.counts, strict=True) for a, b in zip(x, y, strict=True))
    said = {(at, e) for at, layer in enumerate(got.dead) for e in layer}
    row |= {
        "count_error": off / expected,
        "dead_found": len(dead & said),
        "dead_wrong": len(said - dead),
        "neff_error": max(abs(a - b) / b for a, b in zip(got.neff, truth.neff, strict=True)),
        "entropy_error": max(abs(a - b) for a, b in zip(got.entropy, truth.entropy, strict=True)),
        "per_token": got.per_token,
    }
    numbers = (row["count_error"], row["neff_error"])
    row["right"] = all(math.isfinite(n) and n <= EXACT for n in numbers) and said == dead
    return row


def _cell(row: Row) -> str:
    if "error" in row:
        return "fails"
    if "shape" in row:
        return f"**wrong**: other shape {row['shape']}"
    text = "right" if row["right"] else "**wrong**"
    dead = f"{row['dead_found']}/{row['dead']}" + (f" +{row['dead_wrong']} false" if row["dead_wrong"] else "")
    return f"{text}: {row['count_error']:.1%}, {dead}, {row['neff_error']:.1%}"


def verdict(rows: list[Row], tool: str) -> str:
    """One sentence about a tool over all cases."""
    mine = [row for row in rows if row["tool"] == tool]
    wrong = [row["case"] for row in mine if "error" not in row and not row["right"]]
    failed = [row["case"] for row in mine if "error" in row]
    text = f"right in {sum(bool(row.get('right')) for row in mine)} of {len(mine)} cases"
    if wrong:
        text += f"; wrong: {'; '.join(wrong)}"
    return text + (f"; fails: {'; '.join(failed)}" if failed else "")


def _entropy(rows: list[Row], tool: str) -> str:
    mine = [row for row in rows if row["tool"] == tool and "entropy_error" in row]
    if not mine:
        return "-"
    worst = max(mine, key=lambda row: row["entropy_error"])
    right = sum(row["entropy_error"] <= 1e-4 for row in mine)
    kind = "of each token's probabilities" if worst["per_token"] else "of the shares"
    text = f"{kind}; within 1e-4 nats in {right} of {len(mine)}"
    return text if right == len(mine) else f"{text}; worst {worst['entropy_error']:.3f} ({worst['case']})"


def markdown(results: Row) -> str:
    """The page; `results` as in the JSON."""
    rows = results["rows"]
    names, cases = list(results["how"]), list(dict.fromkeys(row["case"] for row in rows))
    by = {(row["case"], row["tool"]): row for row in rows}
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Who counts right",
        "",
        f"Each tool on the same training runs of {results['steps']} optimizer steps (small Mixtral, 8 experts, k = 2; "
        "k = 8: Qwen3-MoE with",
        "32 experts; DeepSeek-V3: sigmoid router with a bias and groups), against a token-by-token recount: every real",
        "token of the policy's training passes, all its k experts, once. In each layer one expert is made to get no "
        "token.",
        f"{results['machine']}; {versions}. Written by `benchmarks/rivals/run.py`, with `rivals.json`.",
        "",
        "| tool | used as | verdict | entropy |",
        "|---|---|---|---|",
        *(f"| {n} | {results['how'][n]} | {verdict(rows, n)} | {_entropy(rows, n)} |" for n in names),
        "",
        f"Right: counts and Neff within {EXACT:g} and the same dead experts. Cells: error of the counts (sum of",
        "|counted - true| over the true total), dead experts found of those there are (and live ones called dead),",
        "largest error of Neff over the layers. Fails: it raised, or found nothing to count.",
        "",
        f"| case | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
        *(f"| {case} | {' | '.join(_cell(by[case, name]) for name in names)} |" for case in cases),
        "",
        *_notes(results, by),
        *_cost(results),
    ]
    return "\n".join(lines) + "\n"


def _notes(results: Row, by: dict[tuple[str, str], Row]) -> list[str]:
    rows = results["rows"]
    lines = [f"- {row['tool']}, {row['case']}: `{row['error']}`" for row in rows if "error" in row]
    if results["moewatch_left_out"]:
        lines.append(f"- moewatch is left out: {results['moewatch_left_out']}.")
    hooks, logits = by.get(("padded", "forward hooks")), by.get(("plain", "router logits"))
    if hooks is not None:
        lines.append(
            f"- Padding is routed too: in `padded` the routers made {hooks['tokens_counted']:,} assignments, "
            f"{hooks['tokens']:,} of them for real tokens."
        )
    if logits is not None:
        other = by["plain", "chronomoe_hf"]["first_loss"]
        lines.append(
            f"- Asking for router logits adds the model's auxiliary loss: first logged loss of `plain` "
            f"{logits['first_loss']:.4f}, with chronomoe_hf {other:.4f}."
        )
    asking = sorted({row["case"] for row in rows if row.get("trainer_asks")})
    if asking:
        lines.append(f"- The trainer itself asks for router logits in its loss passes: {', '.join(asking)}.")
    return [*lines, *_moewatch(rows, results["moewatch_says"])]


def _moewatch(rows: list[Row], says: dict[str, str]) -> list[str]:
    """What moewatch says it counts, and how near that it comes."""
    mine = [row for row in rows if row["tool"] == "moewatch" and "error" not in row]
    if not mine:
        return []
    right = [row["case"] for row in mine if row["first_choices"]]
    lines = [
        f'- moewatch: its README says "{says["tracks"]}"; its events count "{says["counts"]}".',
        "  Its counts equal a recount of the largest logit of each real token alone in "
        f"{len(right)} of {len(mine)} cases ({', '.join(right) or 'none'}).",
        "  Dead is a share of at most 0.1 % there and no token in the recount; its entropy is the mean entropy of each "
        "token's probabilities and is compared",
        "  with that; exp of the entropy of its counts stands in for the Neff that it does not have.",
    ]
    shaped = [row for row in mine if "shape" in row]
    return [*lines, *(f"  In {row['case']} it reports {row['shape'][0]} experts a layer." for row in shaped)]


def _cost(results: Row) -> list[str]:
    floor = results["cost"][0]
    return [
        "",
        "## What a step costs",
        "",
        "Forward, backward and SGD step of a Qwen3-MoE (2 layers, 32 experts, k = 4, 512 tokens) over the untouched",
        f"model's in the same round, {results['rounds']} rounds in one process, the order turning; median (quartiles). "
        f"Every tool reports every {results['interval']['here']} steps",
        f"(the default window of chronomoe_hf is {results['interval']['default']}).",
        f"`{floor['tool']}` is the noise floor; the machine was shared, so that differences within its quartiles say "
        "nothing.",
        "",
        "| | processor time | time | processor time of all rounds, reports included |",
        "|---|---|---|---|",
        *(
            f"| {c['tool']} | {_ratio(c['cpu'])} | {_ratio(c['wall'])} | {c['cpu_of_all']:.3f} |"
            for c in results["cost"]
        ),
        *_promise(results),
    ]


def _promise(results: Row) -> list[str]:
    cost = {row["tool"]: row["cpu"] for row in results["cost"]}
    if "moewatch, every 10th" not in cost:
        return []
    got = cost["moewatch, every 10th"][1] - 1
    return ["", f'moewatch\'s README: "{results["moewatch_says"]["cost"]}"; median processor time here {got:+.1%}.']


def _ratio(quartiles: list[float]) -> str:
    low, median, high = quartiles
    return f"{median:.3f} ({low:.3f} - {high:.3f})"
