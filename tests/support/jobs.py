"""One small Trainer run, described by data: used inside pytest and by the worker processes of `tests/distributed`.

The same description runs under every engine and in any number of processes, so results can be compared. Weights,
state, and everything the model was fed are handed back; nothing is judged here.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import torch
from support.models import VOCAB, tiny_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import chronomoe_hf
from chronomoe_hf import ChronoConfig

LENGTH = 16


@dataclasses.dataclass(kw_only=True)
class Job:
    """What one process of a run does.

    Args:
        output_dir: of the Trainer; results of a worker go there too.
        family: of `support.models.FAMILIES`.
        engine: ``"plain"`` (no engine, or DDP under torchrun), ``"fsdp"``, ``"zero2"`` or ``"zero3"``.
        preset, config: ChronoConfig preset and its fields as a dict of dicts.
        arguments: TrainingArguments beyond the defaults below.
        examples: rows of the data set.
        seed: of the model's weights.
        model: overrides of the tiny model's configuration; ``dtype`` by name.
        pretrained: directory to load the weights from, instead of making them from `seed`.
        resume: checkpoint to resume from, or True.
        remade: Trainer makes its model anew (``model_init``).
        fault: ``[name, step]``, one of FAULTS.
        blank: every second row is nothing but padding.
        trace: keep the weights at every step's start and every micro-batch.
        final: also call ``trainer.save_model()`` at the end.
    """

    output_dir: str
    family: str = "mixtral"
    engine: str = "plain"
    preset: str = "protect"
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    examples: int = 64
    seed: int = 0
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    pretrained: str | None = None
    resume: str | bool | None = None
    remade: bool = False
    fault: tuple[str, int] | None = None
    blank: bool = False
    trace: bool = False
    final: bool = False


def rows(count: int, *, seed: int = 7) -> list[dict[str, Tensor]]:
    """`count` rows of LENGTH tokens; row i has i % 5 tokens of padding at its end."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for index in range(count):
        ids = torch.randint(2, VOCAB, (LENGTH,), generator=generator)
        mask = torch.ones_like(ids)
        if index % 5:
            mask[-(index % 5) :] = 0
        out.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return out


def chrono_config(job: Job) -> ChronoConfig:
    """The job's ChronoConfig: its preset with the given fields laid over it."""
    base = ChronoConfig.preset(job.preset).to_dict()
    for name, value in job.config.items():
        base[name] = {**base[name], **value} if isinstance(value, dict) else value
    return ChronoConfig.from_dict(base)


def training_arguments(job: Job) -> TrainingArguments:
    """Small steps, no reporters, the engine of the job."""
    arguments: dict[str, Any] = {
        "output_dir": job.output_dir,
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
        "data_seed": 4,
    }
    if job.engine == "fsdp":
        arguments["fsdp"] = True
        arguments["fsdp_config"] = {"transformer_layer_cls_to_wrap": [_DECODER_LAYER[job.family]]}
    if job.engine.startswith("zero"):
        arguments |= {"use_cpu": False, "deepspeed": deepspeed_config(int(job.engine[-1]))}
    merged = {**arguments, **job.arguments}
    if "fsdp_config" in job.arguments:
        merged["fsdp_config"] = {**arguments["fsdp_config"], **job.arguments["fsdp_config"]}
    return TrainingArguments(**merged)


_DECODER_LAYER = {"mixtral": "MixtralDecoderLayer", "qwen3_moe": "Qwen3MoeDecoderLayer"}


def deepspeed_config(stage: int) -> dict[str, Any]:
    """ZeRO `stage` with everything else left to Trainer."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        # Nothing is small enough to stay whole: every router is partitioned.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 1},
    }


class Tracing(Trainer):
    """Keeps every micro-batch that this process trains on."""

    fed: list[list[dict[str, Tensor]]]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.fed[-1].append({name: value.detach().clone() for name, value in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)


class Tracer(TrainerCallback):
    """Weights and state when training begins (resumed or not); with `every_step`, weights at every step's start."""

    def __init__(self, trainer: Tracing, every_step: bool) -> None:
        self.trainer = trainer
        self.every_step = every_step
        self.weights: list[dict[str, Tensor]] = []
        self.begin: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        system = chronomoe_hf.system_of(self.trainer.model)
        self.begin = {"weights": whole_weights(kwargs["model"]), "tensors": system.state_dict()["tensors"]}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.fed.append([])
        if self.every_step:
            self.weights.append(whole_weights(kwargs["model"]))


