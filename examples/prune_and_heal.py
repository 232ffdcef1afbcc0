"""From a fine-tuning run to a smaller model: evidence, plan, measured cost, refit, healing, export.

The small Mixtral of the main job is fine-tuned on code while chronomoe_hf observes. Half of the experts are then
planned away by what the run saw of them; the cost is measured on held-out text beside random plans, most of it is given
back by the refit, some steps are trained inside the mask, and the smaller checkpoint is written and loaded again.

    python examples/prune_and_heal.py
    python examples/prune_and_heal.py --keep 0.75 --heal-steps 0
    python examples/prune_and_heal.py --heal routers    # only the routers learn, from the full model, without labels
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _text_job import SIZES, ModelSize, TextDomain, Training, load_domain, pretrain_base, training_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, default_data_collator, set_seed

import chronomoe_hf
from chronomoe_hf import lifecycle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the job does.

    Args:
        keep: fraction of the experts that stay.
        rank: what orders them, see ``lifecycle.plan_prune``.
        steps, heal_steps: optimizer steps of fine-tuning, and inside the mask.
        heal: what is trained in the mask: ``"all"`` on the text, or the ``"routers"`` alone, towards the full model.
        pretrain_steps: optimizer steps of pretraining (cached).
        blocks: held-out blocks to measure on; as many training blocks are read by the refit.
        seed: of everything.
        output_dir: where the run, the plan and the small model go; None = a new directory below ``runs``.
        size: shape of the model.
    """

    keep: float = 0.5
    rank: str = "contribution"
    steps: int = 150
    heal_steps: int = 50
    heal: str = "all"
    pretrain_steps: int = 400
    blocks: int = 128
    seed: int = 0
    output_dir: Path | None = None
    size: ModelSize = SIZES["e8k2"]


def parse_arguments(arguments: list[str] | None = None) -> Options:
    """Options from the command line."""
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=default.keep, help="fraction of the experts that stay")
    parser.add_argument("--rank", choices=lifecycle.RANKS, default=default.rank)
    parser.add_argument("--steps", type=int, default=default.steps, help="optimizer steps of fine-tuning")
    parser.add_argument("--heal-steps", type=int, default=default.heal_steps, help="optimizer steps inside the mask")
    parser.add_argument("--heal", choices=("all", "routers"), default=default.heal, help="what the healing trains")
    parser.add_argument("--pretrain-steps", type=int, default=default.pretrain_steps)
    parser.add_argument("--blocks", type=int, default=default.blocks, help="blocks to measure on and to refit on")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--output-dir", type=Path, default=None, help="default: a new directory below runs/")
    return Options(**vars(parser.parse_args(arguments)))


def batches(rows: Any, count: int) -> list[dict[str, Any]]:
    """The first `count` rows as batches of eight."""
    picked = [rows[index] for index in range(min(count, len(rows)))]
    return [dict(default_data_collator(picked[start : start + 8])) for start in range(0, len(picked), 8)]


class RoutersTowardsTeacher(Trainer):
    """Trains the routers alone, so that the next-token distribution becomes the teacher's: no labels are read.

    What was cut is still known to the full model; the routers learn which of the survivors comes closest
    (Router KD, arXiv 2603.02217).
    """

    def __init__(self, *arguments: Any, teacher: PreTrainedModel, plan: lifecycle.PrunePlan, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.teacher = teacher.eval()
        self.model.requires_grad_(False)
        for layer in plan.layers:
            self.model.get_submodule(layer.spec.name).requires_grad_(True)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **more: Any) -> Any:
        """KL(teacher || model), nats per token; the usual loss in an evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, *arguments, **more)
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            want = self.teacher(**unlabelled).logits.float().log_softmax(-1).flatten(0, -2)
        found = model(**unlabelled).logits.float().log_softmax(-1).flatten(0, -2)
        return F.kl_div(found, want, reduction="batchmean", log_target=True)


def train(
    model: PreTrainedModel,
    text: TextDomain,
    options: Options,
    steps: int,
    output_dir: Path,
    *,
    observe: bool = False,
    teacher: PreTrainedModel | None = None,
    plan: lifecycle.PrunePlan | None = None,
) -> Trainer:
    """A Trainer's run over the training text, on record with `observe`; with a `teacher`, of the routers alone."""
    training = Training(steps=steps, warmup_steps=min(20, steps // 2), seed=options.seed)
    data: dict[str, Any] = {"train_dataset": text.train, "eval_dataset": text.valid}
    arguments = training_arguments(training, output_dir)
    if teacher is not None and plan is not None:
        trainer: Trainer = RoutersTowardsTeacher(model, arguments, teacher=teacher, plan=plan, **data)
    else:
        trainer = Trainer(model, arguments, **data)
    if observe:
        chronomoe_hf.attach(trainer, chronomoe_hf.ChronoConfig.observe(interval=10))
    if steps:
        trainer.train()
    return trainer


def run(options: Options) -> dict[str, float]:
    """The whole job; returns the loss on held-out text after each stage."""
    output_dir = options.output_dir or Path("runs") / f"prune-{time.strftime('%Y%m%d-%H%M%S')}"
    base = pretrain_base(
        "mixtral", options.size, Training(steps=options.pretrain_steps, learning_rate=3e-3, seed=options.seed)
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = load_domain("code", tokenizer, options.size, "mixtral")
    text = TextDomain(text.train, text.valid.select(range(0, len(text.valid), max(1, len(text.valid) // 256))))
    set_seed(options.seed)

    # Fine-tune; the library only looks on.
    model = AutoModelForCausalLM.from_pretrained(base, output_router_logits=False)
    trainer = train(model, text, options, options.steps, output_dir / "run", observe=True)
    losses = {"full": float(trainer.evaluate()["eval_loss"])}
    chronomoe_hf.unwrap(model)

    # Plan and measure.
    evidence = lifecycle.Evidence.from_directory(output_dir / "run")
    plan = lifecycle.plan_prune(evidence, keep=options.keep, rank=options.rank)  # type: ignore[arg-type]
    plan.save(output_dir / "plan.json")
    effect = lifecycle.measure(model, plan, batches(text.valid, options.blocks), controls=3)
    print(effect)

    # Refit, heal inside the mask, export.
    with lifecycle.masked(model, plan):
        losses["cut"] = float(trainer.evaluate()["eval_loss"])
    full = copy.deepcopy(model) if options.heal == "routers" else None
    report = lifecycle.refit(model, plan, batches(text.train, options.blocks))
    with lifecycle.masked(model, plan):
        losses["refitted"] = float(trainer.evaluate()["eval_loss"])
        healed = train(model, text, options, options.heal_steps, output_dir / "heal", teacher=full, plan=plan)
        losses["healed"] = float(healed.evaluate()["eval_loss"])
    lifecycle.export(model, plan, output_dir / "small", tokenizer=tokenizer, effect=effect, refit=report)
    small = AutoModelForCausalLM.from_pretrained(output_dir / "small")
    losses["small, loaded again"] = float(Trainer(small, healed.args, eval_dataset=text.valid).evaluate()["eval_loss"])
    for stage, loss in losses.items():
        print(f"{stage:20} {loss:.4f}")
    print(f"smaller model: {output_dir / 'small'}")
    return losses


def main(arguments: list[str] | None = None) -> None:
    """Command line entry."""
    run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
