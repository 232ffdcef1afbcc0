"""attach and its way back: originals restored, nothing of ours left behind, and clear words for what cannot be done."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import jobs as training_job
from support import models as tiny
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import chronomoe_hf
from chronomoe_hf import ChronoCallback, ChronoConfig, ChronoRouter
from chronomoe_hf.checkpoint.state_file import has_state
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.telemetry import read_jsonl
from chronomoe_hf.wrapping.owner import find_system

CONFIG = ChronoConfig.balance(interval=1)


def trainer_for(output_dir: Path, model: Any = None, kind: type[Trainer] = Trainer, **overrides: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **overrides,
    }
    return kind(
        tiny.tiny_model("mixtral") if model is None else model,
        TrainingArguments(str(output_dir), **settings),
        train_dataset=training_job.rows(64),
        eval_dataset=training_job.rows(8, seed=1),
    )


def wrapped(model: nn.Module) -> bool:
    return find_system(model) is not None or any(isinstance(module, ChronoRouter) for module in model.modules())


def by_remove(trainer: Trainer) -> None:
    trainer.remove_callback(ChronoCallback)


def by_pop(trainer: Trainer) -> None:
    trainer.pop_callback(next(c for c in trainer.callback_handler.callbacks if isinstance(c, ChronoCallback)))


def by_unwrap(trainer: Trainer) -> None:
    chronomoe_hf.unwrap(trainer.model)


WAYS: list[Callable[[Trainer], None]] = [chronomoe_hf.detach, by_remove, by_pop, by_unwrap]


@pytest.mark.parametrize("leave", WAYS)
def test_every_way_out_leaves_the_trainer_as_it_was(leave: Callable[[Trainer], None], tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "a")
    before = dict(vars(trainer)), dict(vars(trainer.callback_handler)), dict(vars(trainer.model))
    listed = list(trainer.callback_handler.callbacks)
    callback = chronomoe_hf.attach(trainer, CONFIG)
    changed = {name for name in vars(trainer) if name not in before[0]}
    assert changed == {"save_model", "create_model_card", "train", "call_model_init", "evaluation_loop"}
    trainer.train()
    assert has_state(tmp_path / "a" / "checkpoint-4"), "bad test setup"
    model_names = set(vars(trainer.model))
    leave(trainer)
    assert not changed & set(vars(trainer))
    assert set(vars(trainer.callback_handler)) == set(before[1])
    assert trainer.callback_handler.callbacks == listed
    assert not wrapped(trainer.model) and model_names - set(vars(trainer.model)) == {
        "_chrono_labels",
        "_chrono_system",
        "save_pretrained",
    }
    assert callback.system is None and callback.hooks is None
    records = (tmp_path / "a" / "chronomoe" / "snapshots.jsonl").read_bytes()

    trainer.args.output_dir = str(tmp_path / "b")
    trainer.train()
    trainer.save_model(str(tmp_path / "last"))
    assert (tmp_path / "b" / "checkpoint-4").is_dir()
    for directory in (tmp_path / "b" / "checkpoint-2", tmp_path / "b" / "checkpoint-4", tmp_path / "last"):
        assert not has_state(directory), directory
    assert not (tmp_path / "b" / "chronomoe").exists()
    assert (tmp_path / "a" / "chronomoe" / "snapshots.jsonl").read_bytes() == records
    assert not any(key.startswith("moe/") for entry in trainer.state.log_history for key in entry)

    again = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=1))
    assert again is not callback
    trainer.args.output_dir = str(tmp_path / "c")
    trainer.train()
    assert again.system is not None and again.system.global_step == 4
    assert has_state(tmp_path / "c" / "checkpoint-4")
    snapshots, _ = read_jsonl(tmp_path / "c" / "chronomoe" / "snapshots.jsonl")
    assert [snapshot["step"] for snapshot in snapshots] == [1, 2, 3, 4]
    assert not any(snapshot["active_alerts"] for snapshot in snapshots)


def test_a_model_that_the_user_wrapped_stays_wrapped(tmp_path: Path) -> None:
    model = chronomoe_hf.wrap(tiny.tiny_model("mixtral"), CONFIG)
    trainer = trainer_for(tmp_path, model)
    chronomoe_hf.attach(trainer)
    trainer.train()
    chronomoe_hf.detach(trainer)
    system = chronomoe_hf.system_of(model)
    assert system.global_step == 4 and system.on_unwrap == []
    chronomoe_hf.detach(trainer)  # nothing to do: no error
    chronomoe_hf.unwrap(model)
    assert not wrapped(model)


def test_the_last_of_two_trainers_of_one_model_unwraps_it(tmp_path: Path) -> None:
    model = tiny.tiny_model("mixtral")
    first, second = trainer_for(tmp_path / "a", model), trainer_for(tmp_path / "b", model)
    assert chronomoe_hf.attach(first, CONFIG).system is chronomoe_hf.attach(second).system
    chronomoe_hf.detach(first)
    second.train()
    assert chronomoe_hf.system_of(model).global_step == 4
    chronomoe_hf.detach(second)
    assert not wrapped(model)
    # As in a notebook: the first Trainer is forgotten, not detached, and is not kept alive.
    third = trainer_for(tmp_path / "c", model)
    gone = weakref.ref(chronomoe_hf.attach(third, CONFIG))
    fourth = trainer_for(tmp_path / "d", model)
    chronomoe_hf.attach(fourth)
    del third
    gc.collect()
    assert gone() is None
    chronomoe_hf.detach(fourth)
    assert not wrapped(model)
    for trainer in (first, second):
        assert not {"save_model", "train", "evaluation_loop"} & set(vars(trainer))


def test_a_model_under_peft_is_left_as_it_was(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.tiny_model("mixtral"), peft.LoraConfig(target_modules=["q_proj"]))
    inner = model.get_base_model()
    trainer = trainer_for(tmp_path, model)
    before = set(vars(model)), set(vars(inner))
    chronomoe_hf.attach(trainer, CONFIG)
    assert "save_pretrained" in vars(model)
    chronomoe_hf.detach(trainer)
    assert (set(vars(model)), set(vars(inner))) == before and not wrapped(model)


def test_a_callback_that_was_added_later_goes_first_by_itself(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    callback = ChronoCallback(CONFIG)
    trainer.add_callback(callback)
    assert trainer.callback_handler.callbacks[-1] is callback
    trainer.train()
    assert chronomoe_hf.attach(trainer) is callback and trainer.callback_handler.callbacks[0] is callback
    assert sum(isinstance(other, ChronoCallback) for other in trainer.callback_handler.callbacks) == 1
    chronomoe_hf.detach(trainer)
    assert not {"save_model", "train", "evaluation_loop"} & set(vars(trainer))


def test_unwrapping_in_the_middle_of_training_leaves_the_other_callbacks_their_turn(tmp_path: Path) -> None:
    seen: list[int] = []

    class Leave(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)
            if state.global_step == 2:
                chronomoe_hf.unwrap(kwargs["model"])

    trainer = trainer_for(tmp_path, logging_steps=1, save_strategy="no")
    chronomoe_hf.attach(trainer, CONFIG)
    trainer.add_callback(Leave())
    trainer.train()
    assert seen == [1, 2, 3, 4]
    logged = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [1, 2, 3, 4]
    records, _ = read_jsonl(tmp_path / "chronomoe" / "snapshots.jsonl")
    assert [record["step"] for record in records] == [1, 2]


class Own(Trainer):
    """A subclass whose methods take more than Trainer's, by place and by name."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False, *, note: str = "") -> None:
        self.notes = [*getattr(self, "notes", []), note]
        super().save_model(output_dir, _internal_call)

    def train(self, *args: Any, label: str = "", **kwargs: Any) -> Any:
        self.label = label
        return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, shout: bool = False, **kwargs: Any) -> Any:
        self.shout = shout
        return super().evaluation_loop(*args, **kwargs)


