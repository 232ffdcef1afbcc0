"""Windows with nothing to learn from, or everything on one expert: no NaN, no drift, every bound kept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import models as tiny

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoSystem
from chronomoe_hf.config import TelemetryConfig


def assert_sane(system: ChronoSystem) -> None:
    """Nothing is NaN, and beta and relevance are within their bounds."""
    for name in system.step_state.NAMES:
        assert torch.isfinite(getattr(system.step_state, name)).all(), name
    assert float(system.step_state.beta_LE.abs().max()) <= system.cap + 1e-6
    assert system.step_state.beta_LE.double().mean(-1).abs().max() < 1e-6
    assert ((system.step_state.relevance_L >= 0) & (system.step_state.relevance_L <= 1)).all()
    for lens in system.lenses.values():
        assert (
            torch.isfinite(lens.V).all()
            and torch.isfinite(lens.U).all()
            and 0 <= lens.scale <= system.config.control.scale_max
        )
    for value in system.snapshot().scalars().values():
        assert math.isfinite(value)


def force_one_expert(model: Any) -> None:
    """Router weights that give expert 3 the largest logit and expert 5 the second largest, for every token."""
    for layer in model.model.layers:
        gate = layer.mlp.gate
        with torch.no_grad():
            gate.weight.zero_()
        gate.register_forward_pre_hook(lambda module, args: (args[0].abs(),))
        with torch.no_grad():
            gate.weight[3], gate.weight[5] = 2.0, 1.0


@pytest.mark.parametrize("preset", ["protect", "balance"])
@pytest.mark.parametrize("num_k", [1, 2])
def test_all_tokens_on_one_expert_leave_no_nan(preset: str, num_k: int) -> None:
    model = tiny.tiny_model("mixtral", num_experts_per_tok=num_k)
    force_one_expert(model)
    chronomoe_hf.wrap(model, ChronoConfig.preset(preset, interval=1))
    system = chronomoe_hf.system_of(model)
    for step in range(1, 8):
        model(**tiny.tiny_batch("mixtral", seed=step)).loss.backward()
        snapshot = system.step(step)
        assert snapshot is not None
        if step == 1:
            assert [e for e, n in enumerate(snapshot.layers[0].expert_token_counts) if n] == [3, 5][:num_k], (
                "bad test setup"
            )
        assert_sane(system)
    if preset == "balance":
        assert system.step_state.beta_LE[0, 3] < 0 < system.step_state.beta_LE[0, 0]


@pytest.mark.parametrize("preset", ["protect", "balance"])
def test_empty_and_all_padding_windows_leave_no_nan_and_move_nothing(preset: str) -> None:
    model = tiny.tiny_model("mixtral")
    chronomoe_hf.wrap(model, ChronoConfig.preset(preset, interval=1))
    system = chronomoe_hf.system_of(model)
    step = 0

    def run(kind: str) -> None:
        nonlocal step
        step += 1
        batch = tiny.tiny_batch("mixtral", seed=step)
        if kind == "padding":
            batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
        if kind != "nothing":
            model(**batch)
        assert system.step(step) is not None
        assert_sane(system)

    for kind in ("nothing", "padding", "nothing"):
        run(kind)
    assert system.step_state.beta_LE.eq(0).all() and system.step_state.std_updates_L.eq(0).all()
    run("full")
    run("full")
    before = {name: getattr(system.step_state, name).clone() for name in ("beta_LE", "ema_CLE", "logit_std_L", "js_L")}
    assert before["beta_LE"].abs().max() > 0, "bad test setup: beta never moved"
    clocks, betas = before.pop("ema_CLE"), before.pop("beta_LE")
    for kind in ("padding", "nothing"):
        run(kind)
        assert torch.equal(system.step_state.ema_CLE, clocks)
        for name, tensor in before.items():
            assert torch.equal(getattr(system.step_state, name), tensor), (kind, name)
        if preset == "balance":
            assert torch.allclose(system.step_state.beta_LE, betas, rtol=0, atol=1e-7), "no count, no step"


def test_a_mistake_in_an_evaluation_does_not_end_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for on_error in ("warn", "raise"):
        model = tiny.tiny_model("mixtral")
        config = ChronoConfig(interval=1, telemetry=TelemetryConfig(on_error=on_error))
        chronomoe_hf.wrap(model, config)
        system = chronomoe_hf.system_of(model)
        monkeypatch.setattr(system.lifecycle, "evaluate", lambda snapshot: 1 / 0)
        model(**tiny.tiny_batch("mixtral")).loss.backward()
        if on_error == "raise":
            with pytest.raises(ZeroDivisionError):
                system.step(1)
            continue
        for step in (1, 2):
            assert system.step(step) is None
        assert [record.exc_info is not None for record in caplog.records if "training goes on" in record.message] == [
            True
        ]
        monkeypatch.undo()
        model(**tiny.tiny_batch("mixtral")).loss.backward()
        assert system.step(3) is not None, "the next window is evaluated again"


def test_function_transforms_run_and_are_left_out() -> None:
    """torch.func.grad of a wrapped model in training mode gives the native gradients."""
    model = tiny.tiny_model("mixtral")
    batch = tiny.tiny_batch("mixtral")
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, values, kwargs=batch).loss

    want = torch.func.grad(loss)(weights)
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    got = torch.func.grad(loss)(weights)
    assert all(torch.equal(got[name], want[name]) for name in want)
    system = chronomoe_hf.system_of(model)
    snapshot = system.step(1)
    assert snapshot is not None and [layer.token_count for layer in snapshot.layers] == [0, 0]
