"""mergekit's linear merge of a cut checkpoint and a sibling of it: the mean of both. Runs without this library.

    MERGEKIT_ENV/bin/python tests/clients/mergekit_client.py OUT.json DIRECTORY ...

The sibling is the same checkpoint with every floating-point weight moved a little, as a fine-tuned one would be.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from asking import ask_each
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

CONFIG = """
merge_method: linear
dtype: float32
models:
  - model: {first}
    parameters: {{weight: 0.5}}
  - model: {second}
    parameters: {{weight: 0.5}}
"""


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(directory.glob("*.safetensors")) for name, value in load_file(path).items()}


def loaded(directory: Path) -> dict[str, torch.Tensor]:
    """The weights as Transformers reads them, whatever names the files have; nothing may be missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    left = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    if left:
        raise ValueError(f"{directory.name} does not load strictly: {left[0]}")
    return dict(model.state_dict())


def sibling(directory: Path, out: Path) -> None:
    shutil.copytree(directory, out)
    generator = torch.Generator().manual_seed(0)
    for path in sorted(out.glob("*.safetensors")):
        tensors = {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


def ask(directory: str) -> dict[str, Any]:
    """Largest difference of a merged weight to the mean, over all weights, as Transformers reads them."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        sibling(Path(directory), home / "sibling")
        (home / "merge.yaml").write_text(CONFIG.format(first=Path(directory).resolve(), second=home / "sibling"))
        command = [Path(sys.executable).parent / "mergekit-yaml", home / "merge.yaml", home / "merged"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
            return {"error": (lines[-1] if lines else f"status {done.returncode}")[:200]}
        names = {path: set(stored(path)) for path in (Path(directory), home / "merged")}
        first, second, merged = (loaded(path) for path in (Path(directory), home / "sibling", home / "merged"))
    worst = max(float((merged[name] - (first[name] + second[name]) / 2).abs().max()) for name in first)
    return {"difference": worst, "weights": len(first), "same_names": len(set(map(frozenset, names.values()))) == 1}


def main() -> None:
    out, *directories = sys.argv[1:]
    ask_each(out, directories, ask)


if __name__ == "__main__":
    main()
