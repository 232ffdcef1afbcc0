"""wrap changes no number, unwrap leaves no trace, and bad input is refused with a way out."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from support import models as tiny
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoRouter
from chronomoe_hf.errors import AlreadyWrappedError, NoMoELayersError, NotWrappedError, UnsupportedArchitectureError

BACKENDS = ("eager", "grouped_mm", "batched_mm")
PRESETS = {"observe": ChronoConfig.observe, "default": ChronoConfig}
FIRST_CLASS = sorted(tiny.FAMILIES)


def backends_of(family: str) -> tuple[str, ...]:
    return ("eager",) if family == "switch_transformers" else BACKENDS


CASES = [(f, b) for f in FIRST_CLASS for b in backends_of(f)]


def build(family: str, backend: str, dtype: torch.dtype) -> Any:
    model = tiny.tiny_model(family, dtype=dtype)
    if family != "switch_transformers":
        model.set_experts_implementation(backend)
    return model


def loss_and_grads(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    model.zero_grad()
    out = model(**batch, output_router_logits=True)
    out.loss.backward()
    result = {"loss": out.loss.detach(), "logits": out.logits.detach()}
    for name in ("aux_loss", "encoder_aux_loss", "router_logits", "encoder_router_logits", "decoder_router_logits"):
        value = out.get(name)
        if value is not None:
            tensors = value if isinstance(value, tuple) else (value,)
            result |= {f"{name}.{i}": t.detach() for i, t in enumerate(tensors) if isinstance(t, torch.Tensor)}
    return result | {f"grad.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_identical(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "ac", "ac-reentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize(("family", "backend"), CASES)
def test_wrap_changes_no_number(
    family: str, backend: str, preset: str, dtype: torch.dtype, checkpointing: bool | None
) -> None:
    model = build(family, backend, dtype)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    batch = tiny.tiny_batch(family, padded=True)
    want = loss_and_grads(model, batch)
    chronomoe_hf.wrap(model, PRESETS[preset]())
    got = loss_and_grads(model, batch)
    snapshot = chronomoe_hf.system_of(model)
    assert snapshot.step(1) is None
    assert all(sum(layer.expert_token_counts) > 0 for layer in snapshot.snapshot().layers), (
        "bad test setup: no router was reached"
    )
    assert any(name.startswith(("router_logits", "encoder_router_logits")) for name in want)
    assert_identical(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "backend"), CASES)
def test_steering_with_zero_beta_changes_no_number(family: str, backend: str, dtype: torch.dtype) -> None:
    model = build(family, backend, dtype)
    batch = tiny.tiny_batch(family, padded=True)
    want = loss_and_grads(model, batch)
    chronomoe_hf.wrap(model)
    system = chronomoe_hf.system_of(model)
    system.switch_beta_on()
    assert_identical(loss_and_grads(model, batch), want)
    system.step(1)
    assert system.snapshot().layers[0].disagreement_js == 0.0, "the biased path was not taken"


@pytest.mark.parametrize("family", FIRST_CLASS)
def test_beta_on_one_expert_raises_its_count_and_keeps_recorded_logits(family: str) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.tiny_batch(family)
    want = loss_and_grads(model, batch)
    chronomoe_hf.wrap(model, ChronoConfig(interval=1))
    system = chronomoe_hf.system_of(model)
    loss_and_grads(model, batch)
    before = system.step(1)
    assert before is not None
    state = system.router_state(0)
    state.beta_coeff.copy_(torch.tensor([0.3] + [-0.3 / 7] * 7))
    state.relevance.fill_(1.0)
    state.refresh_()
    got = loss_and_grads(model, batch)
    after = system.step(2)
    assert after is not None
    assert after.layers[0].expert_token_counts[0] > before.layers[0].expert_token_counts[0]
    first = next(name for name in want if "router_logits.0" in name)
    assert torch.equal(got[first], want[first]), "the recorded logits must stay clean"
    assert not torch.equal(got["loss"], want["loss"])


@pytest.mark.parametrize("family", FIRST_CLASS)
def test_unwrap_restores_everything_and_state_dict_never_changes(family: str) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.tiny_batch(family)
    loss_and_grads(model, batch)  # installs the library's own capture hooks, once
    before = {name: (type(module), dict(module.__dict__)) for name, module in model.named_modules()}
    hooks = {name: {k: dict(v) for k, v in d.items() if k.endswith("hooks")} for name, (_, d) in before.items()}
    keys = list(model.state_dict())
    chronomoe_hf.wrap(model)
    assert list(model.state_dict()) == keys
    routers = [m for m in model.modules() if isinstance(m, ChronoRouter)]
    assert routers and all(type(r).__name__ == f"Chrono{r.adapter.router_class}" for r in routers)
    assert routers[0].router_state.beta_coeff.dtype == torch.float32
    loss_and_grads(model, batch)
    assert list(model.state_dict()) == keys
    chronomoe_hf.unwrap(model)
    assert list(model.state_dict()) == keys
    for name, module in model.named_modules():
        kind, attributes = before[name]
        assert type(module) is kind
        assert module.__dict__.keys() == attributes.keys(), name
        for key, value in attributes.items():
            if key.endswith("hooks"):
                assert dict(module.__dict__[key]) == hooks[name][key], (name, key)
            elif not key.endswith("dtype"):  # Switch routers note their input's dtype in every forward
                assert module.__dict__[key] is value or module.__dict__[key] == value, (name, key)
    with pytest.raises(NotWrappedError, match="wrap"):
        chronomoe_hf.system_of(model)


@pytest.mark.parametrize("family", FIRST_CLASS)
def test_checkpoint_of_a_wrapped_model_loads_plainly(family: str, tmp_path: Any) -> None:
    model = tiny.tiny_model(family)
    chronomoe_hf.wrap(model)
    loss_and_grads(model, tiny.tiny_batch(family))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not any(isinstance(m, ChronoRouter) for m in loaded.modules())
    assert_identical(dict(loaded.state_dict()), dict(model.state_dict()))


def test_wrap_is_idempotent_and_refuses_another_config() -> None:
    model = tiny.tiny_model("mixtral")
    config = ChronoConfig(interval=7)
    assert chronomoe_hf.wrap(model, config) is model
    system = chronomoe_hf.system_of(model)
    assert chronomoe_hf.wrap(model) is model
    assert chronomoe_hf.wrap(model, ChronoConfig(interval=7)) is model
    assert chronomoe_hf.system_of(model) is system
    with pytest.raises(AlreadyWrappedError, match=r"unwrap.*interval"):
        chronomoe_hf.wrap(model, ChronoConfig(interval=8))


def test_a_model_without_experts_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(NoMoELayersError, match="LlamaForCausalLM"):
        chronomoe_hf.wrap(LlamaForCausalLM(config))


def test_an_unknown_router_is_refused_by_name() -> None:
    model = tiny.tiny_model("mixtral")

    class HomemadeRouter(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    from transformers.utils.output_capturing import OutputRecorder

    for layer in model.model.layers:
        layer.mlp.gate = HomemadeRouter()
    model.model._can_record_outputs = {"router_logits": OutputRecorder(HomemadeRouter, index=0)}
    with pytest.raises(UnsupportedArchitectureError, match=r"layers\.0\.mlp\.gate: HomemadeRouter"):
        chronomoe_hf.wrap(model)


def test_a_deep_copy_is_its_own_wrapped_model() -> None:
    model = tiny.tiny_model("mixtral")
    chronomoe_hf.wrap(model)
    twin = copy.deepcopy(model)
    system, other = chronomoe_hf.system_of(model), chronomoe_hf.system_of(twin)
    assert other is not system
    loss_and_grads(twin, tiny.tiny_batch("mixtral"))
    system.step(1)
    other.step(1)
    assert sum(system.snapshot().layers[0].expert_token_counts) == 0
    assert sum(other.snapshot().layers[0].expert_token_counts) == 4 * 16 * 2
    other.router_state(0).beta_coeff.fill_(0.1)
    assert other.step_state.beta_LE[0].eq(0.1).all() and system.step_state.beta_LE[0].eq(0.0).all()


def test_a_wrapped_model_unpickles_in_a_fresh_process(tmp_path: Any) -> None:
    model = tiny.tiny_model("mixtral")
    chronomoe_hf.wrap(model)
    chronomoe_hf.system_of(model).step_state.beta_LE[1].fill_(0.25)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, chronomoe_hf\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "system = chronomoe_hf.system_of(model)\n"
        "assert float(system.router_state(1).beta_coeff[0]) == 0.25\n"
        "system.step_state.beta_LE.zero_()\n"
        "assert float(system.router_state(1).beta_coeff[0]) == 0.0, 'views must be bound again'\n"
        "chronomoe_hf.unwrap(model)\n"
        "print(type(model.model.layers[0].mlp.experts).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pkl")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "MixtralExperts"


def test_accelerate_hooks_do_not_bypass_the_wrapped_router() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = tiny.tiny_model("mixtral")
    for layer in model.model.layers:
        add_hook_to_module(layer.mlp.gate, ModelHook())
        add_hook_to_module(layer.mlp.experts, ModelHook())
    chronomoe_hf.wrap(model)
    loss_and_grads(model, tiny.tiny_batch("mixtral"))
    system = chronomoe_hf.system_of(model)
    system.step(1)
    layer = system.snapshot().layers[0]
    assert sum(layer.expert_token_counts) == 4 * 16 * 2
    assert layer.phi_slow is not None and any(v is not None for v in layer.phi_slow)
