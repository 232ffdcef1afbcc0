"""Every family of Transformers: the adapter describes its router, and steering by nothing changes nothing."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import moe_zoo
from support.moe_zoo import FAMILIES, ROUTED, Call
from torch import Tensor

from chronomoe_hf import patches
from chronomoe_hf.errors import UnsupportedArchitectureError
from chronomoe_hf.router.state import RouterCall

SCOPES = ("routing", "selection")


@functools.lru_cache(maxsize=4)
def calls_fp32(family: str) -> tuple[Call, ...]:
    model = moe_zoo.build(family)
    moe_zoo.randomise(model)
    calls = moe_zoo.calls_of(model)
    assert {call.adapter.router_class for call in calls} == set(FAMILIES[family]["router_class"]), (
        "a router was not reached"
    )
    return tuple(calls)


def calls_bf16(family: str, directory: Path) -> list[Call]:
    # Only from_pretrained keeps in fp32 what the library keeps in fp32.
    model = moe_zoo.build(family)
    moe_zoo.randomise(model)
    model.save_pretrained(directory)
    return moe_zoo.calls_of(type(model).from_pretrained(directory, dtype=torch.bfloat16))


def zeros(call: Call) -> Tensor:
    return torch.zeros(call.adapter.num_experts(call.router))


def can_steer(calls: Any) -> list[Call]:
    return [call for call in calls if call.adapter.refused("beta") is None]


def same(ours: Any, native: Any) -> bool:
    if isinstance(native, Tensor):
        return torch.equal(ours, native) and ours.dtype == native.dtype and ours.shape == native.shape
    if isinstance(native, tuple):
        return isinstance(ours, tuple) and len(ours) == len(native) and all(map(same, ours, native))
    return bool(ours == native)


def assert_neutral_is_exact(call: Call) -> None:
    output, args, kwargs = call.run()
    routing = patches.probe(call.adapter, call.router, output)
    for scope in SCOPES:
        for shift in (None, torch.zeros(routing.logits_TE.shape)):  # no lens, and one at scale 0 in a compiled graph
            steer = RouterCall(output, routing.logits_TE, zeros(call), scope, args, kwargs, shift)
            steered = call.adapter.reroute(call.router, steer)
            assert same(steered, output), (call.adapter.router_class, scope)
            at = call.adapter.logits_index
            assert at is None or steered[at] is output[at], "clean logits were replaced"


@pytest.mark.parametrize("family", ROUTED)
def test_neutral_steering_is_exact_fp32(family: str) -> None:
    for call in can_steer(calls_fp32(family)):
        assert_neutral_is_exact(call)


@pytest.mark.parametrize("family", ROUTED)
def test_neutral_steering_is_exact_bf16(family: str, tmp_path: Path) -> None:
    calls = calls_bf16(family, tmp_path)
    assert calls
    for call in can_steer(calls):
        assert_neutral_is_exact(call)


@pytest.mark.parametrize("family", ROUTED)
def test_neutral_steering_is_exact_under_autocast(family: str) -> None:
    """Mixed precision as Trainer does it: fp32 parameters, bf16 products, an fp32 or a bf16 input."""
    for call in can_steer(calls_fp32(family)):
        hidden = call.args[0]
        for dtype in (torch.float, torch.bfloat16):
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                assert_neutral_is_exact(dataclasses.replace(call, args=(hidden.to(dtype), *call.args[1:])))


@pytest.mark.parametrize("family", ROUTED)
def test_open_lens_keeps_shapes_and_dtypes_in_bf16(family: str, tmp_path: Path) -> None:
    """What an open lens adds is fp32; what the block gets must not change its type."""
    for call in can_steer(calls_bf16(family, tmp_path)):
        output, args, kwargs = call.run()
        routing = call.adapter.read(call.router, output)
        beta_E = torch.linspace(-0.3, 0.3, call.adapter.num_experts(call.router))
        shift = torch.linspace(-0.5, 0.5, routing.logits_TE.numel()).view(routing.logits_TE.shape)
        for scope in SCOPES:
            steered = call.adapter.reroute(
                call.router, RouterCall(output, routing.logits_TE, beta_E, scope, args, kwargs, shift)
            )
            patches.probe(call.adapter, call.router, steered)
            for ours, native in zip(steered, output, strict=True):
                if isinstance(native, Tensor):
                    assert (ours.shape, ours.dtype) == (native.shape, native.dtype)
                    assert torch.isfinite(ours.float()).all()


@pytest.mark.parametrize("family", ROUTED)
def test_gradients_of_neutral_steering_are_exact(family: str) -> None:
    for call in can_steer(calls_fp32(family)):
        if call.adapter.router_class == "JetMoeTopKGating":
            weights_at = 2
        else:
            weights_at = call.adapter.weights_index
        native, steered = (gradients(call, weights_at, scope) for scope in (None, "routing"))
        selection = gradients(call, weights_at, "selection")
        assert any(grad is not None and grad.abs().sum() > 0 for grad in native), "the weights have no gradient at all"
        for ours in (steered, selection):
            for grad, expected in zip(ours, native, strict=True):
                assert (grad is None) == (expected is None)
                assert grad is None or torch.equal(grad, expected)


def gradients(call: Call, weights_at: int, scope: Any) -> list[Tensor | None]:
    """Gradients of a fixed random projection of the weights with respect to every router parameter and the input."""
    args, kwargs = moe_zoo.copied(call.args), moe_zoo.copied(call.kwargs)
    leaves = [*call.router.parameters(), args[0]]
    wanted = [leaf.requires_grad_() for leaf in leaves if leaf.requires_grad or leaf is args[0]]
    output = call.router(*args, **kwargs)
    if scope is not None:
        routing = call.adapter.read(call.router, output)
        output = call.adapter.reroute(
            call.router, RouterCall(output, routing.logits_TE, zeros(call), scope, args, kwargs)
        )
    weights = output[weights_at]
    projection = torch.randn(weights.shape, generator=torch.Generator().manual_seed(3))
    return list(torch.autograd.grad((weights * projection).sum(), wanted, allow_unused=True))


def recount(call: Call, output: Any) -> Counter[int]:
    """Dispatched assignments per expert, from the definition of each layout."""
    name = call.adapter.router_class
    if name == "SwitchTransformersTop1Router":
        return Counter(row.index(1) for row in output[0].flatten(0, 1).tolist() if 1 in row)
    if name == "JetMoeTopKGating":
        return Counter({expert: size for expert, size in enumerate(output[3]) if size})
    if name == "Llama4Router":
        return Counter(expert for row in output[0].tolist() for expert, score in enumerate(row) if score > 0)
    if name == "DbrxRouter":
        return Counter(call.parent.route_tokens_to_experts(output)[1].flatten().tolist())
    if name == "NllbMoeTop2Router":
        return Counter(expert for row in output[1].tolist() for expert, gate in enumerate(row) if gate > 0)
    if name == "ZayaRouter":
        skip = call.router.config.num_experts
        pairs = zip(output[2].flatten().tolist(), output[1].flatten().tolist(), strict=True)
        return Counter(expert if weight > 0 else skip for expert, weight in pairs)
    return Counter(output[2].flatten().tolist())


def counted(routing: Any) -> Counter[int]:
    index = routing.index_TK.tolist()
    kept = [[True] * len(row) for row in index] if routing.kept_TK is None else routing.kept_TK.tolist()
    return Counter(
        expert for row, flags in zip(index, kept, strict=True) for expert, flag in zip(row, flags, strict=True) if flag
    )


@pytest.mark.parametrize("family", ROUTED)
def test_read_counts_what_the_router_dispatched(family: str) -> None:
    for call in calls_fp32(family):
        output, _, _ = call.run()
        routing = patches.probe(call.adapter, call.router, output)
        expected = recount(call, output)
        assert counted(routing) == expected
        assert sum(expected.values()) > 0
        assert routing.logits_TE.shape[0] == moe_zoo.BATCH * moe_zoo.LENGTH


@pytest.mark.parametrize("family", ROUTED)
def test_beta_moves_tokens_to_the_promoted_expert(family: str) -> None:
    for call in can_steer(calls_fp32(family)):
        output, args, kwargs = call.run()
        routing = call.adapter.read(call.router, output)
        before, gained = counted(routing), 0
        for expert in range(call.adapter.num_experts(call.router)):
            for scope in SCOPES:
                beta_E = zeros(call)
                beta_E[expert] = 3.0
                steered = call.adapter.reroute(
                    call.router, RouterCall(output, routing.logits_TE, beta_E, scope, args, kwargs)
                )
                after = counted(call.adapter.read(call.router, steered))
                assert after[expert] >= before[expert], (expert, scope)
                if routing.kept_TK is None:
                    assert sum(after.values()) == sum(before.values()), "steering lost or made assignments"
                gained += after[expert] - before[expert]
        assert gained > 0, "a beta of 3 logits moved no token at all"


@pytest.mark.parametrize("family", ROUTED)
def test_scope_selection_keeps_the_weights_of_unmoved_tokens(family: str) -> None:
    """Where beta changes no choice, scope "selection" returns the native weights and "routing" does not."""
    if family in ("jetmoe", "llama4", "switch_transformers"):
        pytest.skip("weights are sorted by expert, dense, or of one expert; covered by the rule tests")
    moved = False
    for call in can_steer(calls_fp32(family)):
        output, args, kwargs = call.run()
        logits_TE = call.adapter.read(call.router, output).logits_TE
        beta_E = torch.linspace(-0.05, 0.05, logits_TE.shape[-1])
        parts = (call.adapter.weights_index, call.adapter.indices_index)
        selected = call.adapter.reroute(call.router, RouterCall(output, logits_TE, beta_E, "selection", args, kwargs))
        routed = call.adapter.reroute(call.router, RouterCall(output, logits_TE, beta_E, "routing", args, kwargs))
        same_T = (selected[parts[1]] == output[parts[1]]).all(dim=-1)
        assert same_T.any(), "beta moved every token"
        assert torch.equal(selected[parts[0]][same_T], output[parts[0]][same_T])
        assert torch.equal(selected[parts[1]], routed[parts[1]])
        moved = moved or not torch.equal(routed[parts[0]][same_T], output[parts[0]][same_T])
    k_is_one_and_renormalised = all(bool((call.run()[0][1] == 1).all()) for call in can_steer(calls_fp32(family)))
    assert moved or k_is_one_and_renormalised or not can_steer(calls_fp32(family))


@pytest.mark.parametrize("family", ROUTED)
def test_distribution_is_a_distribution(family: str) -> None:
    for call in calls_fp32(family):
        output, _, _ = call.run()
        logits_TE = call.adapter.read(call.router, output).logits_TE.detach()
        for scale in (1.0, 1000.0):
            p_TE = call.adapter.distribution(call.router, logits_TE * scale)
            assert p_TE.shape == logits_TE.shape and p_TE.dtype == torch.float
            assert torch.isfinite(p_TE).all() and (p_TE >= 0).all()
            torch.testing.assert_close(p_TE.sum(dim=-1), torch.ones(p_TE.shape[0]))
        row, p = logits_TE[0].tolist(), call.adapter.distribution(call.router, logits_TE)[0].tolist()
        score = score_of(call, family)
        scores = [score(z) for z in row]
        assert p == pytest.approx([s / sum(scores) for s in scores], rel=1e-4, abs=1e-7)


def score_of(call: Call, family: str) -> Any:
    """The family's score of one logit, up to a factor common to the row."""
    if family == "deepseek_v4":
        return lambda z: math.sqrt(math.log1p(math.exp(z)))
    sigmoid = FAMILIES[family]["rule"] == "R1.sigmoid" or family in ("inkling", "llama4", "kolibri1")
    if family == "cohere2_moe":
        sigmoid = call.router.expert_selection_fn == "sigmoid"
    return (lambda z: 1 / (1 + math.exp(-z))) if sigmoid else math.exp


