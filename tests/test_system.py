"""What a loop of the user's own gets from `system.step`, and what is said once a run."""

from __future__ import annotations

import logging
import types
from typing import Any

import pytest
from support.models import tiny_batch, tiny_model

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoSystem
from chronomoe_hf.errors import ChronoError, StepError


def watched(config: ChronoConfig) -> ChronoSystem:
    return chronomoe_hf.system_of(chronomoe_hf.wrap(tiny_model("mixtral"), config).train())


def forward(system: ChronoSystem, seed: int = 0) -> int:
    """One training forward; returns its real tokens."""
    batch = tiny_batch("mixtral", seed=seed)
    system.model(**batch)
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


@pytest.mark.parametrize("step", [-1, 0, 1.5, True, "3", None, [1], float("nan")])
def test_what_is_no_step_number_is_refused_and_changes_nothing(step: Any) -> None:
    system = watched(ChronoConfig.balance(interval=1))
    forward(system)
    before = system.state_dict()
    with pytest.raises(StepError, match=r"an integer of 1 or more \(1 after the first\), got ") as caught:
        system.step(step)
    assert repr(step)[:20] in str(caught.value)
    assert isinstance(caught.value, ChronoError) and isinstance(caught.value, ValueError)
    assert system.state_dict()["meta"] == before["meta"] and not system.step_state.tokens_LE.any()
    snapshot = system.step(1)
    assert snapshot is not None and snapshot.layers[0].tokens > 0, "what was recorded is still there"


def test_a_repeated_step_closes_no_second_window(caplog: pytest.LogCaptureFixture) -> None:
    system = watched(ChronoConfig.observe(interval=2))
    tokens = forward(system)
    assert system.step(1) is None
    tokens += forward(system)
    first = system.step(2)
    assert first is not None and first.layers[0].tokens == tokens
    assert system.step(2) is None and system.step(2) is None
    assert sum("was called twice" in record.message for record in caplog.records) == 1
    assert system.last_snapshot is first and not system.alerts.active
    late = forward(system)
    assert system.step(2) is None
    late += forward(system)
    assert system.step(3) is None
    late += forward(system)
    third = system.step(4)
    assert third is not None and third.layers[0].tokens == late, "nothing recorded was lost"


def test_a_new_run_counts_from_1_again() -> None:
    system = watched(ChronoConfig.observe(interval=1))
    for _ in range(2):
        system.begin()
        for step in (1, 2):
            forward(system)
            assert system.step(step) is not None


def test_the_advice_for_a_plain_reload_comes_once_a_run(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    config = ChronoConfig.balance(interval=1)
    system = watched(config)
    for run in (1, 2):
        system.begin()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "chronomoe_hf"):
            for step in range(1, 7):
                forward(system, step)
                system.step(step)
                system.save(tmp_path / str(step))
        said = [record.message for record in caplog.records if "outside chronomoe_hf" in record.message]
        assert len(said) == 1, (run, said)
        assert "wrap(model, state=directory)" in said[0]


def test_an_interrupted_forward_lets_go_at_once() -> None:
    model = tiny_model("mixtral")
    chronomoe_hf.wrap(model, ChronoConfig.protect(interval=100))
    system, batch = chronomoe_hf.system_of(model), tiny_batch("mixtral")
    seen: list[int] = []

    def interrupt(*_: object) -> None:
        seen.append(len(system.layers[0].recorder.scope.tape.calls))
        raise KeyboardInterrupt

    hook = model.model.layers[-1].self_attn.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    hook.remove()
    scope = system.layers[0].recorder.scope
    assert seen == [1] and not scope.tape.calls and scope.mode == "off" and scope.mask_T is None
    system.step(1)
    assert not system.snapshot().layers[0].token_count


@pytest.mark.parametrize("next_call", ["step", "take_evaluation", "discard"])
def test_an_interrupted_forward_is_dropped_at_the_next_call(next_call: str) -> None:
    """torch calls no hook of a forward that Ctrl-C ends; its half is in no sum and its tensors are let go.

    An owner whose forward somebody has replaced on the instance is seen by hooks; any other one by its class, which
    lets go at once.
    """
    model = tiny_model("mixtral")
    model.model.forward = types.MethodType(type(model.model).forward, model.model)
    chronomoe_hf.wrap(model, ChronoConfig.protect(interval=100))
    system = chronomoe_hf.system_of(model)
    batch = tiny_batch("mixtral")
    scope = system.layers[0].recorder.scope

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[-1].self_attn.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    hook.remove()
    assert scope.tape.calls and scope.mode == "train", "bad test setup: nothing was left behind"
    getattr(system, next_call)(*([1] if next_call == "step" else []))
    assert not scope.tape.calls and not scope.tape.chunks and scope.mode == "off" and scope.mask_T is None
    assert not system.snapshot().layers[0].token_count
    model(**batch).loss.backward()
    system.step(2)
    assert system.snapshot().layers[0].calls == 1
