"""State lies where its router is, in every mode and on two devices, and the numbers are those of the CPU.

Runs on a pretend device that refuses operands of different devices (``tests/support/phantom.py``).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models as tiny
from support import moe_zoo, phantom
from support.family_checks import build, inputs
from torch import nn

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoSystem

FAST = ("mixtral", "switch_transformers")
FAMILIES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in sorted(tiny.FAMILIES)]
# One family of every rule and of every way in which experts are called.
RULES = (
    "afmoe cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v4 gemma4 gpt_oss inkling jetmoe kolibri1 llama4 "
    "longcat_flash minimax_m2 nllb_moe phimoe zaya"
).split()


def elsewhere(system: ChronoSystem) -> dict[str, Any]:
    """Tensors with a dimension that lie on another device than the router they belong to, by path."""
    devices = [layer.adapter.weight(layer.router).device for layer in system.layers]
    found = {}
    for path, tensor in phantom.tensors_of(system).items():
        owner = path.removeprefix(".layers[").partition("]")[0] if path.startswith(".layers[") else ""
        allowed = {devices[int(owner)]} if owner and ".sums." not in path and ".placer" not in path else set(devices)
        if tensor.dim() > 0 and tensor.device not in allowed:
            found[path] = tensor.device
    return found


def make(family: str, config: ChronoConfig | None = None) -> tuple[Any, ChronoSystem, dict[str, Any]]:
    model = tiny.tiny_model(family)
    if family != "switch_transformers":
        model.set_experts_implementation("grouped_mm")
    chronomoe_hf.wrap(model, config)
    return model, chronomoe_hf.system_of(model), tiny.tiny_batch(family, padded=True)


def open_lenses(system: ChronoSystem) -> None:
    for layer in system.layers:
        weight = layer.adapter.weight(layer.router).detach().cpu()
        share = torch.arange(1, layer.num_experts + 1).double()
        generator = torch.Generator().manual_seed(layer.layer_id)
        layer.handle.lens.aim(torch.randn(weight.shape[1], generator=generator), weight, share / share.sum(), 2.0)
        layer.handle.lens.set_scale(0.3)


def assert_same(got: Any, want: Any) -> None:
    """Two snapshots of the same forwards; floats may differ in their last digits."""
    assert len(got.layers) == len(want.layers)
    for one, other in zip(got.layers, want.layers, strict=True):
        assert (
            one.expert_token_counts == other.expert_token_counts
            and one.tokens == other.tokens
            and one.calls == other.calls
        )
        for name in ("prob_mean", "contribution", "gate_sum", "mean_norm", "phi_fast", "beta"):
            mine, theirs = getattr(one, name), getattr(other, name)
            assert (mine is None) == (theirs is None), name
            for a, b in zip(mine or (), theirs or (), strict=True):
                # The CPU forms a reference as a difference: where nothing is left, it may read its rounding.
                if name == "phi_fast" and (a is None or b is None):
                    assert a is None
                    continue
                if name == "mean_norm" and a is None:
                    assert b is None
                    continue
                assert a == pytest.approx(b, rel=1e-4, abs=1e-4), name
        for name in ("logit_std", "disagreement_js", "disagreement_flip", "overlap_only"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
def test_state_is_there_from_wrap_on_and_follows_to(family: str) -> None:
    with phantom.device():
        model = phantom.to_device(tiny.tiny_model(family))
        chronomoe_hf.wrap(model)
        assert not elsewhere(chronomoe_hf.system_of(model)), "wrapped on the device"
        model, system, _ = make(family)
        assert not elsewhere(system)
        phantom.to_device(model)
        assert not elsewhere(system), "wrapped, then moved"
        assert system.step_state.device == torch.device("phantom", 0)
        model.to("cpu")
        assert not elsewhere(system) and system.step_state.device.type == "cpu", "and back"


@pytest.mark.parametrize("mode", ["train", "eval", "no-grad", "recorded", "generate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_forward_of_any_mode_brings_the_state(family: str, mode: str) -> None:
    """Weights put on the device behind the module's back, as loaders and offloading hooks do."""
    if mode == "generate" and family != "mixtral":
        pytest.skip("one family shows it")
    with phantom.device():
        model, system, batch = make(family)
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = nn.Parameter(phantom.to_device(value.detach()))
            for name, value in module._buffers.items():
                if value is not None:
                    module._buffers[name] = phantom.to_device(value)
        assert elsewhere(system), "bad test setup: nothing to move"
        batch = phantom.to_device(batch)
        model.train(mode in ("train", "no-grad"))
        with torch.set_grad_enabled(mode == "train"), system.recording_eval():
            system.switches.evaluation = mode in ("recorded", "generate")
            if mode == "generate":
                model.generate(batch["input_ids"][:, :4], max_new_tokens=2, do_sample=False)
            else:
                model(**batch)
        assert not elsewhere(system)
        evaluation = system.take_evaluation()
        assert (evaluation is not None) == (mode in ("recorded", "generate"))


@pytest.mark.parametrize("preset", ["observe", "protect", "balance"])
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_the_cpu(family: str, preset: str) -> None:
    """Three steps of two micro-batches: accumulation, governance, padding, an evaluation in between."""
    model, system, _ = make(family, ChronoConfig.preset(preset, interval=3))
    with phantom.device():
        twin = phantom.to_device(copy.deepcopy(model))
        other = chronomoe_hf.system_of(twin)
        for step in range(1, 4):
            for micro in range(2):
                batch = tiny.tiny_batch(family, seed=2 * step + micro, padded=True)
                model(**batch).loss.backward()
                twin(**phantom.to_device(batch)).loss.backward()
            with torch.no_grad():
                for one, each in ((model, system), (twin, other)):
                    one.eval()
                    with each.recording_eval():
                        one(**(batch if one is model else phantom.to_device(batch)))
                    one.train()
            want, got = system.step(step), other.step(step)
            assert not elsewhere(other)
            assert_same(other.take_evaluation(), system.take_evaluation())
        assert_same(got, want)
    assert sum(map(sum, (layer.expert_token_counts for layer in want.layers))) > 0, "bad test setup"


