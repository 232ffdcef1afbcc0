"""llama.cpp on checkpoints, through its own converter: all log-probabilities of every prompt position, greedy tokens.

    LLAMA_ENV/bin/python tests/clients/llama_client.py OUT.json CONVERTER DIRECTORY ...

CONVERTER is the ``convert_hf_to_gguf.py`` of the llama.cpp that ``llama-cpp-python`` was built from. The tokenizer is
not one that the converter knows, and of no interest here: prompts are token ids, and the vocabulary is written as a
SentencePiece one with made-up pieces. Everything else is the converter's. Runs without this library.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

_CONVERT = """
import runpy, sys
converter = sys.argv.pop(1)
sys.path.insert(0, converter.rpartition("/")[0])
sys.path.insert(0, converter.rpartition("/")[0] + "/gguf-py")
sys.argv[0] = converter
import json
from pathlib import Path
def made_up(self):
    size = json.loads((Path(self.dir_model) / "config.json").read_text())["vocab_size"]
    import gguf
    names = [b"<unk>", b"<s>", b"</s>"] + [f"t{at}".encode() for at in range(3, size)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    self.gguf_writer.add_tokenizer_model("llama")
    self.gguf_writer.add_tokenizer_pre("default")
    self.gguf_writer.add_token_list(names)
    self.gguf_writer.add_token_scores([0.0] * size)
    self.gguf_writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (size - 3))
import conversion.base
for name in list(vars(conversion.base.TextModel)):
    if name.startswith("_set_vocab"):
        setattr(conversion.base.TextModel, name, lambda self, *args, **kwargs: made_up(self))
conversion.base.TextModel.set_vocab = made_up
import conversion.hunyuan  # its own vocabulary wants a tiktoken file
for kind in vars(conversion.hunyuan).values():
    if isinstance(kind, type) and "set_vocab" in vars(kind):
        kind.set_vocab = made_up
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "default"
runpy.run_path(converter, run_name="__main__")
"""


def convert(directory: str, converter: str) -> Path:
    """The GGUF file of a checkpoint, in F32; made in a fork, so that torch and the converter are imported once."""
    out = Path(f"{directory}.gguf")
    log = Path(f"{directory}.convert.log")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with log.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
                sys.argv = ["-c", converter, directory, "--outtype", "f32", "--outfile", str(out)]
                try:
                    exec(_CONVERT, {})
                    status = 0
                except SystemExit as end:
                    status = int(end.code or 0)
                except BaseException as error:
                    print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1] != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(f"the converter: {lines[-1] if lines else 'no word'}")
    log.unlink()
    return out


def ask(directory: str) -> dict[str, Any]:
    """Differences of all log-probabilities, and how many greedy tokens agree."""
    import llama_cpp

    said = np.load(f"{directory}.npz")
    prompts_NS, want_NSV, greedy_NG = said["prompts"], said["logprobs"], said["generated"]
    wrapped_NSV = want_NSV
    if "plain_logprobs" in said:
        want_NSV = said["plain_logprobs"]
    path = Path(f"{directory}.gguf")
    try:
        model = llama_cpp.Llama(
            str(path), n_ctx=128, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False
        )
        worst, wrapped, same, apart = 0.0, 0.0, 0, 0
        for n, prompt in enumerate(prompts_NS.tolist()):
            model.reset()
            model.eval(prompt)
            scores_SV = np.array(model.scores[: len(prompt)], dtype=np.float64)
            got_SV = scores_SV - np.log(np.exp(scores_SV - scores_SV.max(-1, keepdims=True)).sum(-1, keepdims=True))
            got_SV -= scores_SV.max(-1, keepdims=True)
            wrapped = max(wrapped, float(np.abs(got_SV - wrapped_NSV[n]).max()))
            gap_S = np.abs(got_SV - want_NSV[n]).max(-1)
            worst, apart = max(worst, float(gap_S.max())), apart + int((gap_S > 0.01).sum())
            for token in greedy_NG[n].tolist():
                same += int(int(np.argmax(model.scores[model.n_tokens - 1])) == token)
                model.eval([token])
        model.close()
    finally:
        path.unlink(missing_ok=True)
    return {
        "difference": worst,
        "to_wrapped": wrapped,
        "positions": int(prompts_NS.size),
        "apart": apart,
        "same_tokens": same,
        "tokens": int(greedy_NG.size),
    }


def main() -> None:
    out, converter, *directories = sys.argv[1:]
    if directories[0] == "--one":  # a process of its own: llama.cpp aborts where it cannot go on
        print(json.dumps(ask(directories[1])))
        return
    sys.path.insert(0, str(Path(converter).parent / "gguf-py"))
    for name in ("torch", "transformers", "gguf"):
        importlib.import_module(name)
    results: dict[str, Any] = {}
    for directory in directories:
        results[directory] = row(directory, out, converter)
        print(directory, results[directory], flush=True)
        Path(out).write_text(json.dumps(results, indent=1))


def row(directory: str, out: str, converter: str) -> dict[str, Any]:
    try:
        convert(directory, converter)
    except RuntimeError as error:
        return {"error": str(error)[:200]}
    command = [sys.executable, __file__, out, converter, "--one", directory]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return said
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or [f"status {done.returncode}"]
    return {"error": lines[-1][:200]}


if __name__ == "__main__":
    main()
