"""Quantized, then cut, against cut, then quantized: the same bytes.

    python tests/clients/commute.py OUT.json PLAN_DIRECTORY NAME QUANTIZED CUT_OF_QUANTIZED QUANTIZED_CUT

``PLAN_DIRECTORY`` holds the ``prune_plan.json`` of the unquantized cut.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from chronomoe_hf import lifecycle

Row = tuple[str, tuple[int, ...], bytes]


def raw(directory: Path) -> dict[str, Row]:
    """Every tensor of a checkpoint as its file has it: name -> dtype, shape, bytes."""
    found: dict[str, Row] = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = (entry["dtype"], tuple(entry["shape"]), data[8 + size + first : 8 + size + last])
    return found


def compare(plan_directory: Path, quantized: Path, cut: Path, other: Path) -> dict[str, Any]:
    plan = lifecycle.PrunePlan.from_dict(json.loads((plan_directory / "prune_plan.json").read_text())["plan"])
    shutil.rmtree(cut, ignore_errors=True)
    lifecycle.export_checkpoint(quantized, plan, cut)
    first, second = raw(cut), raw(other)
    differ = sorted(name for name in set(first) | set(second) if first.get(name) != second.get(name))
    return {"tensors": len(first), "differ": len(differ), "first": differ[:1]}


def main() -> None:
    out, plan_directory, name, *paths = sys.argv[1:]
    results = json.loads(Path(out).read_text()) if Path(out).is_file() else {}
    try:
        results[name] = compare(Path(plan_directory), *map(Path, paths))
    except Exception as error:
        results[name] = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    print(name, results[name], flush=True)
    Path(out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
