"""One model of the pruning benchmark: pretrained on prose, fine-tuned on code, with the evidence that a run leaves.

Legend: S steps, N blocks of text, T tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from _text_job import SIZES, ModelSize, Training, cache_root, load_domain, pretrain_base

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.lifecycle import Evidence
from chronomoe_hf.lifecycle.pruning.calibrate import FisherSums

INTERVAL = 10  # optimizer steps in a window
WINDOWS = 5  # newest windows that evidence is read from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One kind of model.

    Args:
        arch: family.
        size: shape.
        pretrain_steps, steps: optimizer steps on prose, then on code.
        batch: blocks of `size.length` tokens a step.
        law: routing law of fine-tuning, ``"observe"`` or ``"balance"``.
    """

    arch: str
    size: ModelSize
    pretrain_steps: int = 400
    steps: int = 150
    batch: int = 16
    law: str = "observe"


# e8 and e32 have the sizes and the text of benchmarks/balance/run.py, e8 its pretraining too; k of pretraining is kept.
_SHORT = {"pretrain_steps": 200, "steps": 100, "batch": 8}
SHAPES = {
    "e8": Shape(arch="mixtral", size=SIZES["e8k2"]),
    "e32": Shape(arch="mixtral", size=SIZES["e32k4"], **_SHORT),
    "qwen3": Shape(arch="qwen3_moe", size=ModelSize(intermediate=64, experts=24, top_k=4), **_SHORT),
    "deepseek": Shape(arch="deepseek_v3", size=ModelSize(intermediate=64, experts=32, top_k=4), **_SHORT),
    "quick": Shape(
        arch="mixtral",
        size=ModelSize(layers=2, hidden=32, intermediate=32, heads=4, experts=8, top_k=2, vocab=512, length=64),
        pretrain_steps=20,
        steps=20,
        batch=8,
    ),
}


@dataclasses.dataclass
class Subject:
    """A model to be cut, and the text around it.

    Attributes:
        model: fine-tuned, plain.
        evidence: of the last windows of its run, Fisher sums of the whole run included.
        train_NS, valid_NS: blocks of the fine-tuning text; `valid_NS` is of documents never trained on.
    """

    model: PreTrainedModel
    evidence: Evidence
    train_NS: Tensor
    valid_NS: Tensor


def base_and_text(shape: Shape, seed: int) -> tuple[Path, Tensor, Tensor]:
    """The pretrained model of a shape and seed (its directory), and the blocks to train and to judge on."""
    base = pretrain_base(
        shape.arch, shape.size, Training(steps=shape.pretrain_steps, batch=shape.batch, learning_rate=3e-3, seed=seed)
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = load_domain("code", tokenizer, shape.size, shape.arch)
    return base, torch.tensor(text.train["input_ids"]), torch.tensor(text.valid["input_ids"])


def fine_tuned(
    shape: Shape, seed: int, base: Path, train_NS: Tensor, config: ChronoConfig, records: Path
) -> PreTrainedModel:
    """The fine-tuning of a shape and seed under other settings of the library; the model comes back wrapped."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, output_router_logits=False)
    model = chronomoe_hf.wrap(model.train(), dataclasses.replace(config, interval=INTERVAL))
    system = chronomoe_hf.system_of(model)
    system.begin()
    system.cut.schedule(shape.steps)
    system.open_telemetry(records)
    train(model, shape, train_NS, shape.steps, torch.Generator().manual_seed(seed), after_step=system.step)
    system.close_telemetry()
    return model


def subject(shape: Shape, seed: int) -> Subject:
    """Train the model of a shape and seed, or find it in the cache."""
    base, train_NS, valid_NS = base_and_text(shape, seed)
    recipe = json.dumps([base.name, dataclasses.asdict(shape), seed], sort_keys=True)
    final = cache_root() / f"prune-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if not (final / "evidence.json").is_file():
        scratch = Path(tempfile.mkdtemp(prefix=".prune-", dir=final.parent))
        try:
            _fine_tune(shape, seed, base, train_NS, scratch)
            shutil.rmtree(final, ignore_errors=True)
            scratch.rename(final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(final, output_router_logits=False)
    return Subject(model.eval(), Evidence.load(final / "evidence.json"), train_NS, valid_NS)


def _fine_tune(shape: Shape, seed: int, base: Path, train_NS: Tensor, out: Path) -> None:
    """AdamW with warm-up and linear decay; leaves the model and its evidence in `out`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, output_router_logits=False)
    config = ChronoConfig.observe() if shape.law == "observe" else ChronoConfig.balance()
    model = chronomoe_hf.wrap(model.train(), dataclasses.replace(config, interval=INTERVAL))
    system = chronomoe_hf.system_of(model)
    system.begin()
    system.open_telemetry(out)
    generator = torch.Generator().manual_seed(seed)
    with FisherSums(model) as fisher:
        train(model, shape, train_NS, shape.steps, generator, after_step=system.step)
    system.close_telemetry()
    evidence = Evidence.from_directory(out, windows=WINDOWS).with_vectors(fisher=fisher.scores())
    chronomoe_hf.unwrap(model, fold=shape.law == "balance").save_pretrained(out)
    evidence.save(out / "evidence.json")


def train(
    model: PreTrainedModel,
    shape: Shape,
    train_NS: Tensor,
    steps: int,
    generator: torch.Generator,
    *,
    after_step=lambda step: None,
    learning_rate: float = 1e-3,
) -> None:
    """AdamW for some steps: linear warm-up over 20, then linear decay to zero; every block is new."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    order_N = torch.randperm(train_NS.shape[0], generator=generator)
    for step in range(1, steps + 1):
        rate = learning_rate * min(1.0, step / 20, (steps - step + 1) / max(1, steps - 20))
        for group in optimizer.param_groups:
            group["lr"] = rate
        start = (step - 1) * shape.batch % (train_NS.shape[0] - shape.batch)
        block = train_NS[order_N[start : start + shape.batch]]
        model(input_ids=block, labels=block).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after_step(step)


if __name__ == "__main__":  # fill the cache: python benchmarks/prune/job.py SHAPE SEED
    subject(SHAPES[sys.argv[1]], int(sys.argv[2]))
