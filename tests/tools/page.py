"""docs/tools.md from what tests/tools/run.py has run: a record a tool, kept in tests/tools/results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().with_name("results.json")
PAGE = ROOT / "docs" / "tools.md"
NAMES = {
    "bnb": "bitsandbytes",
    "torchao": "torchao",
    "st": "sentence-transformers",
    "lightning": "Lightning",
    "liger": "Liger and FP8",
    "axolotl": "axolotl",
    "lf": "LLaMA-Factory",
    "swift": "ms-swift",
    "trl": "TRL's command line",
    "fsdp2": "accelerate launch with FSDP2",
}
HEAD = """# Tools: what was run

From one `make test-tools`. Each version is put on a tiny model on the CPU, and the records are held against counts
taken by other code in the same process (`tests/tools/recount`). `EQUAL` means: real tokens of every expert in every
layer, over all windows. `resume`: the last checkpoint of a finished run is taken away, the tool resumes from the one
before by its own option, and all weights and our state come out with the same bits. `unwrapped`: that checkpoint,
wrapped with its state, routes by it, and without it is the plain model again. `native fails`: the tool ends in these
words with us and without.
[Integration](integration.md#tools) says how each tool is told.
"""
TAIL = """
Not run: a GPU, and with it the Triton kernels of Liger, FP8, MXFP4, scattermoe and sonicmoe, and packing of ms-swift,
which asks for flash attention; unsloth; several processes of axolotl, LLaMA-Factory and ms-swift. `torchrun` and
`accelerate launch` with two processes are run by `make test-slow` as well (`tests/integrations`).
"""


def write_page(record: list[dict[str, Any]]) -> None:
    """Put new results beside the kept ones and write the page of all."""
    kept = {each["tool"]: each for each in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    kept |= {each["tool"]: each for each in record}
    rows = [kept[name] for name in NAMES if name in kept]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(rows), encoding="utf-8")


def page(rows: list[dict[str, Any]]) -> str:
    """The page of these results."""
    parts = [HEAD]
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        parts.append(
            f"\n## {NAMES[row['tool']]}\n\nWith {versions}." + (f" Note: {row['notes']}." if row["notes"] else "")
        )
        if row["missing"]:
            parts.append(f"\nNot run: it could not be installed ({row['missing']}).")
            continue
        parts.append("\n| case | result | what was seen |\n|---|---|---|")
        parts += [f"| {line['case']} | {line['result']} | {_seen(line)} |" for line in row["cases"]]
    return "\n".join(parts) + "\n" + TAIL


def _seen(line: dict[str, Any]) -> str:
    left_out = ("tool", "case", "result", "seconds", "alerts", "coherence")
    words = [f"{name.replace('_', ' ')}: {_plain(value)}" for name, value in line.items() if name not in left_out]
    return "; ".join(words).replace("|", "/").replace("\n", " ")


def _plain(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(RESULTS.read_text())), encoding="utf-8")
