"""The table of `docs/serving.md` from `benchmarks/results/serving.json`.

python tests/clients/table.py RESULTS CHECKPOINTS   # gather what the clients wrote, then render
python tests/clients/table.py                       # render only
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
OTHERS = (
    "lm_eval",
    "measured",
    "mergekit",
    "quantize",
    "compressor",
    "refit_quantized",
    "onnx",
    "vllm_plugin",
    "vllm_plugin_off",
    "http_vllm",
    "http_llama",
    "wall",
)


def gather(folder: Path) -> dict[str, Any]:
    """``{client: {"FAMILY/KIND": {"difference", ...}}}`` from the files ``CLIENT*.json``."""
    found: dict[str, Any] = {}
    for client in (*CLIENTS, *OTHERS):
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
    lines += _steered(results) + _served(results) + _perplexity(results) + _others(results)
    return "\n".join(lines).strip()


def _steered(results: dict[str, Any]) -> list[str]:
    """What acts from inside vLLM through the plugin, and from inside an ONNX file."""
    lines = ["### Steering that no weight holds", ""]
    lines += [
        "| checkpoint | vLLM, plugin | vLLM, plugin off | ONNX | torch.export | plain model |",
        "|---|---|---|---|---|---|",
    ]
    plugin, off = results.get("vllm_plugin", {}), results.get("vllm_plugin_off", {})
    onnx = results.get("onnx", {})
    for name in sorted(plugin):
        cells = [
            _cell(plugin.get(name), "to_wrapped"),
            _cell(off.get(name), "to_wrapped"),
            _cell(onnx.get(name)),
            _cell(onnx.get(name), "torch_export"),
            _cell(onnx.get(name), "plain_to_wrapped"),
        ]
        lines.append(f"| `{name.rpartition('/')[2]}` | " + " | ".join(cells) + " |")
    return [*lines, ""] if plugin else []


def _served(results: dict[str, Any]) -> list[str]:
    """Answers over HTTP."""
    lines = [
        "### Over HTTP",
        "",
        "| checkpoint | `vllm serve` | `python -m llama_cpp.server` | tokens |",
        "|---|---|---|---|",
    ]
    vllm, llama = results.get("http_vllm", {}), results.get("http_llama", {})
    for name in sorted(vllm | llama):
        tokens = (vllm.get(name) or llama[name]).get("tokens", "-")
        lines.append(f"| `{name}` | {_cell(vllm.get(name))} | {_cell(llama.get(name))} | {tokens} |")
    return [*lines, ""] if vllm or llama else []


def _perplexity(results: dict[str, Any]) -> list[str]:
    """lm-eval beside measure."""
    lines = ["### lm-eval", "", "| checkpoint | lm-eval, per byte | `measure`, per byte |", "|---|---|---|"]
    said, measured = results.get("lm_eval", {}), results.get("measured", {})
    for name in sorted(said):
        if "error" in said[name] or name not in measured:
            lines.append(f"| `{name}` | no | - |")
            continue
        first, second = said[name]["byte_perplexity"], measured[name]["byte_perplexity"]
        lines.append(f"| `{name}` | `{first:.7f}` | `{second:.7f}` |")
    return [*lines, ""] if said else []


def _others(results: dict[str, Any]) -> list[str]:
    """mergekit and llmcompressor."""
    lines = []
    if merged := results.get("mergekit", {}):
        lines += [
            "### mergekit, a linear merge of a cut and a sibling",
            "",
            "| checkpoint | to the mean |",
            "|---|---|",
        ]
        lines += [f"| `{name}` | {_cell(merged[name])} |" for name in sorted(merged)]
        errors = {name: row["error"] for name, row in sorted(merged.items()) if "error" in row}
        lines += [*([""] if errors else []), *(f"- `{name}`: `{error[:140]}`" for name, error in errors.items()), ""]
    if quantized := results.get("quantize", {}):
        lines += ["### llmcompressor, quantized and cut in either order", ""]
        lines += ["| scheme | tensors | that differ | KL to the unquantized cut |", "|---|---|---|---|"]
        asked = results.get("compressor", {})
        for name, row in sorted(quantized.items()):
            said = asked.get(f"quantized/cut_of_{name}", {})
            kl = f"`{said['kl']:.1e}`" if "kl" in said else f"no: `{said.get('error', '')[:100]}`"
            lines.append(
                f"| `{name}` | {row.get('tensors', 'no')} | {row.get('differ', row.get('error', '')[:100])} | {kl} |"
            )
        lines.append("")
    return lines


def _cell(row: dict[str, Any] | None, field: str = "difference") -> str:
    if row is None:
        return "-"
    if "error" in row:
        return "no"
    return f"`{row[field]:.1e}`" if field in row else "-"


def _reason(rows: dict[str, Any], family: str) -> str:
    errors = {rows[f"{family}/{kind}"]["error"] for kind in KINDS if "error" in rows.get(f"{family}/{kind}", {})}
    return "; ".join(f"`{error.replace('`', '')[:140]}`" for error in sorted(errors))


def main() -> None:
    if len(sys.argv) > 1:
        kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        found = gather(Path(sys.argv[1]))
        for client in CLIENTS:  # a family that refit gives nothing back has a reason in place of a checkpoint
            for path in sorted(Path(sys.argv[2]).glob("*/refitted.json")) if client in found else ():
                found[client][f"{path.parent.name}/refitted"] = json.loads(path.read_text())
        if Path(sys.argv[1]).name == "results_of_families":  # some rows of a client's table
            found.pop("wall", None)
            found = {client: kept.get(client, {}) | rows for client, rows in found.items()}
        found["wall"] = kept.get("wall", {}) | found.get("wall", {})
        RESULTS.write_text(json.dumps(kept | found, indent=1, sort_keys=True) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    table = render(json.loads(RESULTS.read_text()))
    PAGE.write_text(f"{before}{START}\n\n{table}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
