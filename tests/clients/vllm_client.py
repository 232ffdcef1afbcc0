"""vLLM on checkpoints: log-probabilities of every prompt position and greedy continuations. Runs without this library.

    VLLM_ENV/bin/python tests/clients/vllm_client.py OUT.json [--impl transformers] DIRECTORY ...

``DIRECTORY.npz`` has the prompts and what Transformers says.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from vllm import LLM, SamplingParams

TOP = 10


def ask(directory: str, impl: str) -> dict[str, Any]:
    """Largest difference of a log-probability, and how many greedy tokens agree."""
    said = np.load(f"{directory}.npz")
    prompts_NS, want_NSV, greedy_NG = said["prompts"], said["logprobs"], said["generated"]
    wrapped_NSV = want_NSV
    if "plain_logprobs" in said:  # governed: an engine runs the plain model, which may be what was trained or not
        want_NSV = said["plain_logprobs"]
    llm = LLM(
        model=directory,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=8,
        max_logprobs=TOP,
        model_impl=impl,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    count = greedy_NG.shape[1]
    params = SamplingParams(
        temperature=0.0, max_tokens=count, min_tokens=count, prompt_logprobs=TOP, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": row.tolist()} for row in prompts_NS], params, use_tqdm=False)
    worst, wrapped, same, positions = 0.0, 0.0, 0, 0
    for n, output in enumerate(outputs):
        for at, entries in enumerate(output.prompt_logprobs[1:], start=1):
            positions += 1
            for token, entry in entries.items():
                worst = max(worst, abs(entry.logprob - float(want_NSV[n, at - 1, token])))
                wrapped = max(wrapped, abs(entry.logprob - float(wrapped_NSV[n, at - 1, token])))
        same += int((np.array(output.outputs[0].token_ids) == greedy_NG[n]).sum())
    del llm
    gc.collect()
    return {
        "difference": worst,
        "to_wrapped": wrapped,
        "positions": positions,
        "same_tokens": same,
        "tokens": int(greedy_NG.size),
    }


def main() -> None:
    out, *directories = sys.argv[1:]
    impl = "auto"
    if directories[0] == "--impl":
        impl, directories = directories[1], directories[2:]
    results: dict[str, Any] = json.loads(Path(out).read_text()) if Path(out).is_file() else {}
    for directory in directories:
        try:
            results[directory] = ask(directory, impl)
        except BaseException as error:
            text = str(error).strip() or type(error).__name__
            results[directory] = {"error": f"{type(error).__name__}: {text.splitlines()[-1][:200]}"}
        print(directory, results[directory], flush=True)
        Path(out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
