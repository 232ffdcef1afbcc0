"""Tiny trained checkpoints of every family and kind, and what Transformers says of each.

    python tests/clients/make_checkpoints.py build/clients/checkpoints [family ...]

Where refit gives nothing back there is no ``refitted``, and ``FAMILY/refitted.json`` has the reason. Beside each
checkpoint lies ``FAMILY/KIND.npz``: log-probabilities of Transformers at every position of six prompts, and greedy
continuations. For ``governed`` and ``folded`` they are those of the *wrapped* model, so that a client is held against
what was trained; ``plain_logprobs`` of ``governed`` is what a plain reload says.

Shape suffixes: N prompts, S positions, V vocabulary, G generated tokens.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from families import COMMON, FAMILIES, NEW_TOKENS, NUM_PROMPTS, PROMPT_TOKENS, VOCAB
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import chronomoe_hf
from chronomoe_hf import ChronoConfig, lifecycle, system_of
from chronomoe_hf.errors import ChronoError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import _text_job

PLAIN_STEPS, GOVERNED_STEPS = 20, 12
FITS = ((24, 0.3), (24, 0.03), (48, 3.0))  # batches, ridge
_LENS = {"integral_target": 1.0, "integral_gain": 5.0, "min_pressure": 0.0, "lens_spread_max": 1e6}


def corpus() -> tuple[Any, Tensor]:
    """The tokenizer, and Python's language reference as one row of token ids."""
    from pydoc_data.topics import topics

    texts = [topics[name].strip() for name in sorted(topics)]
    tokenizer = _text_job.build_tokenizer(texts, VOCAB)
    return tokenizer, torch.tensor(tokenizer("\n".join(texts)).input_ids)


def batch(ids: Tensor, step: int) -> Tensor:
    """8 sequences of 64 tokens, others for every step."""
    at_B = torch.randint(len(ids) - 64, (8,), generator=torch.Generator().manual_seed(step))
    return torch.stack([ids[at : at + 64] for at in at_B.tolist()])


def build(family: str) -> PreTrainedModel:
    name, fields, _, _ = FAMILIES[family]
    config_class = getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(config_class(**{**COMMON, **fields}))
    return model


def steering(how: str) -> ChronoConfig:
    """A strong law for each way of steering, so that what it does can be seen after 20 steps."""
    balance = {"law": "balance", "dead_zone": None, "first_layer": "same", "rate": 0.3}
    if how == "bias":
        return ChronoConfig.from_dict({"beta": balance})
    law = {**balance, "scope": "routing"} if how == "beta" else {"law": "none"}
    fields = {"interval": 2, "alerts": {"min_window_tokens": 1}, "control": _LENS, "beta": law}
    return ChronoConfig.from_dict(fields)


def train(model: PreTrainedModel, ids: Tensor, first: int, steps: int, system: Any = None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for step in range(first, first + steps):
        ids_BS = batch(ids, step)
        model(input_ids=ids_BS, labels=ids_BS).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if system is not None:
            system.step(step - first + 1)
    model.eval()


@torch.no_grad()
def logprobs(model: PreTrainedModel, prompts_NS: Tensor) -> Tensor:
    out: Tensor = model(input_ids=prompts_NS).logits.float().log_softmax(-1)
    return out


@torch.no_grad()
def note(path: Path, model: PreTrainedModel, prompts_NS: Tensor, **more: Tensor) -> None:
    new_NG = model.generate(
        prompts_NS,
        attention_mask=torch.ones_like(prompts_NS),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=-1,
    )[:, prompts_NS.shape[1] :]
    arrays = {"prompts": prompts_NS, "logprobs": logprobs(model, prompts_NS), "generated": new_NG, **more}
    np.savez(path, **{name: value.numpy() for name, value in arrays.items()})


def make(family: str, home: Path, tokenizer: Any, ids: Tensor) -> None:
    """All kinds of one family."""
    how, keep = FAMILIES[family][2:]
    shutil.rmtree(home, ignore_errors=True)
    prompts_NS = torch.stack([ids[at * 5000 : at * 5000 + PROMPT_TOKENS] for at in range(NUM_PROMPTS)])
    model = build(family)
    train(model, ids, 0, PLAIN_STEPS)
    model.save_pretrained(home / "plain")
    note(home / "plain.npz", model, prompts_NS)

    governed = chronomoe_hf.wrap(copy.deepcopy(model), steering(how))
    system = system_of(governed)
    train(governed, ids, 1000, GOVERNED_STEPS, system)
    governed.save_pretrained(home / "governed")
    plain = AutoModelForCausalLM.from_pretrained(home / "governed").eval()
    note(home / "governed.npz", governed, prompts_NS, plain_logprobs=logprobs(plain, prompts_NS))

    plan = lifecycle.plan_prune(system.evidence(), keep=keep, rank="contribution")
    lifecycle.export_checkpoint(home / "governed", plan, home / "cut", check="logits")
    note(home / "cut.npz", AutoModelForCausalLM.from_pretrained(home / "cut").eval(), prompts_NS)

    folded = copy.deepcopy(governed)
    folded.save_pretrained(home / "folded")  # its state goes with the save after the fold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chronomoe_hf.unwrap(folded, fold=True)
    folded.save_pretrained(home / "folded")
    note(home / "folded.npz", governed, prompts_NS)

    refitted(model, home, tokenizer, ids, prompts_NS)
    for kind in ("plain", "governed", "cut", "folded"):
        tokenizer.save_pretrained(home / kind)
    print(f"{family}: steered by {how}, {plan.specs[0].num_experts} -> {plan.num_kept} experts", flush=True)


def refitted(model: PreTrainedModel, home: Path, tokenizer: Any, ids: Tensor, prompts_NS: Tensor) -> None:
    """A cut to half the experts with what refit gives back, or ``refitted.json`` with the reason that there is none.

    Refit writes nothing where the error on held-out tokens does not fall; more tokens and another ridge are tried.
    """
    evidence = lifecycle.calibrate(model, [{"input_ids": batch(ids, 2000 + at)} for at in range(4)])
    plan = lifecycle.plan_prune(evidence, keep=0.5, rank="contribution")
    reasons = []
    for num_batches, ridge in FITS:
        fit = [{"input_ids": batch(ids, 3000 + at)} for at in range(num_batches)]
        try:
            report = lifecycle.refit(model, plan, fit, ridge=ridge)
        except ChronoError as error:
            reasons.append(f"{type(error).__name__}: {error}")
            break
        if report.applied:
            lifecycle.export(model, plan, home / "refitted", tokenizer=tokenizer, refit=report)
            note(home / "refitted.npz", AutoModelForCausalLM.from_pretrained(home / "refitted").eval(), prompts_NS)
            return
        reasons.append(f"refit refused: {report.reason}")
    (home / "refitted.json").write_text(json.dumps({"error": reasons[-1]}))


def main() -> int:
    home, *wanted = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer, ids = corpus()
    failed = []
    for family in wanted or FAMILIES:
        try:
            make(family, Path(home) / family, tokenizer, ids)
        except Exception as error:  # one family must not stop the others; the table shows the gap
            failed.append(family)
            print(f"{family}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