@pytest.mark.parametrize("family", ROUTED)
def test_stated_facts_hold(family: str) -> None:
    facts = FAMILIES[family]
    for call in calls_fp32(family):
        adapter, router = call.adapter, call.router
        assert adapter.family == family
        output, args, _ = call.run()
        routing = adapter.read(router, output)
        weight_ED = adapter.weight(router)
        assert weight_ED.shape[0] == adapter.num_experts(router) == routing.logits_TE.shape[-1]
        assert routing.index_TK.shape[-1] == adapter.top_k(router)
        if adapter.experts is not None:
            assert isinstance(getattr(call.parent, adapter.experts), torch.nn.Module)
        assert (adapter.experts_call == "interface") == facts["experts_interface"]
        bias = adapter.native_bias(router, call.parent)
        assert (bias is not None) == (facts["native_bias"] and adapter.router_class != "DeepseekV4HashRouter")
        if bias is not None:
            assert bias.shape == (adapter.num_experts(router),)
            storage = {t.untyped_storage().data_ptr() for t in (*call.parent.buffers(), *call.parent.parameters())}
            assert bias.untyped_storage().data_ptr() in storage, "native_bias is a copy"
        if adapter.linear:
            assert_linear(routing.logits_TE, args[0].reshape(-1, args[0].shape[-1]).float(), weight_ED.float())


