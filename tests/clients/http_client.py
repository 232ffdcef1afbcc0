"""Checkpoints behind an HTTP server: what `/v1/completions` answers, against Transformers. Runs without this library.

    VLLM_ENV/bin/python tests/clients/http_client.py OUT.json vllm DIRECTORY ...
    LLAMA_ENV/bin/python tests/clients/http_client.py OUT.json CONVERTER DIRECTORY ...

The servers are those that a user starts (``vllm serve DIRECTORY``, ``python -m llama_cpp.server --model FILE``),
asked for a greedy continuation of text with five log-probabilities a token, and held against the Transformers of the
same environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("The value of an expression", "A class definition is", "import sys\n\nThe statement")
NUM_TOKENS, TOP, SECONDS = 12, 5, 400
# The converter knows tokenizers by a hash; one trained here is a byte-level BPE, split as gpt-2 splits.
_CONVERT = """
import runpy, sys
converter = sys.argv.pop(1)
sys.path.insert(0, converter.rpartition("/")[0])
sys.path.insert(0, converter.rpartition("/")[0] + "/gguf-py")
sys.argv[0] = converter
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
for name in list(vars(conversion.base.TextModel)):
    if name.startswith("_set_vocab") and name != "_set_vocab_gpt2":
        setattr(conversion.base.TextModel, name, lambda self, *args, **kwargs: self._set_vocab_gpt2())
conversion.base.TextModel.set_vocab = lambda self: self._set_vocab_gpt2()
runpy.run_path(converter, run_name="__main__")
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def command(engine: str, directory: str, port: int) -> list[str]:
    if engine == "vllm":
        # What `vllm serve` starts; that command wants a package called `vllm`, and the CPU build is `vllm-cpu`.
        more = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4"]
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", directory]
        return [*server, "--port", str(port), *more]
    file = f"{directory}.http.gguf"
    convert = [sys.executable, "-c", _CONVERT, engine, directory, "--outtype", "f32", "--outfile", file]
    done = subprocess.run(convert, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the converter: {done.stderr.strip().splitlines()[-1]}")
    more = ["--n_ctx", "128", "--logits_all", "true", "--type_k", "0", "--type_v", "0"]
    return [sys.executable, "-m", "llama_cpp.server", "--model", file, "--port", str(port), *more]


def post(port: int, what: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{what}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def wait(port: int, server: subprocess.Popen[bytes], log: Path) -> str:
    """The served model's name, as soon as the server answers."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise RuntimeError(f"the server ended with {server.returncode}: {lines[-1] if lines else ''}")
        try:
            return str(post(port, "/v1/models")["data"][0]["id"])
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise TimeoutError(f"no answer in {SECONDS} s")


@torch.no_grad()
def compare(model: Any, tokenizer: Any, prompt: str, answer: dict[str, Any]) -> dict[str, float]:
    """The answer's log-probabilities against a forward of the greedy continuation."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    every = model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=-1)
    logprobs_GV = model(input_ids=every).logits.float().log_softmax(-1)[0, ids.shape[1] - 1 : -1]
    new_G = every[0, ids.shape[1] :]
    choice = answer["choices"][0]
    said = choice["logprobs"]
    worst = 0.0
    for at, value in enumerate(said["token_logprobs"]):
        worst = max(worst, abs(value - float(logprobs_GV[at, new_G[at]])))
        top = sorted(said["top_logprobs"][at].values(), reverse=True)[:TOP]
        want = logprobs_GV[at].topk(len(top)).values.tolist()
        if len(top) == TOP:  # tokens with the same text share a place in the answer
            worst = max(worst, *(abs(a - b) for a, b in zip(top, want, strict=True)))
    same = choice["text"] == tokenizer.decode(new_G)
    extra = answer["usage"]["prompt_tokens"] - ids.shape[1]
    return {"difference": worst, "tokens": len(said["token_logprobs"]), "same_text": float(same), "extra": extra}


def ask(engine: str, directory: str) -> dict[str, Any]:
    port, log = free_port(), Path(f"{directory}.http.log")
    line = command(engine, directory, port)
    with log.open("wb") as stream:
        server = subprocess.Popen(line, stdout=stream, stderr=subprocess.STDOUT)
        try:
            name = wait(port, server, log)
            fields = {"model": name, "max_tokens": NUM_TOKENS, "temperature": 0.0, "logprobs": TOP}
            if engine == "vllm":
                fields |= {"ignore_eos": True}
            else:
                fields |= {"repeat_penalty": 1.0}  # this server holds repeated tokens down unless it is told not to
            answers = [post(port, "/v1/completions", fields | {"prompt": prompt}) for prompt in PROMPTS]
        finally:
            server.terminate()
            server.wait(60)
            Path(f"{directory}.http.gguf").unlink(missing_ok=True)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = [compare(model, tokenizer, prompt, answer) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    return {
        "difference": max(row["difference"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "same_text": sum(row["same_text"] for row in rows),
        "extra_prompt_tokens": max(row["extra"] for row in rows),
        "prompts": len(rows),
        "library": importlib.util.find_spec("chronomoe_hf") is not None,
    }


def main() -> None:
    out, engine, *directories = sys.argv[1:]
    results: dict[str, Any] = {}
    for directory in directories:
        try:
            results[directory] = ask(engine, directory)
        except Exception as error:
            results[directory] = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1][:200]}"}
        print(directory, results[directory], flush=True)
        Path(out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
