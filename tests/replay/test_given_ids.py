"""Every router class told what to choose, against its native code whose ``topk`` is made to return those ids."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import moe_zoo
from support.moe_zoo import FAMILIES, ROUTED, Call
from torch import Tensor
from torch.overrides import TorchFunctionMode

from chronomoe_hf import patches
from chronomoe_hf.router.state import RouterCall

REPLAYED = [family for family in ROUTED if family not in ("dbrx", "nllb_moe")]
NO_TOPK = {"phimoe": "softmax near the maximum", "switch_transformers": "argmax", "zaya": "argmax"}
# The kept groups of DeepSeek-V2 zero the scores of all others, also in the weights: its oracle is the family without
# them, which is what a given expert outside the kept groups is weighed by.
UNGROUPED = {"deepseek_v2": {"topk_method": "greedy"}}


class ForcedTopK(TorchFunctionMode):
    """Every ``topk`` of K out of E columns returns given ids, in that order."""

    def __init__(self, index_TK: Tensor, num_experts: int) -> None:
        self.index_TK, self.num_experts, self.met = index_TK, num_experts, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk):
            scores, k = args[0], args[1] if len(args) > 1 else kwargs["k"]
            if scores.shape[-1] == self.num_experts and k == self.index_TK.shape[-1]:
                self.met += 1
                index = self.index_TK.view(*scores.shape[:-1], k)
                return torch.return_types.topk((scores.gather(-1, index), index))
        return func(*args, **kwargs)


@functools.lru_cache(maxsize=4)
def calls_of(family: str, **overrides: Any) -> tuple[Call, ...]:
    model = moe_zoo.build(family, **overrides)
    moe_zoo.randomise(model)
    return tuple(moe_zoo.calls_of(model))


def oracle_calls(family: str) -> tuple[Call, ...]:
    overrides = UNGROUPED.get(family, {})
    return tuple(call for call in calls_of(family, **overrides) if call.adapter.refused("replay") is None)


def bf16_calls(family: str, directory: Path) -> list[Call]:
    model = moe_zoo.build(family, **UNGROUPED.get(family, {}))
    moe_zoo.randomise(model)
    model.save_pretrained(directory)
    calls = moe_zoo.calls_of(type(model).from_pretrained(directory, dtype=torch.bfloat16))
    return [call for call in calls if call.adapter.refused("replay") is None]


def random_ids(num_rows: int, num_experts: int, k: int, seed: int = 5) -> Tensor:
    noise = torch.rand(num_rows, num_experts, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(-1)[:, :k]


def replayed(call: Call, output: Any, args: Any, kwargs: Any, index_TK: Tensor | None, **more: Any) -> Any:
    routing = call.adapter.read(call.router, output)
    beta_E = torch.zeros(call.adapter.num_experts(call.router))
    given = RouterCall(output, routing.logits_TE, beta_E, "routing", args, kwargs, index_TK=index_TK, **more)
    return call.adapter.reroute(call.router, given)


def parts(output: Any) -> list[Tensor]:
    return [part for part in output if isinstance(part, Tensor)]


def assert_same(ours: Any, native: Any, what: str) -> None:
    assert len(ours) == len(native), what
    for one, two in zip(ours, native, strict=True):
        if isinstance(two, Tensor):
            assert (one.dtype, one.shape) == (two.dtype, two.shape), what
            assert torch.equal(one, two), f"{what}: {(one.double() - two.double()).abs().max()}"
        else:
            assert one == two, what


def check_against_native(call: Call) -> int:
    """Own ids, given ids and -1 rows of one call; returns how often the native ``topk`` was forced."""
    what = call.adapter.router_class
    output, args, kwargs = call.run()
    routing = call.adapter.read(call.router, output)
    assert_same(replayed(call, output, args, kwargs, routing.index_TK), output, f"{what}, own ids")
    num_rows, k = routing.index_TK.shape
    num_experts = call.adapter.num_experts(call.router)
    index_TK = random_ids(num_rows, num_experts, k)
    with ForcedTopK(index_TK, num_experts) as forced:
        native, _, _ = call.run()
    if forced.met == 0:
        assert call.adapter.family in NO_TOPK, f"{what}: no topk was forced"
        return 0
    ours = replayed(call, output, args, kwargs, index_TK)
    assert_same(ours, native, f"{what}, given ids")
    assert not torch.equal(call.adapter.read(call.router, ours).index_TK.sort(-1)[0], routing.index_TK.sort(-1)[0])
    own_T1 = (torch.arange(num_rows) % 3 == 0)[:, None]
    mixed = replayed(call, output, args, kwargs, index_TK.masked_fill(own_T1, -1))
    expected_TK = torch.where(own_T1, routing.index_TK, index_TK)
    with ForcedTopK(expected_TK, num_experts):
        native, _, _ = call.run()
    assert_same(mixed, native, f"{what}, -1 rows")
    return forced.met


@pytest.mark.parametrize("family", REPLAYED)
def test_given_ids_get_the_weights_of_the_native_code_fp32(family: str) -> None:
    calls = oracle_calls(family)
    assert calls
    for call in calls:
        with torch.no_grad():
            check_against_native(call)


@pytest.mark.parametrize("family", [name for name in REPLAYED if name != "inkling2"])
def test_given_ids_get_the_weights_of_the_native_code_bf16(family: str, tmp_path: Path) -> None:
    for call in bf16_calls(family, tmp_path):
        with torch.no_grad():
            check_against_native(call)


@pytest.mark.parametrize("family", REPLAYED)
def test_given_ids_get_the_weights_of_the_native_code_under_autocast(family: str) -> None:
    for call in oracle_calls(family):
        for dtype in (torch.float, torch.bfloat16):
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                check_against_native(dataclasses.replace(call, args=(call.args[0].to(dtype), *call.args[1:])))


@pytest.mark.parametrize("family", REPLAYED)
def test_the_router_learns_from_given_ids(family: str) -> None:
    """The gradient with respect to the router's weight is that of the native code with the same ids forced."""
    for call in oracle_calls(family):
        num_experts, k = call.adapter.num_experts(call.router), call.adapter.top_k(call.router)
        weights_at = 2 if call.adapter.router_class == "JetMoeTopKGating" else call.adapter.weights_index
        rows = call.adapter.read(call.router, call.run()[0]).index_TK.shape[0]
        index_TK = random_ids(rows, num_experts, k)

        def grads(force: bool, call: Call = call, index_TK: Tensor = index_TK, at: int = weights_at) -> list[Tensor]:
            args, kwargs = moe_zoo.copied(call.args), moe_zoo.copied(call.kwargs)
            wanted = [p for p in call.router.parameters() if p.requires_grad]
            if force:
                with ForcedTopK(index_TK, call.adapter.num_experts(call.router)) as forced:
                    output = call.router(*args, **kwargs)
                if not forced.met:
                    return []
            else:
                output = replayed(call, call.router(*args, **kwargs), args, kwargs, index_TK)
            w = output[at]
            probe = torch.linspace(0.1, 1.0, w.numel()).view(w.shape)
            got = torch.autograd.grad((w * probe).sum(), wanted, allow_unused=True)
            return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, got, strict=True)]

        ours, native = grads(False), grads(True)
        assert sum(float(grad.abs().sum()) for grad in ours) > 0, call.adapter.router_class
        for one, two in zip(ours, native, strict=False):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=call.adapter.router_class)