def test_an_evaluation_before_the_first_step_leaves_nothing_behind() -> None:
    with phantom.device():
        model, system, batch = make("mixtral")
        phantom.to_device(model)
        model.eval()
        with torch.no_grad(), system.recording_eval():
            model(**phantom.to_device(batch))
        assert not elsewhere(system)
        row_LR = system.take_sums("eval")
        assert row_LR.device == torch.device("phantom", 0), "what goes into a collective lies on the device"


@pytest.mark.parametrize("family", FAMILIES)
def test_resume_with_an_open_lens_routes_as_before(family: str, tmp_path: Path) -> None:
    model, system, batch = make(family, ChronoConfig(interval=1))
    for step in (1, 2):
        model(**batch).loss.backward()
        system.step(step)
    open_lenses(system)
    system.save(tmp_path)
    model.eval()
    with torch.no_grad():
        want = model(**batch).logits
    with phantom.device():
        again, other, _ = make(family, ChronoConfig(interval=1))
        phantom.to_device(again).eval()
        with torch.no_grad():
            plain = again(**phantom.to_device(batch)).logits.cpu()
            other.load(tmp_path)
            got = again(**phantom.to_device(batch)).logits.cpu()
        assert not elsewhere(other)
        again.train()
        again(**phantom.to_device(batch)).loss.backward()
        other.step(3)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(plain, want, atol=1e-3), "bad test setup: nothing steers"


def on_two_devices(model: Any) -> Any:
    """The second decoder layer on the second device, as a device map puts it; hidden states travel."""

    def send(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return phantom.to_device(args, index), phantom.to_device(kwargs, index)

        return hook

    phantom.to_device(model)
    phantom.to_device(model.model.layers[1], 1)
    model.model.layers[1].register_forward_pre_hook(send(1), with_kwargs=True)
    model.model.norm.register_forward_pre_hook(send(0), with_kwargs=True)
    return model


@pytest.mark.parametrize("moved", ["before wrap", "after wrap"])
@pytest.mark.parametrize("preset", ["observe", "protect", "balance"])
def test_layers_on_two_devices_keep_their_sums_with_their_routers(preset: str, moved: str) -> None:
    config = ChronoConfig.preset(preset, interval=2)
    model, system, _ = make("mixtral", config)
    with phantom.device():
        twin = tiny.tiny_model("mixtral")
        twin.set_experts_implementation("grouped_mm")
        if moved == "before wrap":
            on_two_devices(twin)
        chronomoe_hf.wrap(twin, config)
        if moved == "after wrap":
            on_two_devices(twin)
        other = chronomoe_hf.system_of(twin)
        assert not elsewhere(other)
        for step in range(1, 7):
            batch = tiny.tiny_batch("mixtral", seed=step, padded=True)
            model(**batch)
            twin(**phantom.to_device(batch))  # no backward: autograd knows one index of a backend made in Python
            if preset == "protect" and step == 3:
                open_lenses(system)
                open_lenses(other)
            want, got = system.step(step), other.step(step)
            assert not elsewhere(other)
            if want is not None:
                assert_same(got, want)
        states = [layer.handle.state for layer in other.layers]
        assert [state.beta_coeff.device.index for state in states] == [0, 1]
        for state, layer in zip(states, system.layers, strict=True):
            torch.testing.assert_close(state.beta_applied.cpu(), layer.handle.state.beta_applied, atol=1e-4, rtol=0)
        if preset != "observe":
            assert float(states[1].beta_applied.cpu().abs().max()) > 0, "bad test setup: beta never moved"


def test_a_layer_that_is_never_called_is_harmless() -> None:
    with phantom.device():
        model, system, batch = make("mixtral", ChronoConfig(interval=1))
        phantom.to_device(model)
        model.model.layers[1].mlp.forward = lambda hidden, *rest, **kwargs: hidden
        for step in (1, 2):
            model(**phantom.to_device(batch)).loss.backward()
            snapshot = system.step(step)
        assert not elsewhere(system)
    assert snapshot is not None and [layer.calls for layer in snapshot.layers] == [1, 0]
    assert {alert.layer_id for alert in snapshot.alerts if alert.kind == "NOT_OBSERVED"} <= {1}


@pytest.mark.slow
@pytest.mark.parametrize("family", RULES)
def test_every_rule_on_the_device(family: str) -> None:
    assert family in moe_zoo.ROUTED
    model = build(family)
    steerable = family not in ("dbrx", "nllb_moe")
    chronomoe_hf.wrap(model, ChronoConfig(interval=1) if steerable else ChronoConfig.observe(interval=1))
    system = chronomoe_hf.system_of(model)
    with phantom.device():
        twin = copy.deepcopy(model)
        phantom.to_device(twin)
        other = chronomoe_hf.system_of(twin)
        for step in (1, 2):
            torch.manual_seed(step)
            model(**inputs(model))
            torch.manual_seed(step)
            twin(**phantom.to_device(inputs(model)))
            want, got = system.step(step), other.step(step)
            assert not elsewhere(other)
        assert_same(got, want)