class Fault(TrainerCallback):
    """Something goes wrong while `step` is being computed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.happen(kwargs["model"], args.process_index)

    def happen(self, model: nn.Module, rank: int) -> None:
        raise NotImplementedError


class Kill(Fault):
    """SIGKILL: nothing gets a chance to tidy up."""

    def happen(self, model: nn.Module, rank: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class CorruptBeta(Fault):
    """One bit of memory turns over, on rank 1."""

    def happen(self, model: nn.Module, rank: int) -> None:
        if rank == 1:
            chronomoe_hf.system_of(model).step_state.beta_LE[1, 3] += 1e-6


class CorruptScale(Fault):
    """Rank 1's controller has come to remember another history of its layer."""

    def happen(self, model: nn.Module, rank: int) -> None:
        if rank == 1:
            chronomoe_hf.system_of(model).controller.layer_state(0).harm_backoff = 0.5


class BreakHost(Fault):
    """The host part of the next closing window raises, once, on one rank."""

    rank = 1

    def happen(self, model: nn.Module, rank: int) -> None:
        if rank != self.rank:
            return
        controller = chronomoe_hf.system_of(model).controller
        decide = controller.decide

        def fail(*args: Any, **kwargs: Any) -> Any:
            controller.decide = decide  # type: ignore[method-assign]
            raise ZeroDivisionError(f"a mistake of ours on rank {rank}")

        controller.decide = fail  # type: ignore[method-assign]


class BreakMainHost(BreakHost):
    """The same on the process that decides and writes."""

    rank = 0


FAULTS: dict[str, type[Fault]] = {
    "kill": Kill,
    "corrupt beta": CorruptBeta,
    "corrupt scale": CorruptScale,
    "break host": BreakHost,
    "break main host": BreakMainHost,
}


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter in full on the CPU, by name. Collective under FSDP and ZeRO-3."""
    out: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")
        if isinstance(parameter, DTensor):
            out[name] = parameter.detach().full_tensor().clone()
        elif hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                out[name] = parameter.detach().clone()
        else:
            out[name] = parameter.detach().clone()
    return out


def make_trainer(job: Job, kind: type[Tracing] = Tracing, data: Any = None) -> Tracing:
    """Model, data, Trainer and ``attach``, as a user would write them."""
    arguments = training_arguments(job)
    overrides = {**job.model, "dtype": getattr(torch, job.model.get("dtype", "float32"))}

    def build() -> Any:
        model = tiny_model(job.family, seed=job.seed, **overrides)
        return model if job.pretrained is None else type(model).from_pretrained(job.pretrained)

    data = rows(job.examples) if data is None else data
    if job.blank:
        for row in data[1::2]:
            row.update(input_ids=row["input_ids"] * 0, attention_mask=row["attention_mask"] * 0)
            row["labels"] = torch.full_like(row["labels"], -100)
    source = {"model_init": build} if job.remade else {"model": build()}
    trainer = kind(args=arguments, train_dataset=data, eval_dataset=rows(6, seed=11), **source)
    trainer.fed = [[]]
    chronomoe_hf.attach(trainer, chrono_config(job))
    return trainer


def run(job: Job) -> dict[str, Any]:
    """Train, and hand back what this process saw and ended with."""
    trainer = make_trainer(job)
    sharded_at_wrap = any(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters())
    tracer = Tracer(trainer, job.trace)
    trainer.add_callback(tracer)
    if job.fault is not None:
        trainer.add_callback(FAULTS[job.fault[0]](job.fault[1]))
    trainer.train(resume_from_checkpoint=job.resume)
    if job.final:
        trainer.save_model()
    system = chronomoe_hf.system_of(trainer.model)
    state = system.state_dict()
    return {
        "sharded_at_wrap": sharded_at_wrap,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "weights": whole_weights(trainer.model),
        "tensors": state["tensors"],
        "meta": {name: value for name, value in state["meta"].items() if name not in ("run_id", "attempt")},
        "decisions": [decision.to_record() for decision in system.decisions],
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "best": trainer.state.best_model_checkpoint,
        "fed": trainer.fed,
        "begin": tracer.begin,
        "trace": tracer.weights,
    }


def save_result(job: Job, rank: int, result: dict[str, Any]) -> None:
    """Leave `result` where the test that started this process looks for it."""
    Path(job.output_dir).mkdir(parents=True, exist_ok=True)
    torch.save(result, result_path(job.output_dir, rank))


def result_path(output_dir: str | Path, rank: int) -> Path:
    """Where `save_result` puts a rank's result."""
    return Path(output_dir) / f"result-{rank}.pt"


def evaluated_arguments(output_dir: Path, **fields: Any) -> TrainingArguments:
    """Six steps of a quiet Trainer that logs every step and evaluates every two."""
    return TrainingArguments(
        str(output_dir),
        max_steps=6,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **fields,
    )
