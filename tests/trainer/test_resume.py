"""Saving, resuming and everything Trainer does around them, in one process. Several processes: tests/distributed."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import jobs as training_job
from support import models as tiny
from support import moe_zoo
from support.jobs import Job, Tracing, make_trainer, rows, whole_weights
from support.models import NUM_EXPERTS, tiny_model
from support.run_records import assert_same, later_records
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoSystem
from chronomoe_hf.checkpoint import manifest as migrations
from chronomoe_hf.checkpoint.state_file import read_state
from chronomoe_hf.errors import (
    ConfigError,
    StateMissingError,
    StateWriteError,
    WeightMismatchError,
)
from chronomoe_hf.telemetry import read_jsonl

STATE_FILES = {"chronomoe/state.json", "chronomoe/state.tensors"}
# Every gate wide open, and windows of 3 steps, so that the checkpoint at step 4 lies inside one.
GOVERN: dict[str, Any] = {
    "interval": 3,
    "alerts": {"min_window_tokens": 1},
    "beta": {"eta": 0.2},
    "control": {"integral_target": 1.0, "integral_gain": 5.0, "min_pressure": 0.0, "lens_spread_max": 1e6},
}
SAVE: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
BEST: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "max_steps": 6,
    "load_best_model_at_end": True,
    # The worst loss is that of the first evaluation, so the best model is not the last one.
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}


class Stopped(Exception):
    """Stands for whatever ends a run between two micro-batches."""


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            raise Stopped


def govern(output_dir: Path, **fields: Any) -> Job:
    return Job(**{"output_dir": str(output_dir), "config": GOVERN, "arguments": SAVE, **fields})


def stop(job: Job, step: int) -> Tracing:
    """Train until `step` is half done."""
    trainer = make_trainer(job)
    trainer.add_callback(StopAt(step))
    with pytest.raises(Stopped):
        trainer.train()
    return trainer


def state_of(trainer: Tracing) -> dict[str, Any]:
    return chronomoe_hf.system_of(trainer.model).state_dict()


def counts(output_dir: Path | str, mode: str = "TRAIN") -> torch.Tensor:
    """Assignments by layer and expert over all records of a run, as a reader finds them."""
    records, broken = read_jsonl(Path(output_dir) / "chronomoe" / "routing_events.jsonl")
    assert broken == 0
    total = torch.zeros(2, NUM_EXPERTS, dtype=torch.int64)
    for record in records:
        if record["mode"] == mode:
            total[record["layer_id"]] += torch.tensor(record["expert_token_counts"])
    return total


def real_tokens(batches: list[dict[str, torch.Tensor]]) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


# ---- interrupted and resumed ----------------------------------------------------------------------------------------

VARIANTS = {
    "mixtral": {},
    "qwen3_moe": {"family": "qwen3_moe"},
    "balance": {"preset": "balance", "config": {"interval": 3, "alerts": {"min_window_tokens": 1}}},
    "checkpointing": {"arguments": {**SAVE, "activation_checkpointing": True}, "model": {"attention_dropout": 0.1}},
    "bf16-autocast": {"arguments": {**SAVE, "bf16": True}},
    "bf16-weights": {"model": {"dtype": "bfloat16"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_run(variant: str, tmp_path: Path) -> None:
    whole, parted = (govern(tmp_path / name, **VARIANTS[variant]) for name in ("whole", "parted"))
    expected = training_job.run(whole)
    stop(parted, 7)
    found = training_job.run(dataclasses.replace(parted, resume=True))
    tensors, _ = read_state(Path(parted.output_dir) / "checkpoint-4")
    assert_same(found["begin"]["tensors"], tensors)
    assert_same(found["weights"], expected["weights"])
    assert_same(found["tensors"], expected["tensors"])
    assert found["meta"] == expected["meta"]
    assert found["loss"] == expected["loss"]
    assert expected["tensors"]["beta_LE"].abs().max() > 0.01, "beta never moved"
    theirs, ours = (later_records(job.output_dir, 4) for job in (whole, parted))
    assert [record["step"] for record in theirs["snapshots"]] == [6, 8]
    assert ours == theirs


@pytest.mark.slow
def test_compiled_with_exact_counts_and_resume(tmp_path: Path) -> None:
    arguments = {**SAVE, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    whole = govern(tmp_path / "whole", arguments=arguments)
    expected = training_job.run(whole)
    fed = [batch for step in expected["fed"] for batch in step]
    assert len(fed) == 16
    assert counts(whole.output_dir).sum(1).tolist() == [2 * real_tokens(fed)] * 2
    parted = dataclasses.replace(whole, output_dir=str(tmp_path / "parted"))
    stop(parted, 7)
    found = training_job.run(dataclasses.replace(parted, resume=True))
    assert_same(found["weights"], expected["weights"])
    assert_same(found["tensors"], expected["tensors"])


def test_resume_without_optimizer_state_still_restores_ours(tmp_path: Path) -> None:
    job = govern(tmp_path, arguments={**SAVE, "save_only_model": True})
    stop(job, 7)
    assert not (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
    found = training_job.run(dataclasses.replace(job, resume=True))
    tensors, meta = read_state(tmp_path / "checkpoint-4")
    assert meta["step"] == 4
    assert_same(found["begin"]["tensors"], tensors)
    saved = type(tiny_model("mixtral")).from_pretrained(tmp_path / "checkpoint-4")
    assert_same(found["begin"]["weights"], dict(saved.named_parameters()))


def test_repair_raise_names_the_upstream_issue(tmp_path: Path) -> None:
    job = govern(tmp_path, config={**GOVERN, "checkpoint": {"repair": "raise"}})
    stop(job, 7)
    with pytest.raises(WeightMismatchError, match=r"huggingface/transformers#48805.*from_pretrained"):
        training_job.run(dataclasses.replace(job, resume=True))


def test_a_checkpoint_without_state(tmp_path: Path) -> None:
    job = govern(tmp_path)
    stop(job, 7)
    for name in STATE_FILES:
        (tmp_path / "checkpoint-4" / name).unlink()
    with pytest.warns(UserWarning, match="no chronomoe state in .*checkpoint-4: starting with fresh statistics"):
        found = training_job.run(dataclasses.replace(job, resume=True))
    assert not found["begin"]["tensors"]["tokens_LE"].any()
    config = {**GOVERN, "checkpoint": {"on_missing": "raise"}}
    strict = dataclasses.replace(job, config=config, resume=str(tmp_path / "checkpoint-4"))
    with pytest.raises(StateMissingError, match="checkpoint-4"):
        training_job.run(strict)


# ---- the best model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_best_step_is_restored_whole(family: str, tmp_path: Path) -> None:
    job = govern(tmp_path, family=family, arguments=BEST, final=True)
    trainer = make_trainer(job)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-6", "the best step must not be the last"
    trainer.save_model()
    for directory in (best, tmp_path):
        tensors, meta = read_state(directory)
        assert meta["step"] == int(best.name.split("-")[1])
        assert_same(state_of(trainer)["tensors"], tensors)
        saved = type(trainer.model).from_pretrained(directory)
        assert_same(whole_weights(trainer.model), dict(saved.named_parameters()))
    last = type(trainer.model).from_pretrained(tmp_path / "checkpoint-6")
    assert not torch.equal(last.model.layers[0].mlp.gate.weight, trainer.model.model.layers[0].mlp.gate.weight)


def test_the_best_model_with_repair_raise(tmp_path: Path) -> None:
    job = govern(tmp_path, arguments=BEST, config={**GOVERN, "checkpoint": {"repair": "raise"}})
    with pytest.raises(WeightMismatchError, match=r"transformers#48805"):
        training_job.run(job)


# ---- what is written where ------------------------------------------------------------------------------------------


def test_rotation_leaves_whole_checkpoints(tmp_path: Path) -> None:
    job = govern(tmp_path, arguments={**SAVE, "save_steps": 1, "save_total_limit": 2})
    training_job.run(job)
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-7", "checkpoint-8"]
    for name in kept:
        _, meta = read_state(tmp_path / name)
        assert meta["step"] == int(name.split("-")[1])


def test_the_final_model_loads_plainly_and_governed(tmp_path: Path) -> None:
    job = govern(tmp_path, final=True)
    trainer = make_trainer(job)
    trainer.train()
    trainer.save_model()
    plain, info = type(trainer.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    again = chronomoe_hf.wrap(plain, training_job.chrono_config(job))
    chronomoe_hf.system_of(again).load(tmp_path)
    batch = {name: value[None] for name, value in rows(1)[0].items()}
    trainer.model.eval(), again.eval()
    governed = again(**batch).logits
    assert torch.equal(governed, trainer.model(**batch).logits)
    assert not torch.equal(governed, chronomoe_hf.unwrap(again)(**batch).logits), "nothing steered"


def test_saving_one_rank_alone_is_legal(tmp_path: Path) -> None:
    trainer = make_trainer(govern(tmp_path, arguments={"max_steps": 1}))
    trainer.train()
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert all((tmp_path / "elsewhere" / name).is_file() for name in STATE_FILES)
    trainer.model.save_pretrained(tmp_path / "third")
    assert all((tmp_path / "third" / name).is_file() for name in STATE_FILES)


def test_strict_save_raises_at_once_in_one_process(tmp_path: Path) -> None:
    blocked = tmp_path / "checkpoint-4" / "chronomoe" / "state.tensors"
    blocked.mkdir(parents=True)
    (blocked / "in the way").touch()
    job = govern(tmp_path, config={**GOVERN, "checkpoint": {"strict_save": True}})
    with pytest.raises(
        StateWriteError, match="checkpoint-4.*could not be written|could not be written to .*checkpoint-4"
    ):
        training_job.run(job)
    lenient = training_job.run(govern(tmp_path))
    assert lenient["meta"]["step"] == 8


class LocalHub:
    """Stands in for the Hub: a repository is a list of the files that each upload would send."""

    def __init__(self) -> None:
        self.uploads: list[set[str]] = []

    def create_repo(self, name: str, **kwargs: Any) -> Any:
        return dataclasses.make_dataclass("RepoUrl", ["repo_id"])(name)

    def upload_folder(
        self, *, folder_path: str, path_in_repo: str = "", ignore_patterns: list[str] | None = None, **kwargs: Any
    ) -> Any:
        from huggingface_hub.utils import filter_repo_objects

        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        kept = filter_repo_objects(files, ignore_patterns=ignore_patterns)
        self.uploads.append({f"{path_in_repo}/{name}".lstrip("/") for name in kept})
        return Done()


class Done:
    """A finished upload."""

    def is_done(self) -> bool:
        return True

    done = is_done

    def result(self) -> str:
        return "uploaded"


def test_every_push_carries_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = LocalHub()
    for module in ("transformers.trainer", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.hf_api", lambda: hub, raising=module == "transformers.trainer")
    arguments = {
        **SAVE,
        "push_to_hub": True,
        "hub_strategy": "checkpoint",
        "hub_always_push": True,
        "hub_model_id": "a/b",
    }
    trainer = make_trainer(govern(tmp_path, arguments=arguments))
    trainer.train()
    trainer.push_to_hub()
    assert len(hub.uploads) == 5, "two saves with the model and the checkpoint each, and the last push"
    for index, upload in enumerate(hub.uploads):
        prefix = "last-checkpoint/" if index in (1, 3) else ""
        assert {prefix + name for name in STATE_FILES} <= upload
        assert not any("tmp" in name or name.endswith(".prev") for name in upload)


# ---- signals, retries, second runs, leftovers -----------------------------------------------------------------------


class Terminate(TrainerCallback):
    """SIGTERM while a step is being computed; then wait until the request has arrived."""

    def __init__(self, trainer: Tracing, step: int) -> None:
        self.trainer = trainer
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            (manager,) = [c.jit_manager for c in self.trainer.callback_handler.callbacks if hasattr(c, "jit_manager")]
            manager.kill_wait = 0
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 20
            while not manager.is_checkpoint_requested and time.monotonic() < deadline:
                time.sleep(0.01)


def test_a_checkpoint_on_sigterm(tmp_path: Path) -> None:
    whole = govern(tmp_path / "whole", arguments={"max_steps": 8})
    expected = training_job.run(whole)
    parted = govern(tmp_path / "parted", arguments={"max_steps": 8, "enable_jit_checkpoint": True})
    trainer = make_trainer(parted)
    trainer.add_callback(Terminate(trainer, 5))
    handler = signal.getsignal(signal.SIGTERM)
    trainer.train()
    signal.signal(signal.SIGTERM, handler)
    # Trainer saves before the optimizer step: the half-done step is not in the checkpoint, nor in our state.
    tensors, meta = read_state(Path(parted.output_dir) / "checkpoint-4")
    assert meta["step"] == 4 and meta["window_steps"] == 1
    resume = str(Path(parted.output_dir) / "checkpoint-4")
    found = training_job.run(govern(tmp_path / "parted", arguments={"max_steps": 8}, resume=resume))
    assert_same(found["begin"]["tensors"], tensors)
    assert_same(found["weights"], expected["weights"])
    assert_same(found["tensors"], expected["tensors"])


def test_a_second_train_starts_with_empty_accumulators(tmp_path: Path) -> None:
    job = govern(tmp_path, config={**GOVERN, "interval": 1}, arguments={"max_steps": 3})
    trainer = make_trainer(job)
    trainer.train()
    first = counts(tmp_path)
    assert first.sum() == 2 * 2 * real_tokens([b for step in trainer.fed for b in step])
    trainer.model(**{name: value[None] for name, value in rows(1)[0].items()})  # a forward that belongs to no step
    trainer.fed = [[]]
    tokens = state_of(trainer)["tensors"]["tokens_LE"].sum()
    trainer.train()
    fed = 2 * 2 * real_tokens([b for step in trainer.fed for b in step])
    assert state_of(trainer)["tensors"]["tokens_LE"].sum() - tokens == fed
    assert counts(tmp_path).sum() == fed + first.sum(), "a run of its own: nothing of the first is overwritten"


class Crowded(Tracing):
    """Runs out of memory in the second step, until the batch is small enough."""

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) > 2 and self.state.global_step == 1:
            raise RuntimeError("CUDA out of memory.")
        return loss


def test_a_retry_with_a_smaller_batch_counts_once(tmp_path: Path) -> None:
    arguments = {"max_steps": 4, "per_device_train_batch_size": 4, "auto_find_batch_size": True}
    job = govern(tmp_path, config={**GOVERN, "interval": 1}, arguments=arguments)
    trainer = make_trainer(job, Crowded)
    trainer.train()
    sizes = [len(batch["input_ids"]) for step in trainer.fed for batch in step]
    assert sizes[:3] == [4, 4, 4] and sizes[-8:] == [sizes[-1]] * 8 and sizes[-1] < 4, sizes
    retried = [batch for step in trainer.fed for batch in step][-8:]
    assert counts(tmp_path).sum(1).tolist() == [2 * real_tokens(retried)] * 2


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Seven rows an epoch: with batches of 2 and accumulation over 3, something is always left over."""

    def __iter__(self) -> Any:
        return iter(rows(7))


