"""Hooks and replaced forwards: what sits between a model and its routers is observed or reported, never miscounted."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from support import models as tiny
from support.oracles import Recount, train_step

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.errors import LifecycleError, WrapError
from chronomoe_hf.lifecycle import calibrate
from chronomoe_hf.lifecycle.live.model import live_layers

FAMILY = "mixtral"


def dispatched(model: Any) -> Any:
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0", "model.layers.1"]
    return dispatch_model(model, device_map=dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("order", ["wrap-dispatch", "dispatch-wrap"])
def test_a_dispatched_model_is_counted(order: str) -> None:
    model = tiny.tiny_model(FAMILY)
    if order == "wrap-dispatch":
        chronomoe_hf.wrap(model, ChronoConfig.observe())
    dispatched(model)
    assert "_hf_hook" in model.model.layers[0].__dict__, "bad test setup: no hook was attached"
    chronomoe_hf.wrap(model, ChronoConfig.observe())
    recount = Recount(model, FAMILY)
    train_step(model, tiny.tiny_batch(FAMILY, padded=True), recount)
    system = chronomoe_hf.system_of(model)
    system.step(1)
    snapshot = system.snapshot()
    assert [layer.expert_token_counts for layer in snapshot.layers] == recount.lists()
    assert [layer.tokens for layer in snapshot.layers] == [58, 58]
    assert all(sum(v is not None for v in layer.phi_slow) >= 6 for layer in snapshot.layers)


@pytest.mark.parametrize("order", ["wrap-offload", "offload-wrap"])
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_offloaded_model_is_counted_in_evaluation(kind: str, order: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(FAMILY, train=False)
    batch = tiny.tiny_batch(FAMILY, padded=True)
    with torch.no_grad():
        want = model(**batch).logits
    if order == "wrap-offload":
        chronomoe_hf.wrap(model)
    if kind == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, str(tmp_path), execution_device="cpu")
    router = model.model.layers[0].mlp.gate
    assert router.weight.is_meta, "bad test setup: the weights are still here"
    chronomoe_hf.wrap(model)
    system = chronomoe_hf.system_of(model)
    recount = Recount(model, FAMILY)
    recount.mask = [bool(v) for v in batch["attention_mask"].flatten().tolist()]
    with torch.no_grad(), system.recording_eval():
        assert torch.equal(model(**batch).logits, want)
    snapshot = system.take_evaluation()
    assert [layer.expert_token_counts for layer in snapshot.layers] == recount.lists()
    assert [sum(layer.expert_token_counts) for layer in snapshot.layers] == [116, 116]


def test_hooks_can_be_removed_from_a_wrapped_model_and_unwrap_keeps_them() -> None:
    model = tiny.tiny_model(FAMILY)
    batch = tiny.tiny_batch(FAMILY)
    want = model(**batch).logits.detach()
    dispatched(model)
    chronomoe_hf.wrap(model, ChronoConfig.observe())
    system = chronomoe_hf.system_of(model)
    remove_hook_from_submodules(model)
    model(**batch).loss.backward()
    system.step(1)
    assert [sum(layer.expert_token_counts) for layer in system.snapshot().layers] == [128, 128]
    dispatched(model)
    chronomoe_hf.unwrap(model)
    assert torch.equal(model(**batch).logits.detach(), want)
    assert not any(type(module).__name__.startswith("Chrono") for module in model.modules())


# ---- kernels that replace a forward --------------------------------------------------------------------------------


def fused_block(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """As fused kernels do: route with the router's weight, without calling the router."""
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    weights, index = (flat @ self.gate.weight.T).float().softmax(-1).topk(2)
    output = self.experts(flat, index, weights / weights.sum(-1, keepdim=True))
    return output.view(hidden_states.shape)


