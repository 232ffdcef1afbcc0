"""An older Transformers on checkpoints: log-probabilities at every prompt position. Runs without this library.

TRANSFORMERS_4_ENV/bin/python tests/clients/transformers_client.py OUT.json DIRECTORY ...
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from asking import ask_each
from transformers import AutoModelForCausalLM


def ask(directory: str) -> dict[str, Any]:
    """Largest difference of a log-probability over the whole vocabulary."""
    said = np.load(f"{directory}.npz")
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    left = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    if left:
        return {"error": f"does not load strictly: {left[0]}"}
    with torch.no_grad():
        got_NSV = model.eval()(input_ids=torch.from_numpy(said["prompts"])).logits.float().log_softmax(-1).numpy()
    plain_NSV = said["plain_logprobs"] if "plain_logprobs" in said else said["logprobs"]
    difference = np.abs(got_NSV - plain_NSV)
    return {
        "difference": float(difference.max()),
        "to_wrapped": float(np.abs(got_NSV - said["logprobs"]).max()),
        "positions": int(difference.shape[0] * difference.shape[1]),
    }


def main() -> None:
    out, *directories = sys.argv[1:]
    ask_each(out, directories, ask)


if __name__ == "__main__":
    main()
