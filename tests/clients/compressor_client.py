"""llmcompressor's quantizing of files, and what Transformers makes of the result. Runs without this library.

COMPRESSOR_ENV/bin/python tests/clients/compressor_client.py quantize OUT DIRECTORY SCHEME
COMPRESSOR_ENV/bin/python tests/clients/compressor_client.py ask OUT.json PROMPTS.npz DIRECTORY ...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from asking import ask_each

IGNORED = ["lm_head", "re:.*gate$", "re:.*embed.*", "re:.*norm.*"]


def quantize(out: str, directory: str, scheme: str) -> None:
    from llmcompressor import model_free_ptq

    model_free_ptq(str(Path(directory).resolve()), out, scheme=scheme, ignore=IGNORED, device="cpu")


def ask(prompts: str, directory: str) -> dict[str, Any]:
    """Mean KL in nats to the unquantized cut over all positions, and whether everything is finite."""
    from transformers import AutoModelForCausalLM

    said = np.load(prompts)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        got_NSV = model(input_ids=torch.from_numpy(said["prompts"])).logits.float().log_softmax(-1)
    want_NSV = torch.from_numpy(said["logprobs"])
    kl_NS = (want_NSV.exp() * (want_NSV - got_NSV)).sum(-1)
    return {"kl": float(kl_NS.mean()), "finite": bool(got_NSV.isfinite().all()), "sum": float(got_NSV.double().sum())}


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "quantize":
        quantize(*rest)
        return
    out, prompts, *directories = rest
    ask_each(out, directories, lambda directory: ask(prompts, directory))


if __name__ == "__main__":
    main()
