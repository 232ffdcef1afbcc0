"""What ``measure`` says of the text that lm-eval reads: losses of a dense checkpoint, and of its cut by the mask.

    python tests/clients/measure_text.py CHECKPOINTS OUT FAMILY ...

Writes ``OUT/text.jsonl`` and ``OUT/measured.json``. Every document is one sequence that begins with BOS, which is what
lm-eval's rolling log-likelihood conditions the first token on; all are shorter than its window.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from make_checkpoints import corpus
from transformers import AutoModelForCausalLM

from chronomoe_hf import lifecycle

NUM_DOCUMENTS, MOST_TOKENS = 24, 200


def main() -> None:
    home, out, *families = sys.argv[1:]
    tokenizer, ids = corpus()
    documents = []
    for at in range(NUM_DOCUMENTS):
        text = tokenizer.decode(ids[9000 + 700 * at : 9000 + 700 * at + MOST_TOKENS]).strip()
        documents.append(text[:600])
    Path(out).mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (Path(out) / "text.jsonl").write_text(lines, encoding="utf-8")
    size = sum(len(text.encode()) for text in documents)
    batches, tokens = [], 0
    for text in documents:
        row = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]])
        batches.append({"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()})
        tokens += row.shape[1] - 1
    measured = {}
    for family in families:
        folder = Path(home) / family
        model = AutoModelForCausalLM.from_pretrained(folder / "governed").eval()
        plan = lifecycle.PrunePlan.from_dict(json.loads((folder / "cut" / "prune_plan.json").read_text())["plan"])
        effect = lifecycle.measure(model, plan, batches, controls=0, worst=False)
        assert effect.tokens == tokens, (effect.tokens, tokens)
        losses = {"governed": effect.loss, "cut": effect.loss + effect.plan.delta_loss}
        for kind, loss in losses.items():
            measured[f"{family}/{kind}"] = {"loss": loss, "byte_perplexity": math.exp(loss * tokens / size)}
        print(family, losses, flush=True)
    (Path(out) / "measured.json").write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
