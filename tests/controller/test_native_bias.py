"""`balance` updates the correction bias that a model ships with, and a plain reload routes as trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import moe_zoo

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoRouter

WITH_BIAS = ["deepseek_v3", "glm4_moe", "ernie4_5_moe", "hy_v3", "kolibri1", "minimax_m2", "laguna", "lfm2_moe"]

FULL = {"dead_zone": None, "rate": 0.3, "first_layer": "same"}  # every share to the fair one, in every layer


def collapsed(family: str) -> Any:
    """A tiny model whose routers favour two experts by far."""
    model = moe_zoo.build(family)
    moe_zoo.randomise(model)
    for adapter, router, parent in moe_zoo.routers_of(model):
        adapter.unbind(router)
        bias = adapter.native_bias(router, parent)
        slope = adapter.rule.bias_slope(adapter.num_experts(router))
        if bias is None:
            with torch.no_grad():
                adapter.weight(router)[2:].mul_(0.02)
            continue
        bias.data.zero_()
        bias.data[:2] = 2.5 * slope
    return model.train()


def step_counts(system: Any) -> torch.Tensor:
    return system.step_state.window_LR[:, : system.step_state.row.width].clone()


def worst_share_of_experts(count_LE: torch.Tensor, num_experts: list[int]) -> float:
    share = count_LE / count_LE.sum(-1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(-1)
    return float((entropy.exp() / torch.tensor(num_experts)).min())


def train(model: Any, steps: int) -> tuple[float, float]:
    """Worst Neff/E over layers in the first and in the last 10 steps."""
    system = chronomoe_hf.system_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    corpus = torch.randint(3, 100, (64, 64), generator=generator)
    seen = []
    for step in range(1, steps + 1):
        ids = corpus[torch.randint(0, 64, (8,), generator=generator)]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        before = step_counts(system)
        system.step(step)
        seen.append(step_counts(system) - before)
    experts = system.step_state.num_experts
    return (worst_share_of_experts(seen[0], experts), worst_share_of_experts(sum(seen[-10:]), experts))


FAST = ("deepseek_v3", "qwen3_moe")
EVERY = [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in (*WITH_BIAS, "qwen3_moe")]


@pytest.mark.parametrize("family", EVERY)
def test_balance_undoes_a_collapse(family: str, tmp_path: Path) -> None:
    model = collapsed(family)
    chronomoe_hf.wrap(model, ChronoConfig.balance(interval=10_000, beta=FULL))
    system = chronomoe_hf.system_of(model)
    first, last = train(model, 150)
    assert first < 0.85, "bad test setup: the model was balanced from the start"
    assert last >= 0.9
    native = family in WITH_BIAS
    assert all(layer.native_bias is native for layer in system.layers)
    assert bool(torch.count_nonzero(system.step_state.beta_LE)) is not native, (
        "beta stays zero where the native bias acts"
    )
    if not native:
        return
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    assert not any(isinstance(m, ChronoRouter) for m in plain.modules())
    ids = torch.randint(3, 100, (2, 16))
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_the_update_is_the_published_sign_rule_when_asked() -> None:
    model = collapsed("deepseek_v3")
    rule = FULL | {"rule": "sign", "native_rate": 0.001}
    chronomoe_hf.wrap(model, ChronoConfig.balance(interval=10_000, beta=rule))
    system = chronomoe_hf.system_of(model)
    layer = system.layers[0]
    bias = layer.adapter.native_bias(layer.router, layer.parent)
    assert bias is not None
    before = bias.clone()
    ids = torch.randint(3, 100, (4, 16))
    model(input_ids=ids).logits.sum().backward()
    system.step(1)
    counts = system.snapshot().layers[0].expert_token_counts
    fair = sum(counts) / len(counts)
    signs = [(fair > c) - (fair < c) for c in counts]
    mean = sum(signs) / len(signs)
    want = [b + 0.001 * (s - mean) for b, s in zip(before.tolist(), signs, strict=True)]
    assert bias.tolist() == pytest.approx(want, abs=1e-7)
    assert len(set(signs)) > 1, "bad test setup"


@pytest.mark.parametrize("family", ["minimax_m2", "laguna", "kimi_linear"])
def test_a_bf16_bias_is_kept_in_fp32_so_that_small_steps_are_not_lost(family: str, tmp_path: Path) -> None:
    model = moe_zoo.build(family)
    moe_zoo.randomise(model)
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    adapter, router, parent = moe_zoo.routers_of(model)[0]
    before = adapter.native_bias(router, parent)
    assert before is not None and before.dtype == torch.bfloat16, "bad test setup"
    chronomoe_hf.wrap(model, ChronoConfig.balance(beta=FULL | {"native_rate": 1e-5}))
    bias = adapter.native_bias(router, parent)
    assert bias is not None and bias.dtype == torch.float32
    start = bias.clone()
    system = chronomoe_hf.system_of(model)
    for step in (1, 2):
        model(input_ids=torch.randint(3, 100, (2, 16))).logits.float().sum().backward()
        system.step(step)
    moved = (bias - start).abs()
    assert 0 < float(moved.max()) <= 2.5e-5
    model.save_pretrained(tmp_path / "after")
    from safetensors.torch import load_file

    saved = [v for f in (tmp_path / "after").glob("*.safetensors") for v in load_file(f).values()]
    assert any(v.shape == bias.shape and torch.equal(v.float(), bias) for v in saved), "fp32 must reach the file"


def moved_experts(model: Any, steps: int, biases: float = 3.0) -> tuple[Any, int]:
    """Steps of `balance` from biases of 3 in the first layer: that bias, and how many of its experts moved."""
    system = chronomoe_hf.system_of(model)
    layer = system.layers[0]
    bias = layer.adapter.native_bias(layer.router, layer.parent)
    bias.data.fill_(biases)
    start = bias.clone().float()
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        model(input_ids=torch.randint(3, 100, (4, 16), generator=generator))
        system.step(step)
    bias = layer.adapter.native_bias(layer.router, layer.parent)
    return bias, int((bias.float() - start).ne(0).sum())


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
@pytest.mark.parametrize("cast", ["before wrap", "after wrap", "during training"])
def test_a_bias_that_was_cast_is_brought_back_to_fp32(family: str, cast: str, caplog: pytest.LogCaptureFixture) -> None:
    """A buffer (DeepSeek) and a parameter (Ernie): in bf16 near 3, steps of 1e-3 round to nothing."""
    model = moe_zoo.build(family)
    moe_zoo.randomise(model)
    config = ChronoConfig.balance(beta=FULL | {"native_rate": 1e-3})
    if cast == "before wrap":
        model = model.to(torch.bfloat16)
    chronomoe_hf.wrap(model, config).train()
    system = chronomoe_hf.system_of(model)
    layer = system.layers[0]
    held = [value for name, value in model.named_parameters() if name.endswith("correction_bias")]
    if cast == "after wrap":
        model.to(torch.bfloat16)
        if family == "deepseek_v3":
            assert layer.adapter.native_bias(layer.router, layer.parent).dtype == torch.bfloat16, "bad test setup"
        system.begin()
    elif cast == "during training":
        model(input_ids=torch.randint(3, 100, (2, 8)))
        model.to(torch.bfloat16)
        model(input_ids=torch.randint(3, 100, (2, 8)))
        system.step(1)
        system.begin()
    bias, moved = moved_experts(model, 30)
    assert bias.dtype == torch.float32
    assert moved == layer.num_experts, "steps of a thousandth were lost"
    now = [value for name, value in model.named_parameters() if name.endswith("correction_bias")]
    assert len(held) == (2 if layer.bias_is_parameter else 0)
    assert all(a is b for a, b in zip(held, now, strict=True)), "the optimizer holds these very parameters"
    said = [record.message for record in caplog.records if "was cast to bfloat16 after" in record.message]
    assert len(said) == (cast != "before wrap"), said


def test_a_bias_is_checked_when_a_state_is_loaded(tmp_path: Path) -> None:
    model = chronomoe_hf.wrap(moe_zoo.build("deepseek_v3"), ChronoConfig.balance(interval=1))
    system = chronomoe_hf.system_of(model)
    system.save(tmp_path)
    model.to(torch.bfloat16)
    system.load(tmp_path)
    layer = system.layers[0]
    assert layer.adapter.native_bias(layer.router, layer.parent).dtype == torch.float32


def test_the_dead_zone_holds_for_a_native_bias_too() -> None:
    """Wide enough for every share the bias rests bit for bit; without it, it moves."""
    moved = []
    for zone in ((0.0, None), None):
        model = collapsed("deepseek_v3")
        chronomoe_hf.wrap(model, ChronoConfig.balance(interval=10_000, beta=FULL | {"dead_zone": zone}))
        system = chronomoe_hf.system_of(model)
        biases = [layer.adapter.native_bias(layer.router, layer.parent) for layer in system.layers]
        before = [bias.clone() for bias in biases]
        model(input_ids=torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(0)))
        system.step(1)
        moved.append([bool((a != b).any()) for a, b in zip(biases, before, strict=True)])
    assert not any(moved[0]) and all(moved[1])
