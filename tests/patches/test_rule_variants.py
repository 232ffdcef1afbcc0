"""The rules on random configurations of the native routers, against the rule written out in plain Python on float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.oracles import softmax
from torch import Tensor, nn

from chronomoe_hf import patches
from chronomoe_hf.patches.registry import Adapter, module_of
from chronomoe_hf.router.state import RouterCall

TOKENS, WIDTH, SEEDS = 16, 24, range(6)


def sigmoid(row: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-z)) for z in row]


def sqrtsoftplus(row: list[float]) -> list[float]:
    return [math.sqrt(math.log1p(math.exp(z))) for z in row]


def largest(values: list[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def kept_by_groups(choice: list[float], groups: int, keep: int, reduce: str) -> list[bool]:
    size = len(choice) // groups
    parts = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(groups)]
    best = largest([part[0] if reduce == "max" else part[0] + part[1] for part in parts], keep)
    return [e // size in best for e in range(len(choice))]


def score_then_topk(z: list[float], beta: list[float], scope: str, o: SimpleNamespace) -> dict[int, float]:
    """Expert -> weight for one token, by the definition of the rule."""
    biased = o.score([a + b for a, b in zip(z, beta, strict=True)])
    weight = biased if scope == "routing" else o.score(z)
    choice = [s + b for s, b in zip(biased, o.bias, strict=True)]
    if o.groups is not None:
        kept = kept_by_groups(choice, *o.groups)
        choice = [c if keep else o.fill for c, keep in zip(choice, kept, strict=True)]
        if o.fill_weights:
            weight = [w if keep else o.fill for w, keep in zip(weight, kept, strict=True)]
    chosen = {e: weight[e] for e in largest(choice, o.k)}
    total = max(sum(chosen.values()), o.floor) + o.eps
    return {e: (w / total if o.renorm else w) * o.scale for e, w in chosen.items()}


def topk_then_squash(z: list[float], beta: list[float], scope: str, o: SimpleNamespace) -> dict[int, float]:
    biased = [a + b for a, b in zip(z, beta, strict=True)]
    chosen = largest([a + b for a, b in zip(biased, o.bias, strict=True)], o.k)
    weight = o.score([(biased if scope == "routing" else z)[e] for e in chosen])
    total = sum(weight)
    return {e: (w / total if o.renorm else w) * o.scale for e, w in zip(chosen, weight, strict=True)}


def oracle(**changes: Any) -> SimpleNamespace:
    neutral = {"score": softmax, "renorm": False, "eps": 0.0, "floor": 0.0, "scale": 1.0}
    return SimpleNamespace(**(neutral | {"groups": None, "fill": -math.inf, "fill_weights": False} | changes))


def shape(rng: random.Random) -> dict[str, Any]:
    """A random configuration under every name that a router may look for."""
    groups, size = rng.choice([1, 2, 4]), rng.choice([2, 3, 4, 8])
    keep = rng.randint(1, groups)
    experts, k = groups * size, rng.randint(1, keep * size)
    scale = rng.choice([1.0, 2.5])
    return {
        "num_local_experts": experts, "num_experts": experts, "moe_num_experts": experts, "n_routed_experts": experts,
        "num_experts_per_tok": k, "moe_topk": k, "hidden_size": WIDTH, "n_group": groups, "topk_group": keep,
        "norm_topk_prob": rng.random() < 0.5, "routed_scaling_factor": scale, "router_scaling_factor": scale,
        "route_scale": scale, "topk_method": rng.choice(["greedy", "group_limited_greedy"]), "zero_expert_num": 0,
        "use_expert_bias": rng.random() < 0.5, "moe_norm_min": 1e-12,
        "moe_router_logit_softcapping": rng.choice([0.0, 5.0]),
        "expert_selection_fn": rng.choice(["softmax", "sigmoid"]), "scoring_func": "sqrtsoftplus",
    }  # fmt: skip


Spec = tuple[str, Callable[..., dict[int, float]], Callable[[SimpleNamespace], SimpleNamespace]]
SPECS: dict[str, Spec] = {
    "mixtral": ("MixtralTopKRouter", score_then_topk, lambda c: oracle(renorm=True)),
    "qwen3_moe": ("Qwen3MoeTopKRouter", score_then_topk, lambda c: oracle(renorm=c.norm_topk_prob)),
    "jamba": ("JambaTopKRouter", score_then_topk, lambda c: oracle()),
    "ernie4_5_moe": ("Ernie4_5_MoeTopKRouter", score_then_topk, lambda c: oracle(renorm=True, floor=1e-12)),
    "longcat_flash": ("LongcatFlashTopkRouter", score_then_topk, lambda c: oracle(scale=c.routed_scaling_factor)),
    "deepseek_v2": (
        "DeepseekV2TopkRouter",
        score_then_topk,
        lambda c: oracle(
            scale=c.routed_scaling_factor,
            groups=(c.n_group, c.topk_group, "max") if c.topk_method != "greedy" else None,
            fill=0.0,
            fill_weights=True,
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3TopkRouter",
        score_then_topk,
        lambda c: oracle(
            score=sigmoid,
            renorm=c.norm_topk_prob,
            eps=1e-20,
            scale=c.routed_scaling_factor,
            groups=(c.n_group, c.topk_group, "top2"),
        ),
    ),
    "axk2": (
        "AXK2TopkRouter",
        score_then_topk,
        lambda c: oracle(
            score=sigmoid,
            renorm=c.norm_topk_prob,
            scale=c.routed_scaling_factor,
            groups=(c.n_group, c.topk_group, "top2") if c.n_group is not None else None,
            fill=0.0,
        ),
    ),
    "mistral4": (
        "Mistral4TopkRouter",
        score_then_topk,
        lambda c: oracle(
            renorm=c.norm_topk_prob,
            scale=c.routed_scaling_factor,
            groups=(c.n_group, c.topk_group, "top2"),
            fill=0.0,
        ),
    ),
    "hy_v3": (
        "HYV3TopKRouter",
        score_then_topk,
        lambda c: oracle(score=sigmoid, renorm=True, scale=c.router_scaling_factor),
    ),
    "minimax_m2": ("MiniMaxM2TopKRouter", score_then_topk, lambda c: oracle(score=sigmoid, renorm=True)),
    "laguna": ("LagunaTopKRouter", score_then_topk, lambda c: oracle(score=sigmoid, renorm=True)),
    "flint": ("FlintTopKRouter", score_then_topk, lambda c: oracle(score=sigmoid, renorm=c.norm_topk_prob)),
    "lfm2_moe": (
        "Lfm2MoeTopKRouter",
        score_then_topk,
        lambda c: oracle(score=sigmoid, renorm=c.norm_topk_prob, eps=1e-6, scale=c.routed_scaling_factor),
    ),
    "deepseek_v4": (
        "DeepseekV4TopKRouter",
        score_then_topk,
        lambda c: oracle(score=sqrtsoftplus, renorm=True, scale=c.routed_scaling_factor),
    ),
    "gpt_oss": ("GptOssTopKRouter", topk_then_squash, lambda c: oracle()),
    "granitemoe": ("GraniteMoeTopKRouter", topk_then_squash, lambda c: oracle()),
    "openai_privacy_filter": (
        "OpenAIPrivacyFilterTopKRouter",
        topk_then_squash,
        lambda c: oracle(scale=1 / c.num_experts_per_tok),
    ),
    "cohere2_moe": (
        "Cohere2MoeTopKRouter",
        topk_then_squash,
        lambda c: oracle(
            score=softmax if c.expert_selection_fn == "softmax" else sigmoid,
            renorm=c.norm_topk_prob and c.expert_selection_fn == "sigmoid",
        ),
    ),
    "kolibri1": ("Kolibri1TopKRouter", topk_then_squash, lambda c: oracle(score=sigmoid, renorm=c.norm_topk_prob)),
}


def native(family: str, config: SimpleNamespace, dtype: torch.dtype) -> tuple[Adapter, nn.Module, nn.Module]:
    """Build the router with random weights, and a parent that owns a random native bias."""
    router = getattr(import_module(module_of(family)), SPECS[family][0])(config)
    parent = nn.Module()
    bias = torch.rand(config.num_experts) * 0.4 - 0.2
    parent.e_score_correction_bias = parent.expert_bias = nn.Parameter(bias, requires_grad=False)
    adapter = patches.find(router)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4)
        own = adapter.native_bias(router, parent)
        if own is not None:
            own.copy_(bias)
    for parameter in router.parameters():
        if parameter.requires_grad:  # a native bias stays as the model keeps it
            parameter.data = parameter.data.to(dtype)
    return adapter, router, parent


def call(adapter: Adapter, router: nn.Module, parent: nn.Module, x_TD: Tensor) -> tuple[Any, tuple[Any, ...]]:
    args = (x_TD,) if adapter.bias_arg is None else (x_TD, adapter.native_bias(router, parent))
    return router(*args), args


def variant(family: str, seed: int) -> SimpleNamespace:
    rng = random.Random(f"{family}-{seed}")
    config = SimpleNamespace(**shape(rng))
    if family == "axk2" and rng.random() < 0.4:
        config.n_group = None
    return config


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", sorted(SPECS))
def test_rule_equals_its_definition(family: str, seed: int) -> None:
    config = variant(family, seed)
    adapter, router, parent = native(family, config, torch.float)
    output, args = call(adapter, router, parent, torch.randn(TOKENS, WIDTH))
    logits_TE = patches.probe(adapter, router, output).logits_TE
    bias = adapter.native_bias(router, parent)
    _, define, expected_of = SPECS[family]
    o = expected_of(config)
    o.k, o.bias = config.num_experts_per_tok, [0.0] * config.num_experts if bias is None else bias.tolist()
    for scope in ("routing", "selection"):
        for beta_E in (torch.zeros(config.num_experts), torch.randn(config.num_experts)):
            steered = adapter.reroute(router, RouterCall(output, logits_TE, beta_E, scope, args, {}))
            for token, z in enumerate(logits_TE.tolist()):
                expected = define(z, beta_E.tolist(), scope, o)
                got = dict(zip(steered[2][token].tolist(), steered[1][token].tolist(), strict=True))
                assert got.keys() == expected.keys(), (scope, token)
                assert got == pytest.approx(expected, rel=2e-5, abs=1e-7), (scope, token)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", sorted(SPECS))
def test_neutral_steering_is_exact_in_bf16(family: str, seed: int) -> None:
    adapter, router, parent = native(family, variant(family, seed), torch.bfloat16)
    output, args = call(adapter, router, parent, torch.randn(TOKENS * 8, WIDTH).to(torch.bfloat16))
    logits_TE = patches.probe(adapter, router, output).logits_TE
    for scope in ("routing", "selection"):
        steered = adapter.reroute(
            router, RouterCall(output, logits_TE, torch.zeros(logits_TE.shape[-1]), scope, args, {})
        )
        for ours, theirs in zip(steered, output, strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@pytest.mark.parametrize("family", ["mistral4", "lfm2_moe", "deepseek_v4", "gpt_oss", "qwen3_moe"])
def test_a_small_beta_survives_bf16_logits(family: str) -> None:
    """A beta of 1e-3 is below the bf16 resolution of most logits; added in fp32 it still breaks ties the right way."""
    config = SimpleNamespace(**(shape(random.Random(0)) | {"num_experts": 8, "num_local_experts": 8, "n_group": 1}))
    config.num_experts_per_tok, config.topk_group, config.use_expert_bias = 1, 1, False
    adapter, router, parent = native(family, config, torch.bfloat16)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(parameter[:1].clone())  # every expert ties with every other
        bias = adapter.native_bias(router, parent)
        if bias is not None:
            bias.zero_()
    output, args = call(adapter, router, parent, torch.randn(TOKENS, WIDTH).to(torch.bfloat16))
    for expert in range(8):
        beta_E = torch.zeros(8)
        beta_E[expert] = 1e-3
        steered = adapter.reroute(router, RouterCall(output, output[0], beta_E, "routing", args, {}))
        assert steered[2].flatten().tolist() == [expert] * TOKENS


@pytest.mark.parametrize("capacity", [1, 2, 3, 64])
def test_switch_capacity_is_per_sequence_and_expert(capacity: int) -> None:
    cls = import_module(module_of("switch_transformers")).SwitchTransformersTop1Router
    config = SimpleNamespace(num_experts=4, expert_capacity=capacity, hidden_size=WIDTH, router_bias=False)
    config.router_jitter_noise, config.router_ignore_padding_tokens, config.router_dtype = 0.0, False, "float32"
    for dtype in (torch.float, torch.bfloat16):
        router = cls(config)
        adapter = patches.find(router)
        x_BSD = torch.randn(3, 10, WIDTH).to(dtype)
        output = router(x_BSD)
        routing = patches.probe(adapter, router, output)
        neutral = adapter.reroute(
            router, RouterCall(output, routing.logits_TE, torch.zeros(4), "routing", (x_BSD,), {})
        )
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(neutral, output, strict=True))
        for scope in ("routing", "selection"):
            beta_E = torch.tensor([1.0, -0.5, 0.0, 0.2])
            mask_BSE, weight_BS1, _ = adapter.reroute(
                router, RouterCall(output, routing.logits_TE, beta_E, scope, (x_BSD,), {})
            )
            for sequence in range(3):
                used = [0] * 4
                for position in range(10):
                    z = output[2][sequence, position].tolist()
                    biased = softmax([a + b for a, b in zip(z, beta_E.tolist(), strict=True)])
                    expert = largest(biased, 1)[0]
                    used[expert] += 1
                    expected = [int(e == expert and used[expert] <= capacity) for e in range(4)]
                    assert mask_BSE[sequence, position].tolist() == expected
                    weight = (biased if scope == "routing" else softmax(z))[expert]
                    tolerance = 1e-5 if dtype == torch.float else 1e-2
                    assert weight_BS1[sequence, position].item() == pytest.approx(weight, rel=tolerance)
        kept = output[0].flatten(0, 1).tolist()
        assert routing.kept_TK is not None
        assert routing.kept_TK.flatten().tolist() == [sum(row) == 1 for row in kept]
        demand = [largest(softmax(z), 1)[0] for z in routing.logits_TE.tolist()]
        if dtype == torch.float:
            assert routing.index_TK.flatten().tolist() == demand
    assert capacity >= 10 or not routing.kept_TK.all(), "the capacity dropped nothing"


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("scope", ["routing", "selection"])
def test_phimoe_replays_its_sampling(noise: float, scope: Any) -> None:
    module = import_module(module_of("phimoe"))
    config = SimpleNamespace(hidden_size=WIDTH, num_local_experts=8, num_experts_per_tok=2)
    config.router_jitter_noise, config.input_jitter_noise = 0.1, noise
    adapter = patches.find(module.PhimoeTopKRouter(config))
    router = type("Replaying", (*adapter.mixins, module.PhimoeTopKRouter), {})(config).train()
    x_TD = torch.randn(64, WIDTH)
    output = router(x_TD.clone())
    after = torch.get_rng_state()
    steered = adapter.reroute(router, RouterCall(output, output[0], torch.zeros(8), scope, (x_TD,), {}))
    assert all(torch.equal(a, b) for a, b in zip(steered, output, strict=True))
    assert torch.equal(torch.get_rng_state(), after), "steering left another random state behind"
    again = router(x_TD.clone())
    assert not torch.equal(again[2], output[2]), "the router does not sample: the test proves nothing"
    native = gradient(output[1], router.weight)
    torch.testing.assert_close(gradient(steered[1], router.weight), native, rtol=0, atol=0)


def gradient(weights: Tensor, parameter: Tensor) -> Tensor:
    projection = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    return torch.autograd.grad((weights * projection).sum(), parameter, retain_graph=True)[0]
