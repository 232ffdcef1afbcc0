"""A training loop of one's own with Accelerate: the three lines that chronomoe_hf adds, and a resume that is exact.

A small Mixtral is trained on the standard library's sources, alone or on several processes, and the run ends with the
verdict of the main job. A run that was killed goes on from its last checkpoint as if nothing had happened.

    python examples/accelerate_loop.py
    torchrun --nproc_per_node 2 examples/accelerate_loop.py --output-dir runs/loop
    torchrun --nproc_per_node 2 examples/accelerate_loop.py --output-dir runs/loop --resume

`accelerate launch` starts it as well, also with FSDP or DeepSpeed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from _text_job import ModelSize, TextDomain, blocks, build_model, build_tokenizer, load_text
from _verdict import Arm, print_verdict, save_verdict
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, get_constant_schedule_with_warmup

import chronomoe_hf

SIZE = ModelSize(layers=2, hidden=64, intermediate=64, experts=8, vocab=1024, length=64)
CHECKPOINT = "step-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the loop does.

    Args:
        preset: ChronoConfig preset.
        steps: optimizer steps.
        interval: optimizer steps in a telemetry window.
        save_every: optimizer steps between checkpoints.
        batch: blocks in a micro-batch of one process.
        accumulation: micro-batches in a step.
        learning_rate: after a short warm-up.
        seed: of weights and data order.
        output_dir: where the run is written.
        resume: go on from the last checkpoint in `output_dir`.
    """

    preset: str = "protect"
    steps: int = 60
    interval: int = 10
    save_every: int = 15
    batch: int = 8
    accumulation: int = 2
    learning_rate: float = 2e-3
    seed: int = 0
    output_dir: Path = Path("runs") / "accelerate_loop"
    resume: bool = False


class Progress:
    """How far the data has been read; saved and restored by Accelerate."""

    def __init__(self) -> None:
        self.step = 0
        self.epoch = 0
        self.batch = 0

    def state_dict(self) -> dict[str, int]:
        """Plain numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Inverse of `state_dict`."""
        vars(self).update(state)


def parse_arguments(arguments: list[str] | None = None) -> Options:
    """Options from the command line."""
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("observe", "protect", "balance"), default=default.preset)
    parser.add_argument("--steps", type=int, default=default.steps, help="optimizer steps")
    parser.add_argument("--interval", type=int, default=default.interval, help="optimizer steps in a window")
    parser.add_argument("--save-every", type=int, default=default.save_every, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--output-dir", type=Path, default=default.output_dir)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")
    return Options(**vars(parser.parse_args(arguments)))


def load_blocks() -> TextDomain:
    """Part of the standard library as packed blocks; every process makes the same."""
    documents = load_text("code", max_chars=200_000)
    tokenizer = build_tokenizer(documents["train"]["text"], SIZE.vocab)
    parts = {name: blocks(documents[name], tokenizer, SIZE.length).with_format("torch") for name in documents}
    return TextDomain(**parts)


def last_checkpoint(output_dir: Path) -> Path:
    """The newest checkpoint that was written to its end: its mark is written last."""
    steps = [int(path.parent.name.removeprefix(CHECKPOINT)) for path in output_dir.glob(f"{CHECKPOINT}*/done")]
    if not steps:
        raise SystemExit(f"no complete checkpoint in {output_dir}; start without --resume")
    return output_dir / f"{CHECKPOINT}{max(steps)}"


def save(accelerator: Accelerator, directory: Path) -> None:
    """Write a checkpoint on all processes, then its mark of completion."""
    accelerator.save_state(str(directory))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (directory / "done").touch()
        print(f"saved {directory}", flush=True)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: Any) -> float:
    """Mean loss over the held-out blocks, nats per token."""
    model.eval()
    losses = [accelerator.gather_for_metrics(model(**batch).loss.repeat(len(batch["input_ids"]))) for batch in loader]
    model.train()
    return float(torch.cat(losses).mean())


def train(
    accelerator: Accelerator, options: Options, model: Any, optimizer: Any, scheduler: Any, loader: Any, at: Progress
) -> None:
    """Train until ``options.steps``, from wherever `at` stands."""
    system = chronomoe_hf.system_of(model)
    for epoch in itertools.count(at.epoch):
        loader.set_epoch(epoch)
        batches = skip_first_batches(loader, at.batch) if at.batch else loader
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            at.batch += 1
            if not accelerator.sync_gradients:
                continue
            at.step += 1
            snapshot = system.step(at.step)  # once per optimizer step, on every process
            if snapshot is not None and accelerator.is_main_process:
                print(f"step {at.step}: loss {loss.item():.3f} {json.dumps(snapshot.scalars())}", flush=True)
            if at.step % options.save_every == 0:
                save(accelerator, options.output_dir / f"{CHECKPOINT}{at.step}")
            if at.step >= options.steps:
                return
        at.epoch, at.batch = epoch + 1, 0


def run(options: Options) -> Arm | None:
    """The whole loop; returns what the verdict needs, on the main process."""
    accelerator = Accelerator(
        gradient_accumulation_steps=options.accumulation,
        cpu=not torch.cuda.is_available(),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    set_seed(options.seed)
    text = load_blocks()
    plain: PreTrainedModel = build_model("mixtral", SIZE, aux_loss=0.0, seed=options.seed)
    model: Any = chronomoe_hf.wrap(plain, chronomoe_hf.ChronoConfig.preset(options.preset, interval=options.interval))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    model, optimizer, scheduler, loader, held_out = accelerator.prepare(
        model,
        optimizer,
        get_constant_schedule_with_warmup(optimizer, 10),
        DataLoader(text.train, batch_size=options.batch, shuffle=True, drop_last=True),
        DataLoader(text.valid, batch_size=4 * options.batch),
    )
    at = Progress()
    accelerator.register_for_checkpointing(at)
    system = chronomoe_hf.system_of(model)
    system.register(accelerator)  # save_state and load_state now carry the routing state as well
    loss_before = evaluate(accelerator, model, held_out)
    system.begin()
    if options.resume:
        accelerator.load_state(str(last_checkpoint(options.output_dir)))
    system.open_telemetry(options.output_dir, resume_step=at.step if options.resume else None)
    started = time.perf_counter()
    train(accelerator, options, model, optimizer, scheduler, loader, at)
    seconds = time.perf_counter() - started
    system.close_window()
    system.close_telemetry()
    loss_after = evaluate(accelerator, model, held_out)
    save(accelerator, options.output_dir / "final")
    accelerator.end_training()
    if not accelerator.is_main_process:
        return None
    assert system.last_snapshot is not None
    return Arm(options.preset, system.last_snapshot, loss_before, loss_after, seconds, options.output_dir)


def main(arguments: list[str] | None = None) -> None:
    """Command line entry."""
    arm = run(parse_arguments(arguments))
    if arm is not None:
        path = save_verdict([arm])
        print_verdict([arm], path)
        print(json.dumps({"verdict": str(path)}))


if __name__ == "__main__":
    main()
