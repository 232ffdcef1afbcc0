"""ONNX and torch.export files of wrapped models: what steers is inside the graph.

    PYTHONPATH=LIBRARY ONNX_ENV/bin/python tests/clients/onnx_client.py OUT.json DIRECTORY ...

Each DIRECTORY holds a state; the ONNX file is run by onnxruntime, which knows nothing of this library.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import onnxruntime
import torch
from asking import ask_each
from transformers import AutoModelForCausalLM

import chronomoe_hf


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits  # type: ignore[no-any-return]


def ask(directory: str) -> dict[str, Any]:
    """Largest difference of a logit to the wrapped model, and how far the plain model is from it."""
    model = AutoModelForCausalLM.from_pretrained(directory, experts_implementation="batched_mm").eval()
    ids_NS = torch.from_numpy(np.load(f"{directory}.npz")["prompts"])
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        plain_NSV = Logits(model)(ids_NS)
        chronomoe_hf.wrap(model, state=directory).eval()
        want_NSV = Logits(model)(ids_NS)
        exported_NSV = torch.export.export(Logits(model), (ids_NS,)).module()(ids_NS)
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(Logits(model), (ids_NS,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path)
        got_NSV = session.run(None, {session.get_inputs()[0].name: ids_NS.numpy()})[0]
    return {
        "difference": float(np.abs(got_NSV - want_NSV.numpy()).max()),
        "torch_export": float((exported_NSV - want_NSV).abs().max()),
        "plain_to_wrapped": float((plain_NSV - want_NSV).abs().max()),
    }


def main() -> None:
    out, *directories = sys.argv[1:]
    ask_each(out, directories, ask)


if __name__ == "__main__":
    main()