def test_what_a_subclass_adds_to_the_methods_passes_through(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "a", kind=Own)
    chronomoe_hf.attach(trainer, CONFIG)
    trainer.train(label="first")
    assert trainer.label == "first"
    trainer.save_model(str(tmp_path / "end"), note="final")
    assert trainer.notes[-1] == "final" and has_state(tmp_path / "end")
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation", None, None, "eval_x", shout=True)
    assert trainer.shout and "eval_x_moe/neff_min" in output.metrics
    beta = chronomoe_hf.system_of(trainer.model).step_state.beta_LE.clone()
    resumed = trainer_for(tmp_path / "b", kind=Own)
    chronomoe_hf.attach(resumed, CONFIG)
    resumed.train(str(tmp_path / "a" / "checkpoint-2"), label="second")  # by place, through *args
    assert resumed.label == "second"
    assert (chronomoe_hf.system_of(resumed.model).step_state.beta_LE == beta).all()


def test_another_library_that_replaces_the_same_method_keeps_its_own(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "a")
    calls: list[str] = []
    inner = trainer.save_model
    trainer.save_model = lambda *args, **kwargs: (calls.append("before"), inner(*args, **kwargs))[1]  # type: ignore[method-assign]
    first = trainer.save_model
    chronomoe_hf.attach(trainer, CONFIG)
    ours = trainer.save_model
    trainer.save_model = lambda *args, **kwargs: (calls.append("after"), ours(*args, **kwargs))[1]  # type: ignore[method-assign]
    last = trainer.save_model
    trainer.save_model(str(tmp_path / "b"))
    assert calls == ["after", "before"] and has_state(tmp_path / "b")
    chronomoe_hf.detach(trainer)
    assert trainer.save_model is last, "what came after us stays, and ours only passes calls on"
    trainer.save_model(str(tmp_path / "c"))
    assert calls == ["after", "before"] * 2 and not has_state(tmp_path / "c")
    other = trainer_for(tmp_path / "d")
    other.save_model = first  # type: ignore[method-assign]
    chronomoe_hf.attach(other, CONFIG)
    chronomoe_hf.detach(other)
    assert other.save_model is first


