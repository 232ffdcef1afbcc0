"""PEFT: counts and phi under LoRA on attention, experts and router, wrapped before or after; adapter files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from support import models as tiny
from support.oracles import Recount, naive_phi, train_step
from transformers import Trainer, TrainingArguments

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoRouter
from chronomoe_hf.config import BetaConfig, CoherenceConfig
from chronomoe_hf.errors import AlreadyWrappedError, NotWrappedError

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "experts+router": {"target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
}
EXACT = CoherenceConfig(max_tokens=None)


def lora(where: str, init: bool = False) -> LoraConfig:
    """With ``init=False`` the adapter starts away from zero, so that leaving it out would show."""
    return LoraConfig(r=4, lora_alpha=8, init_lora_weights=init, task_type="CAUSAL_LM", **TARGETS[where])


def adapted(where: str, order: str, family: str = "mixtral", config: ChronoConfig | None = None) -> Any:
    model = tiny.tiny_model(family)
    config = config or ChronoConfig.observe(coherence=EXACT)
    if order == "wrap-peft":
        chronomoe_hf.wrap(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own advice on target_parameters
        peft_model = get_peft_model(model, lora(where))
    if order == "peft-wrap":
        assert chronomoe_hf.wrap(peft_model, config) is peft_model
    return peft_model.train()


@pytest.mark.parametrize("order", ["wrap-peft", "peft-wrap"])
@pytest.mark.parametrize("where", sorted(TARGETS))
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_counts_equal_a_recount_and_the_loss_is_that_of_the_plain_adapter(family: str, where: str, order: str) -> None:
    model = adapted(where, order, family)
    plain = adapted(where, "plain", family)
    plain.load_state_dict(model.state_dict())  # the same keys: nothing of ours is among them
    system = chronomoe_hf.system_of(model)
    assert system.model is model.get_base_model()
    assert [layer.name for layer in system.layers] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    recount = Recount(model, family)
    for step in (1, 2):
        batch = tiny.tiny_batch(family, seed=step, padded=True)
        train_step(model, batch, recount)
        recount.enabled = False
        with torch.no_grad():
            assert torch.equal(model(**batch).loss, plain(**batch).loss)
        recount.enabled = True
        system.step(step)
    assert [layer.expert_token_counts for layer in system.snapshot().layers] == recount.lists()
    assert [sum(row) for row in recount.lists()] == [2 * 58 * 2] * 2
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("backend", ["grouped_mm", "eager"])
@pytest.mark.parametrize("order", ["wrap-peft", "peft-wrap"])
def test_phi_is_read_from_the_adapted_experts(order: str, backend: str) -> None:
    model = adapted("experts+router", order)
    base = model.get_base_model()
    base.set_experts_implementation(backend)
    system = chronomoe_hf.system_of(model)
    experts = system.layers[0].experts
    assert experts is not None
    seen: dict[str, Any] = {}

    def look(module: Any, args: Any) -> None:
        if "args" not in seen:  # PEFT has put its parametrization on: these are the weights that act
            seen.update(args=args, up=module.gate_up_proj.detach().clone(), down=module.down_proj.detach().clone())

    experts.register_forward_pre_hook(look)
    batch = tiny.tiny_batch("mixtral", padded=True)
    model(**batch).loss.backward()
    assert not torch.equal(seen["up"], experts.gate_up_proj), "bad test setup: the adapter adds nothing"
    hidden, index, weights = (t.detach() for t in seen["args"])
    outputs = []
    for state, chosen in zip(hidden, index.tolist(), strict=True):
        row = []
        for e in chosen:
            gate, up = (seen["up"][e] @ state).chunk(2)
            row.append((seen["down"][e] @ (torch.nn.functional.silu(gate) * up)).tolist())
        outputs.append(row)
    real = [bool(v) for v in batch["attention_mask"].flatten().tolist()]
    want, contribution = naive_phi(outputs, weights.tolist(), index.tolist(), real, "leave_one_out")
    system.step(1)
    states, layer = system.coherence(0).snapshot(1), system.snapshot().layers[0]
    assert len(want) >= 6, "bad test setup: too few experts used"
    for e, value in want.items():
        assert states[e].phi_raw == pytest.approx(value, abs=1e-4)
        assert layer.contribution[e] == pytest.approx(contribution[e], rel=1e-4)


@pytest.mark.parametrize("order", ["wrap-peft", "peft-wrap"])
def test_merge_and_unload_keeps_the_wrapped_model(order: str) -> None:
    model = adapted("experts+router", order)
    batch = tiny.tiny_batch("mixtral", padded=True)
    loss = model(**batch).loss
    loss.backward()
    system = chronomoe_hf.system_of(model)
    system.step(1)
    merged = model.merge_and_unload()
    assert chronomoe_hf.system_of(merged) is system
    assert sum(isinstance(m, ChronoRouter) for m in merged.modules()) == 2
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    again = merged(**batch).loss
    again.backward()
    assert float(again.detach()) == pytest.approx(float(loss.detach()), abs=1e-5)
    system.step(2)
    assert [sum(layer.expert_token_counts) for layer in system.snapshot().layers] == [2 * 58 * 2] * 2
    chronomoe_hf.unwrap(merged)
    assert not any(type(m).__name__.startswith("Chrono") for m in merged.modules())
    assert "save_pretrained" not in merged.__dict__


@pytest.mark.parametrize("order", ["wrap-peft", "peft-wrap"])
def test_unwrap_through_the_adapter_leaves_no_trace(order: str) -> None:
    model = adapted("experts+router", order)
    chronomoe_hf.wrap(model)  # also hooks save_pretrained of an adapter that came later
    batch = tiny.tiny_batch("mixtral")
    loss = model(**batch).loss.detach()
    assert chronomoe_hf.unwrap(model) is model
    with pytest.raises(NotWrappedError):
        chronomoe_hf.system_of(model)
    for module in model.modules():
        assert not type(module).__name__.startswith("Chrono")
        assert not any(key.startswith("_chrono") or key == "save_pretrained" for key in module.__dict__)
    assert torch.equal(model(**batch).loss.detach(), loss)
    chronomoe_hf.wrap(model)
    chronomoe_hf.system_of(model)


def test_another_config_through_the_adapter_is_refused() -> None:
    model = adapted("attention", "wrap-peft")
    with pytest.raises(AlreadyWrappedError, match="interval"):
        chronomoe_hf.wrap(model, ChronoConfig(interval=3))
    with pytest.raises(AlreadyWrappedError, match="part of a wrapped model"):
        chronomoe_hf.wrap(model.get_base_model().model)


def adapter_keys(directory: Path) -> set[str]:
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("order", ["wrap-peft", "peft-wrap"])
def test_state_is_saved_beside_the_adapter(order: str, tmp_path: Path) -> None:
    config = ChronoConfig(interval=1, beta=BetaConfig(eta=0.5))
    model = adapted("experts+router", order, config=config)
    chronomoe_hf.wrap(model)
    system = chronomoe_hf.system_of(model)
    for step in (1, 2):
        model(**tiny.tiny_batch("mixtral", seed=step)).loss.backward()
        system.step(step)
    model.save_pretrained(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert {"chronomoe/state.tensors", "chronomoe/state.json"} <= files
    assert all("lora_" in key for key in adapter_keys(tmp_path))
    fresh = tiny.tiny_model("mixtral")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(key|adapter).*")
        loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True)
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    other = chronomoe_hf.system_of(chronomoe_hf.wrap(loaded, config))
    assert other.load(tmp_path) is not None
    assert float(system.step_state.beta_LE.abs().max()) > 0, "bad test setup: no state worth restoring"
    assert torch.equal(other.step_state.beta_LE, system.step_state.beta_LE)
    batch = tiny.tiny_batch("mixtral", seed=9)
    assert torch.equal(loaded.train()(**batch).logits, model(**batch).logits)


def rows(number: int = 16) -> list[dict[str, torch.Tensor]]:
    return [{k: v[0] for k, v in tiny.tiny_batch("mixtral", batch=1, seed=i).items()} for i in range(number)]


def trainer_of(model: Any, directory: Path, **overrides: Any) -> Trainer:
    fields: dict[str, Any] = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    return Trainer(model, TrainingArguments(**{**fields, **overrides}), train_dataset=rows())


@pytest.mark.parametrize("order", ["wrap-peft", "peft-wrap", "attach"])
def test_a_trainer_saves_and_resumes_an_adapter_bit_for_bit(order: str, tmp_path: Path) -> None:
    config = ChronoConfig(interval=1, beta=BetaConfig(eta=0.5))

    def fresh() -> Any:
        torch.manual_seed(0)
        return adapted("experts+router", order, config=config)

    whole = trainer_of(fresh(), tmp_path / "whole")
    system = chronomoe_hf.attach(whole, config).system
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file() and (checkpoint / "chronomoe" / "state.json").is_file()
    assert all("lora_" in key for key in adapter_keys(checkpoint))
    resumed = trainer_of(fresh(), tmp_path / "resumed")
    other = chronomoe_hf.attach(resumed, config).system
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert float(system.step_state.beta_LE.abs().max()) > 0, "bad test setup"
    assert torch.equal(other.step_state.beta_LE, system.step_state.beta_LE)
    mine, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not [a for a in resumed.model.get_base_model().__dict__ if a.startswith("chrono")]
    assert {alert.kind for alert in other.last_snapshot.active_alerts}.isdisjoint({"RESUME_MISMATCH"})


def test_a_deep_copy_of_an_adapted_model_is_its_own() -> None:
    model = adapted("experts+router", "peft-wrap")
    twin = copy.deepcopy(model)
    twin(**tiny.tiny_batch("mixtral")).loss.backward()
    system, other = chronomoe_hf.system_of(model), chronomoe_hf.system_of(twin)
    system.step(1)
    other.step(1)
    assert other is not system
    assert [sum(layer.expert_token_counts) for layer in system.snapshot().layers] == [0, 0]
    assert [sum(layer.expert_token_counts) for layer in other.snapshot().layers] == [128, 128]