def test_deepseek_v2_keeps_the_score_of_a_given_expert_outside_the_kept_groups() -> None:
    """The engine that chose it may have kept other groups: its weight is a score, and not the 0 of the mask."""
    grouped = calls_of("deepseek_v2")[0]
    assert grouped.adapter.groups(grouped.router)[0] > 1
    with torch.no_grad():
        output, args, kwargs = grouped.run()
        routing = grouped.adapter.read(grouped.router, output)
        index_TK = random_ids(*routing.logits_TE.shape, routing.index_TK.shape[-1])
        ours = replayed(grouped, output, args, kwargs, index_TK)
        expected = F.softmax(routing.logits_TE.float(), -1).gather(-1, index_TK) * grouped.router.routed_scaling_factor
        torch.testing.assert_close(ours[1], expected.to(ours[1].dtype))
        assert (ours[1] > 0).all()
        with ForcedTopK(index_TK, routing.logits_TE.shape[-1]):
            masked, _, _ = grouped.run()
        assert (masked[1] == 0).any(), "no given expert lies outside the kept groups: the test shows nothing"


def test_switch_gives_the_probability_of_the_given_expert_and_keeps_its_capacity() -> None:
    for call in calls_of("switch_transformers"):
        with torch.no_grad():
            output, args, kwargs = call.run()
            logits = output[2]
            index_T1 = random_ids(logits.shape[0] * logits.shape[1], logits.shape[-1], 1)
            ours = replayed(call, output, args, kwargs, index_T1)
            index = index_T1.view(*logits.shape[:-1], 1)
            torch.testing.assert_close(ours[1], F.softmax(logits, -1).gather(-1, index), rtol=1e-6, atol=0)
            demand = F.one_hot(index[..., 0], logits.shape[-1])
            kept = demand * (demand.cumsum(-2) <= call.router.expert_capacity)
            assert torch.equal(ours[0].to(kept.dtype), kept)