@pytest.mark.parametrize("verb", ["attach", "detach"])
def test_anything_but_a_trainer_is_refused_with_the_way_out(verb: str, tmp_path: Path) -> None:
    call = getattr(chronomoe_hf, verb)
    with pytest.raises(ConfigError, match=rf"{verb}\(\) takes a Trainer and got a MixtralForCausalLM; .*wrap\(model\)"):
        call(tiny.tiny_model("mixtral"))
    with pytest.raises(ConfigError, match="got a TrainingArguments; give a transformers.Trainer"):
        call(TrainingArguments(str(tmp_path), report_to=[]))
    with pytest.raises(ConfigError, match="no preset 'obsreve'; did you mean 'observe'"):
        ChronoCallback("obsreve")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="config is a dict; give a ChronoConfig"):
        ChronoCallback({"interval": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", ["wrap", "unwrap", "system_of"])
def test_a_trainer_in_the_place_of_a_model_is_refused_with_the_way_out(verb: str, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    with pytest.raises(ConfigError, match=rf"{verb}\(\) takes a model and got a Trainer; .*trainer\.model.*attach"):
        getattr(chronomoe_hf, verb)(trainer)
    with pytest.raises(ConfigError, match=rf"{verb}\(\) takes a model \(torch.nn.Module\) and got a str"):
        getattr(chronomoe_hf, verb)("mistralai/Mixtral-8x7B-v0.1")
    with pytest.raises(ConfigError, match="no preset 'balanced'"):
        chronomoe_hf.wrap(trainer.model, "balanced")  # type: ignore[arg-type]