def test_leftovers_of_an_iterable_are_counted(tmp_path: Path) -> None:
    arguments = {"max_steps": 5, "gradient_accumulation_steps": 3}
    job = govern(tmp_path, config={**GOVERN, "interval": 1}, arguments=arguments)
    trainer = make_trainer(job, data=Stream())
    trainer.train()
    sizes = [len(step) for step in trainer.fed]
    records, _ = read_jsonl(tmp_path / "chronomoe" / "routing_events.jsonl")
    assert [record["step"] for record in records] == [1 + index // 2 for index in range(10)]
    fed = real_tokens([batch for step in trainer.fed for batch in step])
    assert counts(tmp_path).sum(1).tolist() == [2 * fed] * 2, sizes


def test_evaluation_in_bf16_leaves_the_state_alone(tmp_path: Path) -> None:
    job = govern(tmp_path, arguments={"max_steps": 3, "bf16_full_eval": True})
    trainer = make_trainer(job)
    trainer.train()
    before = state_of(trainer)["tensors"]
    assert before["beta_LE"].abs().max() > 0.01
    trainer.evaluate()
    assert trainer.model.dtype == torch.bfloat16, "Trainer no longer casts the model: this test is void"
    assert_same(state_of(trainer)["tensors"], before)
    assert before["beta_LE"].dtype == torch.float32 and before["ema_CLE"].dtype == torch.float64


def test_data_parallel_is_refused(tmp_path: Path) -> None:
    job = govern(tmp_path)
    trainer = Tracing(tiny_model("mixtral"), training_job.training_arguments(job), train_dataset=rows(4))
    trainer.args._n_gpu = 2
    with pytest.raises(ConfigError, match=r"nn.DataParallel on 2 GPUs.*torchrun"):
        chronomoe_hf.attach(trainer)


def test_a_callback_that_was_not_attached_saves_and_resumes_too(tmp_path: Path) -> None:
    job = govern(tmp_path)

    def trainer() -> Tracing:
        made = Tracing(
            tiny_model("mixtral"),
            training_job.training_arguments(job),
            train_dataset=rows(64),
            callbacks=[chronomoe_hf.ChronoCallback(training_job.chrono_config(job))],
        )
        made.fed = [[]]
        return made

    whole = trainer()
    whole.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(whole_weights(again.model), whole_weights(whole.model))
    assert_same(state_of(again)["tensors"], state_of(whole)["tensors"])
    assert state_of(whole)["tensors"]["beta_LE"].abs().max() > 0.01


def test_a_sharded_correction_bias_is_refused() -> None:
    """Ernie keeps its bias as a parameter, which FSDP2 and ZeRO-3 shard; as a buffer it would stay whole."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    config = chronomoe_hf.ChronoConfig.balance(interval=1)
    model = chronomoe_hf.wrap(moe_zoo.build("ernie4_5_moe"), config)
    system = chronomoe_hf.system_of(model)
    layer = system.layers[0]
    assert layer.native_bias
    ids = torch.randint(1, 50, (2, 8))
    model.train()(input_ids=ids)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in layer.router.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = torch.nn.Parameter(distribute_tensor(value.detach(), mesh, [Shard(0)]))
        with pytest.raises(ConfigError, match=r"correction bias of ernie4_5_moe.*BetaConfig\(native=False\)"):
            system.step(1)
    finally:
        dist.destroy_process_group()


def test_a_state_from_before_the_gains_starts_them_afresh(tmp_path: Path) -> None:
    def governed() -> ChronoSystem:
        model = tiny.tiny_model("mixtral")
        system = chronomoe_hf.system_of(chronomoe_hf.wrap(model, ChronoConfig.balance(interval=1)))
        for step in (1, 2):
            model(**tiny.tiny_batch("mixtral", seed=step))
            system.step(step)
        return system

    system = governed()
    assert system.step_state.gain_LE.all(), "bad test setup: no gain to lose"
    beta = system.step_state.beta_LE.clone()
    system.save(tmp_path)
    tensors, meta = read_state(tmp_path)
    before = {name: value for name, value in tensors.items() if name != "gain_LE"}
    tensors, meta = migrations.migrate(before, {**meta, "schema_version": 1}, "a state of 0.1.0")
    other = governed()
    other.load_state_dict({"tensors": tensors, "meta": meta})
    assert not other.step_state.gain_LE.any() and torch.equal(other.step_state.beta_LE, beta)
