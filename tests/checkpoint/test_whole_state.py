"""What the laws move comes back bit for bit: every preset, full and adapter, every way back, on eight families."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support import moe_zoo
from support.run_records import assert_same
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from chronomoe_hf import ChronoConfig, attach, system_of, unwrap, wrap
from chronomoe_hf.checkpoint.card import ONLY_IN_STATE
from chronomoe_hf.checkpoint.state_file import read_state
from chronomoe_hf.errors import StateCorruptError

NATIVE = ("deepseek_v3", "glm4_moe", "ernie4_5_moe", "minimax_m2", "lfm2_moe", "afmoe")
FAMILIES = (*NATIVE, "mixtral", "qwen3_moe")
WINDOWS: dict[str, Any] = {"interval": 2, "alerts__min_window_tokens": 1}
ACTS: dict[str, Any] = {"beta__dead_zone": None, "beta__first_layer": "same", "beta__rate": 0.3}  # in every step
OPEN: dict[str, Any] = {
    "beta__eta": 0.2,
    "control__integral_target": 1.0,
    "control__integral_gain": 5.0,
    "control__min_pressure": 0.0,
    "control__lens_spread_max": 1e6,
}
PRESETS = {
    "observe": lambda: ChronoConfig.observe(**WINDOWS),
    "protect": lambda: ChronoConfig.protect(**WINDOWS, **OPEN),
    "balance as it is": lambda: ChronoConfig.balance(**WINDOWS),
    "balance": lambda: ChronoConfig.balance(**WINDOWS, **ACTS),
    "balance on beta": lambda: ChronoConfig.balance(**WINDOWS, **ACTS, beta__native=False),
}
CORE = [(family, "balance", tuning) for family in ("deepseek_v3", "ernie4_5_moe") for tuning in ("full", "lora")]
CORE += [("mixtral", "balance", "lora")]
MATRIX = [
    case
    for case in ((family, preset, tuning) for family in FAMILIES for preset in PRESETS for tuning in ("full", "lora"))
    if case not in CORE
]
STEPS, CUT = 6, 3


def base_of(family: str, directory: Path) -> Path:
    model = moe_zoo.build(family)
    moe_zoo.randomise(model)
    model.save_pretrained(directory / "base")
    return directory / "base"


def load(family: str, base: Path) -> Any:
    return type(moe_zoo.build(family)).from_pretrained(base)


def tuned(family: str, base: Path, tuning: str) -> Any:
    model = load(family, base)
    if tuning == "full":
        return model
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=r".*(o_proj|out_proj)"))


def rows(count: int = 4 * STEPS) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    some = [torch.randint(4, 60, (12,), generator=draw) for _ in range(count)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in some]


def everything(model: Any) -> dict[str, Tensor]:
    """Weights, and what the laws have moved and remember."""
    system = system_of(model)
    found = {f"weights.{name}": value.clone() for name, value in model.state_dict().items()}
    for name in ("beta_LE", "gain_LE", "logit_std_L", "relevance_L", "beta_applied_LE", "ema_CLE"):
        found[name] = getattr(system.step_state, name).clone()
    for layer in system.layers:
        bias_E = layer.adapter.native_bias(layer.router, layer.parent)
        if bias_E is not None:
            found[f"bias.{layer.layer_id}"] = bias_E.detach().clone()
        if layer.handle.lens is not None:
            found |= {f"lens.{layer.layer_id}.{k}": v.clone() for k, v in layer.handle.lens.state_dict().items()}
    return found


class Watch(TrainerCallback):
    """Keeps everything as it was when a checkpoint was written."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = everything(kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["metrics"]["eval_steps_left"] = STEPS - state.global_step  # so the best model is not the last one


def trained(model: Any, config: ChronoConfig, directory: Path, resume: Path | None = None, **fields: Any) -> Any:
    arguments = TrainingArguments(
        str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_steps=CUT,
        **fields,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(4))
    attach(trainer, config)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, watch


