"""What is folded routes exactly as it did while governed; what cannot be folded is named, with what it costs."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from support import models as tiny
from support import moe_zoo
from torch import Tensor

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoSystem
from chronomoe_hf.config import BetaConfig
from chronomoe_hf.errors import WrapError
from chronomoe_hf.patches import find

LINEAR = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "switch_transformers")
ZOO = ("gpt_oss", "kolibri1", "deepseek_v3", "granitemoe")


def build(family: str) -> Any:
    if family in tiny.FAMILIES:
        return tiny.tiny_model(family)
    model = moe_zoo.build(family)
    moe_zoo.randomise(model)
    return model.train()


def batch_of(model: Any, family: str) -> dict[str, Any]:
    if family in tiny.FAMILIES:
        return tiny.tiny_batch(family, padded=True)
    ids = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def governed(family: str, *, lens: float = 0.0, beta: float = 0.0, scope: Any = "routing") -> tuple[Any, ChronoSystem]:
    """A wrapped model with a lens of that scale and a beta of that size (logits) on every layer, both set by hand."""
    torch.manual_seed(0)
    model = build(family)
    chronomoe_hf.wrap(model, ChronoConfig(beta=BetaConfig(scope=scope, k_max=10.0)))
    system = chronomoe_hf.system_of(model)
    for layer in system.layers:
        state, weight = layer.handle.state, layer.adapter.weight(layer.router)
        if lens:
            share = torch.rand(weight.shape[0]) + 0.05
            assert layer.handle.lens is not None
            assert layer.handle.lens.aim(torch.randn(weight.shape[1]), weight, share / share.sum(), 2.0) is None
            layer.handle.lens.set_scale(lens)
        if beta:
            state.beta_coeff.copy_(beta * torch.linspace(-1, 1, weight.shape[0]))
            state.refresh_()
            system.switch_beta_on()
    model(**batch_of(model, family))
    system.step(1)
    return model, system


@torch.no_grad()
def logits(model: Any, family: str) -> Tensor:
    return model.eval()(**batch_of(model, family)).logits


def assert_close(got: Tensor, want: Tensor) -> None:
    assert float((got - want).abs().max()) <= 1e-5 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("family", LINEAR + ZOO)
def test_an_open_lens_folds_into_the_router_weight(family: str) -> None:
    model, _ = governed(family, lens=0.5)
    plain = copy.deepcopy(model)
    want = logits(model, family)
    keys = list(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chronomoe_hf.unwrap(model, fold=True) is model
    assert list(model.state_dict()) == keys
    assert not any(isinstance(module, chronomoe_hf.ChronoRouter) for module in model.modules())
    assert_close(logits(model, family), want)
    chronomoe_hf.unwrap(plain)
    assert float((logits(plain, family) - want).abs().max()) > 1e-2, "bad test setup: the lens does nothing"


@pytest.mark.parametrize(
    ("family", "scope"), [("gpt_oss", "routing"), ("openai_privacy_filter", "routing"), ("kolibri1", "selection")]
)
@pytest.mark.parametrize("lens", [0.0, 0.5])
def test_beta_folds_where_the_model_has_a_constant_of_its_kind(family: str, scope: str, lens: float) -> None:
    model, system = governed(family, lens=lens, beta=0.7, scope=scope)
    system.router_state(0).relevance.fill_(0.5)
    system.router_state(0).refresh_()
    plain, want = copy.deepcopy(model), logits(model, family)
    reports = system.fold()
    assert [report.folded for report in reports] == [("lens", "beta") if lens else ("beta",)] * len(reports)
    assert all(report.lost == {} and report.topk_differs is not None for report in reports)
    assert all(lens.scale == 0.0 for lens in system.lenses.values())
    assert_close(logits(model, family), want)  # still wrapped: what was folded must not act a second time
    assert [report.folded for report in system.fold()] == [()] * len(reports)
    chronomoe_hf.unwrap(model)
    assert_close(logits(model, family), want)
    chronomoe_hf.unwrap(plain)
    assert float((logits(plain, family) - want).abs().max()) > 1e-2, "bad test setup: beta does nothing"


@pytest.mark.parametrize(
    ("family", "scope", "reason"),
    [
        ("mixtral", "routing", "no bias of its own"),
        ("mixtral", "selection", "no bias that acts on the choice alone"),
        ("deepseek_v3", "routing", "no bias of its own"),
        ("deepseek_v3", "selection", "added to scores"),
        ("gpt_oss", "selection", "no bias that acts on the choice alone"),
        ("kolibri1", "routing", "no bias of its own"),
    ],
)
def test_what_does_not_fold_is_named_with_the_share_of_tokens_it_moves(family: str, scope: str, reason: str) -> None:
    model, system = governed(family, lens=0.5, beta=0.7, scope=scope)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    want = system.step_state.topk_disagreement()
    with pytest.warns(UserWarning, match="does not survive outside chronomoe_hf"):
        reports = system.fold()
    for report, layer, share in zip(reports, system.layers, want, strict=True):
        assert report.folded == ("lens",) and reason in report.lost["beta"]
        assert share is not None and report.topk_differs == share > 0.01
        assert f"{100 * share:.2g} %" in str(report) and layer.name in str(report)
        assert layer.handle.state.beta_applied.abs().max() > 0.1, "what was not folded goes on acting"
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    weights = [layer.adapter.weight(layer.router) for layer in system.layers]
    assert len(changed) == len(weights) and all("bias" not in name for name in changed)


def test_a_loss_of_at_most_one_percent_is_reported_without_a_warning() -> None:
    _, system = governed("mixtral", beta=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reports = system.fold()
    assert [report.topk_differs for report in reports] == [0.0, 0.0]
    assert all(report.lost for report in reports)


def test_a_model_that_was_never_steered_has_nothing_to_fold() -> None:
    model = tiny.tiny_model("mixtral")
    chronomoe_hf.wrap(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reports = chronomoe_hf.system_of(model).fold()
    assert [(r.layer_id, r.folded, r.lost, r.topk_differs) for r in reports] == [(0, (), {}, None), (1, (), {}, None)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_low_precision_weight_is_rounded_once() -> None:
    _, system = governed("mixtral", lens=0.5)
    layer = system.layers[0]
    layer.router.to(torch.bfloat16)
    weight, lens = layer.router.weight, layer.handle.lens
    exact = weight.detach().double() + 0.5 * (weight.detach().double() @ lens.U.double().T) @ lens.V.double().T
    pointer = weight.data_ptr()
    system.fold()
    assert torch.equal(layer.router.weight, exact.to(torch.bfloat16)) and layer.router.weight.data_ptr() == pointer


def test_a_sharded_weight_is_refused_before_anything_changes() -> None:
    model, system = governed("mixtral", lens=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    system.layers[1].router.weight.ds_id = 7  # what DeepSpeed leaves on a parameter that it has partitioned
    with pytest.raises(WrapError, match=r"layer 1 .*sharded.*system\.load"):
        chronomoe_hf.unwrap(model, fold=True)
    assert chronomoe_hf.system_of(model) is system
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_router_under_a_peft_adapter_is_not_folded() -> None:
    peft = pytest.importorskip("peft")
    model, system = governed("mixtral", lens=0.5)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_parameters=["mlp.gate.weight"]))
    assert any("base_layer" in name for name, _ in wrapped.named_modules()), "bad test setup"
    with pytest.warns(UserWarning, match="merge_and_unload"):
        reports = system.fold()
    assert [report.folded for report in reports] == [(), ()]
    assert all(layer.handle.lens_open for layer in system.layers)


@pytest.mark.parametrize("merged", [False, True])
def test_unwrap_with_a_fold_waits_for_the_adapter_to_be_merged(merged: bool) -> None:
    peft = pytest.importorskip("peft")
    model, system = governed("mixtral", lens=0.5)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_parameters=["mlp.gate.weight"]))
    if merged:
        wrapped = wrapped.merge_and_unload()
        want = logits(wrapped, "mixtral")
        chronomoe_hf.unwrap(wrapped, fold=True)
        assert_close(logits(wrapped, "mixtral"), want)
        return
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    want = logits(wrapped, "mixtral")
    with pytest.raises(WrapError, match=r"layer 0 .*lens is open and cannot fold: a PEFT adapter.*merge_and_unload"):
        chronomoe_hf.unwrap(wrapped, fold=True)
    assert chronomoe_hf.system_of(wrapped) is system and all(layer.handle.lens_open for layer in system.layers)
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())
    assert torch.equal(logits(wrapped, "mixtral"), want)


def test_every_stated_linear_bias_is_the_bias_of_the_logits() -> None:
    """The adapters' own word, checked on the routers: adding c to that tensor adds c to every row of the logits."""
    checked = []
    for family in moe_zoo.ROUTED:
        if family not in ("gpt_oss", "openai_privacy_filter", "switch_transformers"):
            continue
        model = moe_zoo.build(family)
        moe_zoo.randomise(model)
        for adapter, router, _ in moe_zoo.routers_of(model):
            assert find(router) is adapter
            bias = adapter.linear_bias(router)
            if bias is None:
                continue
            args = next(call.args for call in moe_zoo.calls_of(model) if call.router is router)
            with torch.no_grad():
                before = adapter.read(router, router(*args)).logits_TE.clone()
                shift = torch.linspace(-1, 1, bias.shape[0])
                bias.add_(shift)
                after = adapter.read(router, router(*args)).logits_TE
            assert torch.allclose(after, before + shift, atol=1e-5)
            checked.append(family)
    assert {"gpt_oss", "openai_privacy_filter"} <= set(checked)
