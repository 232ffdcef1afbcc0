"""The table of `docs/serving.md` from `benchmarks/results/serving.json`.

python tests/clients/table.py RESULTS_DIRECTORY    # gather what the clients wrote, then render
python tests/clients/table.py                      # render only
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "serving.json"
PAGE = ROOT / "docs" / "serving.md"
START, END = "<!-- table:start -->", "<!-- table:end -->"
KINDS = ("plain", "governed", "folded", "cut", "refitted")
CLIENTS = {
    "vllm": "vLLM",
    "vllm_transformers": "vLLM, its Transformers backend",
    "llama": "llama.cpp",
    "transformers_4": "Transformers 4.57",
}


def gather(folder: Path) -> dict[str, Any]:
    """``{client: {"FAMILY/KIND": {"difference", ...}}}`` from the files ``CLIENT*.json``."""
    found: dict[str, Any] = {}
    for client in (*CLIENTS, "lm_eval", "measured", "vllm_plugin", "vllm_plugin_off", "onnx"):
        rows: dict[str, Any] = {}
        for path in sorted(folder.glob(f"{client}.json")):
            for directory, row in json.loads(path.read_text()).items():
                rows["/".join(Path(directory).parts[-2:])] = row
        if rows:
            found[client] = rows
    return found


def render(results: dict[str, Any]) -> str:
    """A table a client: family by kind."""
    lines = []
    for client, name in CLIENTS.items():
        rows = results.get(client, {})
        families = [family for family in FAMILIES if any(f"{family}/{kind}" in rows for kind in KINDS)]
        if not families:
            continue
        lines += [f"### {name}", "", "| family | " + " | ".join(KINDS) + " |", "|---|" + "---|" * len(KINDS)]
        for family in families:
            cells = [_cell(rows.get(f"{family}/{kind}")) for kind in KINDS]
            lines.append(f"| `{family}` | " + " | ".join(cells) + " |")
        lines.append("")
        reasons = {family: _reason(rows, family) for family in families}
        lines += [f"- `{family}`: {reason}" for family, reason in reasons.items() if reason]
        lines.append("")
    return "\n".join(lines).strip()


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return "no" if "error" in row else f"`{row['difference']:.1e}`"


def _reason(rows: dict[str, Any], family: str) -> str:
    errors = {rows[f"{family}/{kind}"]["error"] for kind in KINDS if "error" in rows.get(f"{family}/{kind}", {})}
    return "; ".join(f"`{error.replace('`', '')[:140]}`" for error in sorted(errors))


def main() -> None:
    if len(sys.argv) > 1:
        kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        RESULTS.write_text(json.dumps(kept | gather(Path(sys.argv[1])), indent=1, sort_keys=True) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    table = render(json.loads(RESULTS.read_text()))
    PAGE.write_text(f"{before}{START}\n\n{table}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