def test_zaya_weighs_a_given_class_and_skips_where_it_is_the_last() -> None:
    for call in calls_of("zaya"):
        with torch.no_grad():
            output, args, kwargs = call.run()
            logits = call.adapter.read(call.router, output).logits_TE
            k = output[2].shape[-1]
            index_TK = random_ids(*logits.shape, k)
            ours = replayed(call, output, args, kwargs, index_TK)
            skipped = index_TK == call.router.num_router_classes - 1
            assert skipped.any() and not skipped.all()
            expected = F.softmax(logits, -1).gather(-1, index_TK).masked_fill(skipped, 0)
            torch.testing.assert_close(ours[1].view(expected.shape), expected)
            assert torch.equal(ours[2].view(index_TK.shape), index_TK.masked_fill(skipped, 0))


def sparsemixer(z: Tensor, first: int, second: int, jitter: float) -> list[float]:
    """Weights of two given experts of one token, by the definition (arXiv:2409.12136), in evaluation mode."""
    weights, gone = [], torch.zeros_like(z, dtype=torch.bool)
    for expert in (first, second):
        top = z.masked_fill(gone, float("-inf")).max()
        far = (top - z) / z.abs().clamp(min=top) > 2 * jitter
        far[expert] = False
        weights.append(float(F.softmax(z.masked_fill(far | gone, float("-inf")), -1)[expert]))
        gone[expert] = True
    return weights


@pytest.mark.parametrize("training", [False, True])
def test_phimoe_weighs_given_experts_as_in_evaluation_in_both_modes(training: bool) -> None:
    for call in calls_of("phimoe"):
        call.router.train(training)
        try:
            with torch.no_grad():
                hidden = call.args[0]
                if training:  # the class of a wrapped router remembers it
                    from chronomoe_hf.patches.phimoe import RNG_STATE

                    call.router.__dict__[RNG_STATE] = torch.default_generator.get_state()
                output = call.router(hidden.clone())
                after = torch.default_generator.get_state()
                z_TE = output[0]
                index_T2 = random_ids(*z_TE.shape, 2)
                ours = replayed(call, output, (hidden,), {}, index_T2)
                assert torch.equal(after, torch.default_generator.get_state()), "took other random numbers"
                for t in range(z_TE.shape[0]):
                    expected = sparsemixer(z_TE[t], *index_T2[t].tolist(), call.router.router_jitter_noise)
                    torch.testing.assert_close(ours[1][t], torch.tensor(expected), rtol=1e-5, atol=1e-7)
                assert torch.equal(ours[2], index_T2)
                own = replayed(call, output, (hidden,), {}, torch.full_like(index_T2, -1))
                assert_same(own, output, "rows that choose themselves")
        finally:
            call.router.eval()
            call.router.__dict__.pop("_chrono_rng_state", None)


def test_what_cannot_be_told_is_refused_with_a_reason() -> None:
    refused = {a.router_class: a.refused("replay") for a in patches.all_adapters() if a.refused("replay")}
    assert set(refused) == {"DbrxRouter", "NllbMoeTop2Router", "DeepseekV4HashRouter"}
    assert "in its block" in str(refused["DbrxRouter"]) and "experts 0 and 1" in str(refused["NllbMoeTop2Router"])
    assert {a.router_class for a in patches.all_adapters() if a.by_token} == {"DeepseekV4HashRouter"}
    assert {a.router_class for a in patches.all_adapters() if a.samples} == {"PhimoeTopKRouter"}
    assert set(FAMILIES) >= set(REPLAYED)
