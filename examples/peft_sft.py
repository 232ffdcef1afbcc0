"""LoRA and TRL: supervised fine-tuning of an adapter on a mixture-of-experts model, its routing watched and governed.

A small Mixtral is pretrained on prose (once, then cached). LoRA matrices on its attention, its experts and its router
are then fine-tuned on passages of Python's standard library with TRL's SFTTrainer; the one line that matters is
``chronomoe_hf.attach(trainer)``. Padding is not counted, nor is what activation checkpointing computes twice.

    python examples/peft_sft.py
    python examples/peft_sft.py --preset balance --steps 200
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import warnings
from pathlib import Path

import datasets
import torch
from _text_job import SIZES, ModelSize, Training, load_text, pretrain_base
from _verdict import Arm, print_verdict, save_verdict
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import chronomoe_hf

PRESETS = ("observe", "protect", "balance")
SIZE = dataclasses.replace(SIZES["e8k2"], layers=2, length=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the job does.

    Args:
        preset: ChronoConfig preset.
        steps: optimizer steps of fine-tuning.
        pretrain_steps: optimizer steps of pretraining (cached).
        rank: of the LoRA matrices.
        interval: optimizer steps in a telemetry window.
        seed: of pretraining, data order and fine-tuning.
        output_dir: where the run is written; None = a new directory below ``runs``.
        size: shape of the model.
    """

    preset: str = "protect"
    steps: int = 60
    pretrain_steps: int = 150
    rank: int = 8
    interval: int = 10
    seed: int = 0
    output_dir: Path | None = None
    size: ModelSize = SIZE


def parse_arguments(arguments: list[str] | None = None) -> Options:
    """Options from the command line."""
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default=default.preset)
    parser.add_argument("--steps", type=int, default=default.steps, help="optimizer steps of fine-tuning")
    parser.add_argument("--pretrain-steps", type=int, default=default.pretrain_steps)
    parser.add_argument("--rank", type=int, default=default.rank, help="of the LoRA matrices")
    parser.add_argument("--interval", type=int, default=default.interval, help="optimizer steps in a window")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--output-dir", type=Path, default=None, help="default: a new directory below runs/")
    return Options(**vars(parser.parse_args(arguments)))


def passages(part: str, limit: int) -> datasets.Dataset:
    """Passages of source between blank lines, one a row, of very different lengths."""
    sources = load_text("code", max_chars=500_000)[part]["text"]
    found = [piece.strip() for source in sources for piece in source.split("\n\n")]
    return datasets.Dataset.from_dict({"text": [piece for piece in found if len(piece) > 80][:limit]})


def lora(rank: int) -> LoraConfig:
    """LoRA on attention, and on the fused expert weights and the router through ``target_parameters``."""
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    )


def make_trainer(options: Options, base: Path, output_dir: Path) -> SFTTrainer:
    """SFTTrainer over the pretrained model; it puts the adapter on itself."""
    arguments = SFTConfig(
        output_dir=str(output_dir),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        learning_rate=5e-3,
        lr_scheduler_type="linear",
        max_length=options.size.length,
        logging_steps=options.interval,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
        bf16=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    with warnings.catch_warnings():
        # PEFT warns that dropout does not reach target_parameters; there is none here.
        warnings.filterwarnings("ignore", module="peft")
        return SFTTrainer(
            AutoModelForCausalLM.from_pretrained(base),
            arguments,
            train_dataset=passages("train", 2000),
            eval_dataset=passages("valid", 128),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=lora(options.rank),
        )


def run(options: Options) -> Arm:
    """The whole job: pretrain or load, fine-tune the adapter, save it with the routing state beside it."""
    output_dir = (options.output_dir or Path("runs") / f"peft-{time.strftime('%Y%m%d-%H%M%S')}") / options.preset
    training = Training(steps=options.pretrain_steps, learning_rate=3e-3, seed=options.seed)
    base = pretrain_base("mixtral", options.size, training)
    set_seed(options.seed)
    trainer = make_trainer(options, base, output_dir)
    chronomoe_hf.attach(trainer, chronomoe_hf.ChronoConfig.preset(options.preset, interval=options.interval))
    before = trainer.evaluate()["eval_loss"]
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(output_dir / "final"))
    snapshot = chronomoe_hf.system_of(trainer.model).last_snapshot
    return Arm(options.preset, snapshot, float(before), float(after), seconds, output_dir)


def main(arguments: list[str] | None = None) -> None:
    """Command line entry."""
    arm = run(parse_arguments(arguments))
    path = save_verdict([arm])
    print_verdict([arm], path)
    print(json.dumps({"verdict": str(path)}))


if __name__ == "__main__":
    main()
