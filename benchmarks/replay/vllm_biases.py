"""Whether a real vLLM takes the correction biases that TRL's weight sync is given beside the parameters.

    VLLM_ENV/bin/python vllm_biases.py CHECKPOINT BIASES.json

Runs without this library, in an environment of its own. Fails where a name is refused or a value does not arrive.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from vllm import LLM


def main() -> None:
    """Load, send, compare."""
    directory, path = sys.argv[1:3]
    sent = {name: torch.tensor(values) for name, values in json.loads(Path(path).read_text()).items()}
    llm = LLM(
        model=directory,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=1,
        skip_tokenizer_init=True,
    )
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: held[name].detach().clone().cpu() for name in sent}
    taken = model.load_weights(iter(sent.items()))
    assert set(taken) == set(sent), f"vLLM took {sorted(taken)}"
    for name, bias_E in sent.items():
        now_E = held[name].detach().cpu()
        assert not torch.equal(now_E, before[name]), f"{name} did not move"
        assert torch.equal(now_E, bias_E.to(now_E.dtype)), f"{name} arrived with other values"


if __name__ == "__main__":
    main()