def assert_linear(logits_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> None:
    """``logits - x W^T`` is the same constant per expert for every token: what a lens and its fold rely on."""
    rest_TE = logits_TE - x_TD @ weight_ED.T
    torch.testing.assert_close(rest_TE, rest_TE[:1].expand_as(rest_TE), rtol=0, atol=1e-4)


def test_every_family_is_described_or_refused() -> None:
    described = {adapter.family for adapter in patches.all_adapters()}
    assert described == set(ROUTED)
    assert set(FAMILIES) - described == {"doge"}
    assert len(FAMILIES) == 72


def test_every_described_class_exists_once() -> None:
    names = [adapter.router_class for adapter in patches.all_adapters()]
    assert len(names) == len(set(names)), "Chrono<Name> would be ambiguous"
    for adapter in patches.all_adapters():
        module = __import__(adapter.module, fromlist=[adapter.router_class])
        assert isinstance(getattr(module, adapter.router_class), type)


def test_doge_is_refused_by_name() -> None:
    reasons = [(module, patches.refusal(module)) for module in moe_zoo.build("doge").modules()]
    refused = [module for module, reason in reasons if reason is not None]
    assert len(refused) == 2
    with pytest.raises(UnsupportedArchitectureError, match="DogeCDMoE.*product keys"):
        patches.find(refused[0])


def test_refused_routers_say_why() -> None:
    for family in ("dbrx", "nllb_moe", "deepseek_v4"):
        call = calls_fp32(family)[0]
        assert call.adapter.refused("observe") is None
        if call.adapter.refused("beta") is None:
            continue
        output, args, kwargs = call.run()
        logits_TE = call.adapter.read(call.router, output).logits_TE
        with pytest.raises(UnsupportedArchitectureError, match=call.adapter.router_class):
            call.adapter.reroute(call.router, RouterCall(output, logits_TE, zeros(call), "routing", args, kwargs))


def test_data_names_real_classes() -> None:
    missing = [f for f, e in FAMILIES.items() if not hasattr(transformers, e["config_class"])]
    assert missing == [], f"transformers {transformers.__version__} lacks these families"