def check_every_way_back(family: str, preset: str, tuning: str, tmp_path: Path) -> None:
    config, base = PRESETS[preset](), base_of(family, tmp_path)
    best: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": CUT, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "eval_steps_left", "greater_is_better": True}
    whole, watch = trained(tuned(family, base, tuning), config, tmp_path / "whole", **best)
    if preset == "balance":
        first = read_state(tmp_path / "whole" / f"checkpoint-{CUT}")[0]
        assert first["gain_LE"].any()  # or nothing would be lost
    # The best model at the end is that of its checkpoint.
    assert whole.state.best_model_checkpoint.endswith(f"checkpoint-{CUT}")
    assert_same(everything(whole.model), watch.at[CUT])
    # A resumed run is the uninterrupted one.
    resumed, again = trained(
        tuned(family, base, tuning), config, tmp_path / "whole", tmp_path / "whole" / f"checkpoint-{CUT}"
    )
    assert_same(everything(resumed.model), watch.at[STEPS])
    assert_same(again.at[STEPS], watch.at[STEPS])
    _check_own_loop(family, config, base, tuning, tmp_path)
    if tuning == "lora":
        _check_adapter(family, config, base, resumed.model, tmp_path / "adapter")


def _check_own_loop(family: str, config: ChronoConfig, base: Path, tuning: str, tmp_path: Path) -> None:
    batches = [row["input_ids"].view(2, 6) for row in rows(STEPS)]

    def steps(model: Any, first: int, last: int) -> None:
        optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], 0.05)
        for step in range(first, last + 1):
            model(input_ids=batches[step - 1], labels=batches[step - 1]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            system_of(model).step(step)

    whole = wrap(tuned(family, base, tuning), config).train()
    steps(whole, 1, CUT)
    kept = {name: value.clone() for name, value in whole.state_dict().items()}
    system_of(whole).save(tmp_path / "loop")
    steps(whole, CUT + 1, STEPS)
    parted = tuned(family, base, tuning)
    trained_here = {name for name, value in parted.named_parameters() if value.requires_grad or tuning == "full"}
    parted.load_state_dict({name: kept[name] for name in trained_here}, strict=False)  # no bias, no buffer
    wrap(parted, config, state=tmp_path / "loop").train()
    steps(parted, CUT + 1, STEPS)
    assert_same(everything(parted), everything(whole))


def _check_adapter(family: str, config: ChronoConfig, base: Path, model: Any, directory: Path) -> None:
    peft = pytest.importorskip("peft")
    model.save_pretrained(directory)
    reloaded = wrap(peft.PeftModel.from_pretrained(load(family, base), directory), config, state=directory)
    ids = rows(1)[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    same = everything(model)
    assert_same({name: value for name, value in everything(reloaded).items() if name in same}, same)
    moved = any(layer.native_bias for layer in system_of(model).layers)
    assert (ONLY_IN_STATE in (directory / "README.md").read_text()) == moved


@pytest.mark.parametrize(("family", "preset", "tuning"), CORE)
def test_every_way_back_is_exact(family: str, preset: str, tuning: str, tmp_path: Path) -> None:
    check_every_way_back(family, preset, tuning, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "preset", "tuning"), MATRIX)
def test_every_way_back_is_exact_everywhere(family: str, preset: str, tuning: str, tmp_path: Path) -> None:
    check_every_way_back(family, preset, tuning, tmp_path)


# ---- what a state says and refuses ----------------------------------------------------------------------------------


def moved(family: str, base: Path, tuning: str, steps: int = 3) -> Any:
    model = wrap(tuned(family, base, tuning), PRESETS["balance"]()).train()
    for step in range(1, steps + 1):
        ids = torch.stack([row["input_ids"] for row in rows(4)])
        model(input_ids=ids)
        system_of(model).step(step)
    return model


def biases(model: Any) -> list[Tensor]:
    layers = system_of(model).layers
    return [layer.adapter.native_bias(layer.router, layer.parent).detach().clone() for layer in layers]


def test_an_adapter_says_once_that_it_lacks_the_bias(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = moved("deepseek_v3", base_of("deepseek_v3", tmp_path), "lora")
    with caplog.at_level(logging.WARNING, logger="chronomoe_hf"):
        model.save_pretrained(tmp_path / "one")
        model.save_pretrained(tmp_path / "two")
    said = [record for record in caplog.records if "not among the adapter's weights" in record.getMessage()]
    assert len(said) == 1
    for name in ("one", "two"):
        assert (tmp_path / name / "README.md").read_text().count(ONLY_IN_STATE) == 1
    model.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "README.md").read_text().count(ONLY_IN_STATE) == 1


def test_weights_that_hold_the_bias_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = base_of("deepseek_v3", tmp_path)
    with caplog.at_level(logging.WARNING, logger="chronomoe_hf"):
        moved("deepseek_v3", base, "full").save_pretrained(tmp_path / "full")
        merged = moved("deepseek_v3", base, "lora").merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        fresh = wrap(tuned("deepseek_v3", base, "lora"), PRESETS["balance"]())  # nothing has moved
        fresh.save_pretrained(tmp_path / "fresh")
    assert not [record for record in caplog.records if "not among the adapter's weights" in record.getMessage()]
    assert not (tmp_path / "full" / "README.md").exists() and not (tmp_path / "merged" / "README.md").exists()
    assert ONLY_IN_STATE not in (tmp_path / "fresh" / "README.md").read_text()
    plain = load("deepseek_v3", tmp_path / "merged")
    held = [layer.mlp.gate.e_score_correction_bias for layer in plain.model.layers if hasattr(layer.mlp, "gate")]
    assert held
    for loaded_E, live_E in zip(held, biases(merged), strict=True):
        assert torch.equal(loaded_E, live_E)


def test_a_bias_that_no_law_moves_here_is_named(tmp_path: Path) -> None:
    base = base_of("deepseek_v3", tmp_path)
    model = moved("deepseek_v3", base, "lora")
    model.save_pretrained(tmp_path / "out")
    other = tuned("deepseek_v3", base, "lora")
    with pytest.warns(UserWarning, match="the correction bias of layer.* another one"):
        wrap(other, ChronoConfig.observe(), state=tmp_path / "out")
    before, live = biases(wrap(tuned("deepseek_v3", base, "lora"), ChronoConfig.observe())), biases(other)
    assert all(torch.equal(one, two) for one, two in zip(before, live, strict=True))
    unwrap(other)
    wrap(other, PRESETS["balance"](), state=tmp_path / "out")
    assert all(torch.equal(one, two) for one, two in zip(biases(other), biases(model), strict=True))


def test_a_state_of_an_older_version_says_that_the_bias_is_not_in_it(tmp_path: Path) -> None:
    base = base_of("deepseek_v3", tmp_path)
    model = moved("deepseek_v3", base, "lora")
    system_of(model).save(tmp_path / "new")
    tensors, meta = read_state(tmp_path / "new")
    old = {name: value for name, value in tensors.items() if not name.startswith("bias.")}
    assert len(old) < len(tensors)
    state = {"tensors": old, "meta": {**meta, "schema_minor": 3}}
    loaded = wrap(tuned("deepseek_v3", base, "lora"), PRESETS["balance"]())
    with pytest.warns(UserWarning, match="state of an older chronomoe_hf"):
        system_of(loaded).load_state_dict(state)
    full = wrap(tuned("deepseek_v3", base, "full"), PRESETS["balance"]())
    system_of(full).load_state_dict(state)  # its weights hold the bias: nothing to say


@pytest.mark.parametrize(
    "wrong",
    [
        lambda bias_E: bias_E[:-1],
        lambda bias_E: bias_E.double(),
        lambda bias_E: torch.full_like(bias_E, float("nan")),
    ],
)
def test_a_broken_bias_is_refused_and_nothing_changes(wrong: Any, tmp_path: Path) -> None:
    base = base_of("deepseek_v3", tmp_path)
    state = system_of(moved("deepseek_v3", base, "full")).state_dict()
    state["tensors"]["bias.0"] = wrong(state["tensors"]["bias.0"])
    model = wrap(tuned("deepseek_v3", base, "full"), PRESETS["balance"]())
    before = everything(model)
    with pytest.raises(StateCorruptError, match=r"bias\.0"):
        system_of(model).load_state_dict(state)
    assert_same(everything(model), before)
    state["tensors"]["bias.9"] = state["tensors"].pop("bias.0")
    with pytest.raises(StateCorruptError, match=r"bias\.9"):
        system_of(model).load_state_dict(state)
