"""`make test-clients`: real engines on checkpoints of this library, each in an environment of its own.

    python tests/clients/run.py [--envs DIRECTORY] [--home DIRECTORY] [client ...]

Environments are made where they are missing (building llama.cpp takes the longest), checkpoints are made anew without
``--keep``; ``--families a,b`` makes and asks those only. What each client says goes to HOME/results, from there
to benchmarks/results/serving.json and the tables of docs/serving.md. Not part of the tests: a run takes most of an hour
on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from environments import converter, environment, library
from families import FAMILIES, KINDS
from make_steered import STEERED

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TRANSFORMERS_BACKEND = ("deepseek_v3", "ernie4_5_moe", "hunyuan_v1_moe", "minimax_m2")
EVALUATED = ("mixtral", "qwen3_moe", "glm4_moe", "gpt_oss")
MERGED = ("mixtral", "qwen3_moe", "glm4_moe", "afmoe")
SERVED = ("glm4_moe/governed", "mixtral/folded", "qwen3_moe/cut")
SCHEMES = ("FP8_DYNAMIC", "W4A16")


@dataclass(frozen=True)
class Run:
    """Where one run reads and writes."""

    envs: Path
    home: Path
    families: tuple[str, ...] = tuple(FAMILIES)

    @property
    def checkpoints(self) -> Path:
        return self.home / "checkpoints"

    @property
    def results(self) -> Path:
        return self.home / ("results" if self.families == tuple(FAMILIES) else "results_of_families")

    @property
    def every(self) -> list[Path]:
        paths = [self.checkpoints / family / kind for family in self.families for kind in KINDS]
        return [path for path in paths if path.with_suffix(".npz").is_file()]

    @property
    def steered(self) -> list[Path]:
        return [self.home / "steered" / f"{family}_{scope}" for family, scope in STEERED]

    def ask(self, python: Path | str, script: str, out: str, *rest: Path | str, **variables: str) -> None:
        """One script of this folder by one python; a client that fails stops no other."""
        command = [python, HERE / script, self.results / f"{out}.json", *rest]
        subprocess.run(command, check=False, env={**os.environ, **variables})


def vllm(run: Run) -> None:
    python = environment("vllm", run.envs)
    run.ask(python, "vllm_client.py", "vllm", *run.every)
    some = [path for path in run.every if path.parent.name in TRANSFORMERS_BACKEND]
    if some:
        run.ask(python, "vllm_client.py", "vllm_transformers", "--impl", "transformers", *some)


def plugin(run: Run) -> None:
    python = environment("vllm", run.envs)
    where = os.pathsep.join([str(library(run.home)), str(HERE)])
    run.ask(python, "vllm_client.py", "vllm_plugin", *run.steered, PYTHONPATH=where)
    run.ask(python, "vllm_client.py", "vllm_plugin_off", *run.steered, PYTHONPATH=where, CHRONOMOE_STATE="off")


def llama(run: Run) -> None:
    python = environment("llama", run.envs)
    run.ask(python, "llama_client.py", "llama", converter(run.envs, python), *run.every)


def http(run: Run) -> None:
    served = [run.checkpoints / name for name in SERVED]
    run.ask(environment("vllm", run.envs), "http_client.py", "http_vllm", "vllm", *served)
    python = environment("llama", run.envs)
    run.ask(python, "http_client.py", "http_llama", converter(run.envs, python), *served)


def tf4(run: Run) -> None:
    run.ask(environment("tf4", run.envs), "transformers_client.py", "transformers_4", *run.every)


def lmeval(run: Run) -> None:
    text = run.home / "text"
    subprocess.run([sys.executable, HERE / "measure_text.py", run.checkpoints, text, *EVALUATED], check=True)
    some = [run.checkpoints / family / kind for family in EVALUATED for kind in ("governed", "cut")]
    run.ask(environment("lmeval", run.envs), "lmeval_client.py", "lm_eval", text / "text.jsonl", *some)
    shutil.copy(text / "measured.json", run.results / "measured.json")


def mergekit(run: Run) -> None:
    some = [run.checkpoints / family / "cut" for family in MERGED]
    run.ask(environment("mergekit", run.envs), "mergekit_client.py", "mergekit", *some)


def compressor(run: Run) -> None:
    python, home, source = environment("compressor", run.envs), run.home / "quantized", run.checkpoints / "qwen3_moe"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    cuts = []
    for scheme in SCHEMES:
        first, second, cut = (home / f"{name}_{scheme}" for name in ("governed", "quantized_cut", "cut_of"))
        for out, kind in ((first, "governed"), (second, "cut")):
            command = [python, HERE / "compressor_client.py", "quantize", out, source / kind, scheme]
            subprocess.run(command, check=False)
        run.ask(sys.executable, "commute.py", "quantize", source / "cut", scheme, first, cut, second)
        cuts.append(cut)
    # Not through `ask`: this script's first word says what to do.
    command = [python, HERE / "compressor_client.py", "ask", run.results / "compressor.json", source / "cut.npz", *cuts]
    subprocess.run(command, check=False)
    where = os.pathsep.join([str(library(run.home)), str(HERE)])
    loaded = [home / f"governed_{scheme}" for scheme in SCHEMES]
    run.ask(python, "refit_client.py", "refit_quantized", source / "cut", *loaded, PYTHONPATH=where)


def onnx(run: Run) -> None:
    where = os.pathsep.join([str(library(run.home)), str(HERE)])
    run.ask(environment("onnx", run.envs), "onnx_client.py", "onnx", *run.steered, PYTHONPATH=where)


CLIENTS: dict[str, Callable[[Run], None]] = {
    "tf4": tf4,
    "lmeval": lmeval,
    "mergekit": mergekit,
    "compressor": compressor,
    "onnx": onnx,
    "http": http,
    "plugin": plugin,
    "vllm": vllm,
    "llama": llama,
}
BY_FAMILY = ("tf4", "vllm", "llama")  # what ``--families`` asks; the others have families of their own


def make(run: Run) -> None:
    """The checkpoints of every family and kind, and those that only wrapped models and the plugin steer."""
    subprocess.run([sys.executable, HERE / "make_checkpoints.py", run.checkpoints, *run.families], check=False)
    if run.families != tuple(FAMILIES):
        return
    subprocess.run([sys.executable, HERE / "make_steered.py", run.home / "steered", run.checkpoints], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=Path, default=ROOT / "build" / "clients" / "envs")
    parser.add_argument("--home", type=Path, default=ROOT / "build" / "clients")
    parser.add_argument("--keep", action="store_true", help="use the checkpoints of the last run")
    parser.add_argument("--families", default=",".join(FAMILIES), help="these only, put into the committed tables")
    parser.add_argument("clients", nargs="*", default=list(CLIENTS))
    given = parser.parse_args()
    run = Run(given.envs.resolve(), given.home.resolve(), tuple(given.families.split(",")))
    if run.families != tuple(FAMILIES):
        given.clients = [name for name in given.clients if name in BY_FAMILY]
        shutil.rmtree(run.results, ignore_errors=True)
    run.results.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(HERE)
    wall: dict[str, dict[str, float]] = {}
    failed = []
    steps = {name: CLIENTS[name] for name in given.clients}
    if not given.keep or not run.checkpoints.is_dir():
        steps = {"checkpoints": make, **steps}
    for name, step in steps.items():
        begun = time.monotonic()
        try:
            step(run)
        except Exception as error:
            failed.append(name)
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        wall[name] = {"seconds": round(time.monotonic() - begun)}
        print(f"--- {name}: {wall[name]['seconds']} s", flush=True)
        (run.results / "wall.json").write_text(json.dumps(wall, indent=1))
    status = subprocess.run([sys.executable, HERE / "table.py", run.results, run.checkpoints], check=False).returncode
    return status or len(failed)


if __name__ == "__main__":
    sys.exit(main())