@pytest.mark.parametrize("order", ["wrap-replace", "replace-wrap"])
def test_a_block_that_bypasses_its_router_is_reported(order: str) -> None:
    model = tiny.tiny_model(FAMILY)
    block = model.model.layers[1].mlp
    if order == "replace-wrap":
        block.forward = types.MethodType(fused_block, block)
    chronomoe_hf.wrap(model, ChronoConfig(interval=1))
    if order == "wrap-replace":
        block.forward = types.MethodType(fused_block, block)
    system = chronomoe_hf.system_of(model)
    model(**tiny.tiny_batch(FAMILY)).loss.backward()
    snapshot = system.step(1)
    assert [(a.kind, a.layer_id) for a in snapshot.alerts if a.kind == "NOT_OBSERVED"] == [("NOT_OBSERVED", 1)]
    assert [sum(layer.expert_token_counts) for layer in snapshot.layers] == [128, 0]
    assert snapshot.layers[1].n_effective is None


def test_experts_replaced_after_wrap_are_reported_and_the_counts_stay_right() -> None:
    model = tiny.tiny_model(FAMILY)
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    experts = model.model.layers[1].mlp.experts
    native = type(experts).__mro__[2].forward
    experts.forward = types.MethodType(native, experts)
    recount = Recount(model, FAMILY)
    train_step(model, tiny.tiny_batch(FAMILY), recount)
    snapshot = chronomoe_hf.system_of(model).step(1)
    assert [layer.expert_token_counts for layer in snapshot.layers] == recount.lists()
    assert snapshot.layers[0].notes == []
    assert "no expert output was read" in " ".join(snapshot.layers[1].notes)
    assert all(value is None for value in snapshot.layers[1].phi_slow)


def test_experts_replaced_before_wrap_are_named_and_left_alone() -> None:
    model = tiny.tiny_model(FAMILY)
    experts = model.model.layers[1].mlp.experts
    experts.forward = types.MethodType(type(experts).forward, experts)
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    model(**tiny.tiny_batch(FAMILY)).loss.backward()
    snapshot = chronomoe_hf.system_of(model).step(1)
    assert [sum(layer.expert_token_counts) for layer in snapshot.layers] == [128, 128]
    assert "forward was replaced on the instance" in " ".join(snapshot.layers[1].notes)


def test_a_router_whose_forward_was_replaced_before_wrap_is_refused() -> None:
    model = tiny.tiny_model(FAMILY)
    router = model.model.layers[1].mlp.gate
    router.forward = types.MethodType(type(router).forward, router)
    with pytest.raises(WrapError, match=r"layers\.1\.mlp\.gate.*bypass"):
        chronomoe_hf.wrap(model)
    assert not any(type(module).__name__.startswith("Chrono") for module in model.modules())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "switch_transformers"])
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_calibrate_reads_the_true_weights_of_an_offloaded_model(kind: str, family: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(family, train=False)
    batch = tiny.tiny_batch(family, padded=True)
    want = calibrate(model, [batch])
    if kind == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, str(tmp_path), execution_device="cpu")
    layer = live_layers(model)[-1]
    assert layer.experts is not None
    assert all(parameter.is_meta for parameter in layer.experts.parameters()), "bad test setup: the weights are here"
    assert calibrate(model, [batch]).layers == want.layers
    assert all(parameter.is_meta for parameter in layer.experts.parameters())


def test_calibrate_refuses_experts_that_no_hook_brings_in() -> None:
    model = tiny.tiny_model(FAMILY, train=False)
    experts = model.model.layers[1].mlp.experts
    held = {name: parameter.detach() for name, parameter in experts.named_parameters()}

    def bring(module: Any, args: Any) -> None:
        for name, value in held.items():
            experts._parameters[name] = torch.nn.Parameter(value)

    def send_away(module: Any, args: Any, output: Any) -> None:
        for name, value in held.items():
            experts._parameters[name] = torch.nn.Parameter(value.to("meta"))

    experts.register_forward_pre_hook(bring)
    experts.register_forward_hook(send_away)
    with pytest.raises(LifecycleError, match=r"layers\.1\.mlp\.gate\.experts: its weights are offloaded"):
        calibrate(model, [tiny.tiny_batch(FAMILY, padded=True)])
