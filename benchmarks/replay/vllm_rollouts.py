"""Rollouts of a real vLLM with what its routers chose; runs without this library, in an environment of its own.

    VLLM_ENV/bin/python vllm_rollouts.py CHECKPOINT PROMPTS.json OUT.json

The CPU build refuses --enable-return-routed-experts (it needs Triton), so the routes are read where that flag reads
them: ``router.set_capture_fn``. One request at a time, so that the calls of a layer are the tokens in order.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from vllm import LLM, SamplingParams


def main() -> None:
    """Sample, write."""
    directory, prompts, out = sys.argv[1:4]
    job = json.loads(Path(prompts).read_text())
    llm = LLM(
        model=directory,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        seed=0,
    )
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    chosen: dict[int, list[Any]] = {}
    layers = sorted(
        (
            (module.layer_id, module.router)
            for module in model.modules()
            if hasattr(module, "router") and hasattr(module, "layer_id")
        ),
        key=lambda pair: pair[0],
    )
    for layer_id, router in layers:
        router.set_capture_fn(lambda ids, at=layer_id: chosen.setdefault(at, []).append(ids.clone().long()))
    rows = []
    for number, prompt in enumerate(job["prompts"]):
        chosen.clear()
        params = SamplingParams(
            temperature=1.0, max_tokens=job["tokens"], logprobs=0, seed=number, detokenize=False, ignore_eos=True
        )
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        done = output.outputs[0]
        routes = torch.stack([torch.cat(chosen[layer_id]) for layer_id, _ in layers], 1)  # (tokens, MoE layers, k)
        logps = [entry[token].logprob for entry, token in zip(done.logprobs, done.token_ids, strict=True)]
        rows.append(
            {
                "prompt": prompt,
                "completion": list(done.token_ids),
                "logps": logps,
                "routes": routes.tolist(),
                "layers": [layer_id for layer_id, _ in layers],
            }
        )
    import vllm

    Path(out).write_text(json.dumps({"vllm": vllm.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
