"""sentence-transformers: a bi-encoder of a tiny Mixtral, trained by its own trainer: `sentences.py MODEL`."""

from __future__ import annotations

import json
import sys

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses, modules
from support import tool_inputs

import chronomoe_hf
from chronomoe_hf import ChronoConfig


def main() -> int:
    encoder = modules.Transformer(sys.argv[1])
    model = SentenceTransformer(modules=[encoder, modules.Pooling(64)], device="cpu")
    pairs = [(tool_inputs.sentence(at), tool_inputs.sentence(at + 1)) for at in range(32)]
    data = Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [b for _, b in pairs]})
    arguments = SentenceTransformerTrainingArguments(
        "out",
        max_steps=6,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        save_steps=3,
        learning_rate=0.01,
    )
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=data, loss=losses.MultipleNegativesRankingLoss(model)
    )
    callback = chronomoe_hf.attach(trainer, ChronoConfig.balance(interval=2))
    system = callback.system
    assert system is not None
    counted, mask = [torch.zeros(8, dtype=torch.int64) for _ in system.layers], []
    owner = system.layers[0].recorder.scope
    for layer in system.layers:

        def hook(module: object, args: object, output: tuple[torch.Tensor, ...], at: int = layer.layer_id) -> None:
            real = owner.mask_T
            index = output[-1] if real is None else output[-1][real]
            if torch.is_grad_enabled():
                counted[at] += torch.bincount(index.flatten(), minlength=8)

        layer.router.register_forward_hook(hook)
    trainer.train()
    del mask
    recorded = tool_inputs.recorded(tool_inputs.Path("out"))
    moved = float(system.step_state.beta_LE.abs().max())
    equal = recorded == [each.tolist() for each in counted]
    line = {
        "counts": "EQUAL" if equal else "DIFFERENT",
        "assignments": int(sum(map(sum, recorded))),
        "beta moved": moved > 0,
    }
    print(json.dumps({"case": "bi-encoder, balance", "result": "ok" if equal and moved > 0 else "FAILED", **line}))
    return int(not (equal and moved > 0))


if __name__ == "__main__":
    sys.exit(main())
