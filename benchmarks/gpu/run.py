"""Everything that the docs list as not measured, on one machine with an NVIDIA GPU, in under 20 minutes.

    python benchmarks/gpu/run.py                        # needs CUDA and about 40 GB; --layers 1 needs about 12
    python benchmarks/gpu/run.py --part overhead syncs  # some parts; what gpu.json holds of the others is kept
    python benchmarks/gpu/run.py --device cpu --tiny --output DIRECTORY   # the same without a GPU; no figure counts

Writes gpu.json and gpu.md after every part. A part that fails is a line of the table, and the exit status is then 1.
Without CUDA it ends with status 3.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from gpu.base import TINY, Bench, free
from gpu.parts import PARTS
from gpu.table import markdown

RESULTS = Path(__file__).resolve().parents[1] / "results"
NO_CUDA = (
    "benchmarks/gpu/run.py needs an NVIDIA GPU and a CUDA build of torch; torch.cuda.is_available() is False here.\n"
    "To see that the script runs: python benchmarks/gpu/run.py --device cpu --tiny --output build/gpu"
)


def machine(device: str) -> str:
    """What the figures were taken on."""
    if device != "cuda":
        return f"{platform.machine()}, no GPU"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return (
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)} ({memory:.0f} GiB), CUDA {torch.version.cuda}"
    )


def run_part(name: str, bench: Bench) -> dict[str, Any]:
    """Rows of a part, or why it failed; and its seconds."""
    started = time.perf_counter()
    try:
        found: dict[str, Any] = {"rows": PARTS[name](bench)}
    except Exception as error:  # one part must not cost the others
        lines = str(error).strip().splitlines() or [""]
        found = {"error": f"{type(error).__name__}: {lines[0][:300]}"}
    free(bench)
    return {"seconds": round(time.perf_counter() - started, 1), **found}


def main() -> int:
    """Measure, write, print; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters")
    parser.add_argument("--layers", type=int, help="layers of the model (default 4)")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(NO_CUDA, file=sys.stderr)
        return 3
    if options.device == "cpu" and options.output.resolve() == RESULTS:
        parser.error("--device cpu measures nothing: give an --output other than benchmarks/results")
    transformers.logging.set_verbosity_error()
    fields: dict[str, Any] = {**(TINY if options.tiny else {})}
    if options.layers:
        fields["layers"] = options.layers
    bench = Bench(device=options.device, **fields)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "gpu.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.is_file() else {}
    results: dict[str, Any] = {
        "machine": machine(options.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "bench": asdict(bench),
        "parts": {},
    }
    for name in PARTS:
        if name in options.part:
            results["parts"][name] = run_part(name, bench)
            print(name, json.dumps(results["parts"][name]), flush=True)
        elif name in kept:
            results["parts"][name] = kept[name]
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))
    return int(any("error" in part for part in results["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
