"""The main job: fine-tune a small mixture-of-experts model under stress, and say what became of its experts.

A small Mixtral is pretrained on prose (once, then cached), loaded with `from_pretrained`, and fine-tuned on code with
one expert per token instead of two. Both changes push its routing out of balance. chronomoe_hf watches and, with the
presets `protect` and `balance`, governs. The job ends with a verdict per layer, the files it wrote, and a report.

    python examples/finetune_mixtral.py --compare
    python examples/finetune_mixtral.py --arch switch_transformers --preset balance --report-to tensorboard
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from _text_job import ARCHITECTURES, SIZES, ModelSize, TextDomain, Training, load_domain, pretrain_base
from _text_job import training_arguments as base_arguments
from _verdict import Arm, print_verdict, save_report, save_verdict
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, Trainer, set_seed

import chronomoe_hf

PRESETS = ("observe", "protect", "balance", "revive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the job does.

    Args:
        arch: model family, one of `ARCHITECTURES`.
        preset: ChronoConfig preset of the governed arm.
        compare: run the same fine-tuning with `observe` first, and show both.
        steps: optimizer steps of fine-tuning.
        pretrain_steps: optimizer steps of pretraining (cached).
        top_k: experts per token while fine-tuning (Switch always has 1).
        interval: optimizer steps in a telemetry window.
        seed: of pretraining, data order and fine-tuning.
        learning_rate: peak, of fine-tuning.
        output_dir: where runs are written; None = a new directory below ``runs``.
        report_to: Trainer's reporter, e.g. ``"tensorboard"``.
        size: shape of the model.
    """

    arch: str = "mixtral"
    preset: str = "protect"
    compare: bool = False
    steps: int = 300
    pretrain_steps: int = 400
    top_k: int = 1
    interval: int = 10
    seed: int = 0
    learning_rate: float = 1e-3
    output_dir: Path | None = None
    report_to: str = "none"
    size: ModelSize = SIZES["e8k2"]


def parse_arguments(arguments: list[str] | None = None) -> Options:
    """Options from the command line."""
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHITECTURES, default=default.arch)
    parser.add_argument("--preset", choices=PRESETS, default=default.preset)
    parser.add_argument("--compare", action="store_true", help="also run an ungoverned arm and show both")
    parser.add_argument("--steps", type=int, default=default.steps, help="optimizer steps of fine-tuning")
    parser.add_argument("--pretrain-steps", type=int, default=default.pretrain_steps)
    parser.add_argument("--top-k", type=int, default=default.top_k, help="experts per token while fine-tuning")
    parser.add_argument("--interval", type=int, default=default.interval, help="optimizer steps in a window")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--output-dir", type=Path, default=None, help="default: a new directory below runs/")
    parser.add_argument("--report-to", default=default.report_to, help="a Trainer reporter, e.g. tensorboard")
    return Options(**vars(parser.parse_args(arguments)))


def load_model(base: Path, arch: str, top_k: int) -> PreTrainedModel:
    """The pretrained model, its auxiliary loss off as in most fine-tuning, with `top_k` experts per token."""
    if arch == "switch_transformers":
        return AutoModelForSeq2SeqLM.from_pretrained(base)
    return AutoModelForCausalLM.from_pretrained(base, num_experts_per_tok=top_k, output_router_logits=False)


def training_arguments(options: Options, output_dir: Path) -> Any:
    """Trainer's arguments of the fine-tuning."""
    training = Training(steps=options.steps, learning_rate=options.learning_rate, seed=options.seed)
    return base_arguments(
        training, output_dir, logging_steps=5 * options.interval, report_to=options.report_to, run_name=output_dir.name
    )


def run_arm(options: Options, preset: str, base: Path, tokenizer: Any, text: TextDomain, output_dir: Path) -> Arm:
    """Fine-tune the model at `base` under one preset."""
    set_seed(options.seed)
    model = load_model(base, options.arch, options.top_k)
    model = chronomoe_hf.wrap(model, chronomoe_hf.ChronoConfig.preset(preset, interval=options.interval))
    trainer = Trainer(model, training_arguments(options, output_dir), train_dataset=text.train, eval_dataset=text.valid)
    chronomoe_hf.attach(trainer)
    before = trainer.evaluate()["eval_loss"]
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(output_dir / "final"))
    # So that the commands that read text find everything in one place.
    tokenizer.save_pretrained(output_dir / "final")
    snapshot = chronomoe_hf.system_of(model).last_snapshot
    return Arm(preset, snapshot, float(before), float(after), seconds, output_dir)


def run(options: Options) -> list[Arm]:
    """The whole job; returns the arms in the order in which they ran."""
    output_dir = options.output_dir or Path("runs") / f"{options.arch}-{time.strftime('%Y%m%d-%H%M%S')}"
    training = Training(steps=options.pretrain_steps, learning_rate=3e-3, seed=options.seed)
    base = pretrain_base(options.arch, options.size, training)
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = load_domain("code", tokenizer, options.size, options.arch)
    presets = ["observe"] if options.compare and options.preset != "observe" else []
    return [
        run_arm(options, preset, base, tokenizer, text, output_dir / preset) for preset in [*presets, options.preset]
    ]


def main(arguments: list[str] | None = None) -> None:
    """Command line entry."""
    arms = run(parse_arguments(arguments))
    print_verdict(arms, save_verdict(arms), report=save_report(arms))


if __name__ == "__main__":
    main()
