"""k may change while a model is wrapped: windows, laws and ceilings follow. E may not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny_batch, tiny_model
from torch import nn

from chronomoe_hf import ChronoConfig, system_of, wrap
from chronomoe_hf.errors import WrapError

WINDOW: dict[str, Any] = {"interval": 2, "alerts__min_window_tokens": 1}


def set_k(model: Any, k: int) -> None:
    for layer in model.model.layers:
        layer.mlp.gate.top_k = k


def run(model: Any, first: int, last: int, *, forwards: int = 1) -> Any:
    snapshot = None
    for step in range(first, last + 1):
        for micro in range(forwards):
            model(**tiny_batch("qwen3_moe", batch=8, length=32, seed=10 * step + micro))
        snapshot = system_of(model).step(step) or snapshot
    return snapshot


def test_windows_after_a_change_are_those_of_a_model_that_was_always_so() -> None:
    changed = wrap(tiny_model("qwen3_moe", num_experts_per_tok=4), ChronoConfig.observe(**WINDOW)).train()
    always = wrap(tiny_model("qwen3_moe", num_experts_per_tok=1), ChronoConfig.observe(**WINDOW)).train()
    assert run(changed, 1, 4).layers[0].top_k == 4
    set_k(changed, 1)
    got, want = run(changed, 5, 10), run(always, 5, 10)
    for one, other in zip(got.layers, want.layers, strict=True):
        assert (one.top_k, one.max_violation_ceiling) == (1, other.max_violation_ceiling) == (1, one.n_experts - 1)
        assert one.top2_relative == other.top2_relative and one.notes == other.notes
    assert got.active_alerts == want.active_alerts
    set_k(changed, 2)  # and up again
    assert [layer.top_k for layer in run(changed, 11, 12).layers] == [2, 2]


def test_a_window_with_both_is_told_by_the_least() -> None:
    model = wrap(tiny_model("qwen3_moe", num_experts_per_tok=4), ChronoConfig.observe(**WINDOW)).train()
    run(model, 1, 1)
    set_k(model, 1)
    mixed = run(model, 2, 2).layers[0]
    assert mixed.top_k == 1 and any("between 1 and 4" in note for note in mixed.notes)
    assert run(wrap(tiny_model("qwen3_moe"), ChronoConfig.observe(**WINDOW)).train(), 1, 2).layers[0].notes == []
    assert mixed.max_violation <= mixed.max_violation_ceiling and mixed.top2_relative <= 1.0
    set_k(model, 4)
    later = run(model, 3, 4).layers[0]
    assert later.top_k == 4 and not [note for note in later.notes if "changed" in note]


def test_the_balance_law_follows() -> None:
    def beta(model: Any) -> torch.Tensor:
        run(model, 1, 4)
        return system_of(model).step_state.beta_LE.clone()

    config = ChronoConfig.balance(**WINDOW, beta__rate=0.3)
    changed = wrap(tiny_model("qwen3_moe", num_experts_per_tok=4), config).train()
    set_k(changed, 1)
    always = beta(wrap(tiny_model("qwen3_moe", num_experts_per_tok=1), config).train())
    other = beta(wrap(tiny_model("qwen3_moe", num_experts_per_tok=4), config).train())
    got = beta(changed)
    assert always.any() and torch.equal(got, always) and not torch.equal(got, other)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_k_is_read_at_the_end_of_a_window_of_compiled_forwards(fresh_compiler: None) -> None:
    model = wrap(tiny_model("qwen3_moe", num_experts_per_tok=4), ChronoConfig.observe(**WINDOW)).train()
    compiled = torch.compile(model, backend="aot_eager")
    assert run(compiled, 1, 2).layers[0].top_k == 4
    set_k(model, 1)
    after = run(compiled, 3, 4).layers[0]
    assert after.top_k == 1 and after.max_violation_ceiling == after.n_experts - 1
    assert after.tokens > 0


def grow(model: Any, more: int = 1) -> None:
    for layer in model.model.layers:
        gate, experts = layer.mlp.gate, layer.mlp.experts
        for module, name in ((gate, "weight"), (experts, "gate_up_proj"), (experts, "down_proj")):
            old = getattr(module, name).data
            setattr(module, name, nn.Parameter(torch.cat([old, old[:more]])))
        gate.num_experts += more
        experts.num_experts += more


@pytest.mark.parametrize("preset", ["observe", "balance"])
def test_another_number_of_experts_is_refused_by_name(preset: str) -> None:
    model = wrap(tiny_model("qwen3_moe"), getattr(ChronoConfig, preset)(**WINDOW)).train()
    num = system_of(model).layers[0].num_experts
    run(model, 1, 2)
    grow(model)
    with pytest.raises(WrapError, match=f"{num + 1} experts now and had {num}"):
        run(model, 3, 3)
    with pytest.raises(WrapError, match=f"{num + 1} experts now and had {num}"):
        wrap(model)
    with pytest.raises(WrapError, match=f"{num + 1} experts now and had {num}"):
        system_of(model).begin()


def test_a_state_of_another_k_loads_and_says_so(tmp_path: Path) -> None:
    model = wrap(tiny_model("qwen3_moe", num_experts_per_tok=4), ChronoConfig.observe(**WINDOW)).train()
    set_k(model, 1)
    run(model, 1, 2)
    system_of(model).save(tmp_path)
    other = wrap(tiny_model("qwen3_moe", num_experts_per_tok=4), ChronoConfig.observe(**WINDOW)).train()
    with pytest.warns(UserWarning, match=r"another number of experts .*\(1 then, 4 now\)"):
        system_of(other).load(tmp_path)
    assert run(other, 3, 4).layers[0].top_k == 4
