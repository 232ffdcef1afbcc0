"""Role vectors, directions and pairs of experts against a recount; off they do not exist, on they change nothing."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import models
from support.plans import keeping
from support.role_recount import RoleRecount, outputs_of

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import CheckpointConfig, CoherenceConfig
from chronomoe_hf.errors import ConfigError, StateCorruptError
from chronomoe_hf.export.cut_state import cut_state
from chronomoe_hf.recording.expert_sums import Reading
from chronomoe_hf.recording.role_sums import KEPT, WINDOW, RoleReading, RoleState

INTERVAL = 2


def watched(model: Any, *, roles: bool = True, interval: int = INTERVAL) -> Any:
    coherence = CoherenceConfig(roles=roles, max_tokens=None)
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=interval, coherence=coherence))
    return chronomoe_hf.system_of(model)


def kept_readings(system: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[int, RoleReading]]:
    found: list[dict[int, RoleReading]] = []
    own = RoleState.close

    def close(self: RoleState, *args: Any) -> dict[int, RoleReading]:
        found.append(own(self, *args))
        return found[-1]

    monkeypatch.setattr(RoleState, "close", close)
    return found


@pytest.mark.parametrize(
    ("family", "implementation", "top_k"),
    [("mixtral", "grouped_mm", 2), ("qwen3_moe", "batched_mm", 3), ("mixtral", "eager", 2), ("mixtral", "eager", 1)],
)
def test_roles_are_those_of_a_recount(
    family: str, implementation: str, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.tiny_model(family, num_experts_per_tok=top_k)
    model.set_experts_implementation(implementation)
    plain = copy.deepcopy(model)
    plain.set_experts_implementation("eager")
    system = watched(model)
    readings = kept_readings(system, monkeypatch)
    recounts: list[RoleRecount] = []
    open_window: list[list[Any]] = [[], []]
    for step in range(1, 3 * INTERVAL + 1):
        for micro in range(2):
            batch = models.tiny_batch(family, seed=10 * step + micro, padded=True)
            model(**batch).loss.backward()
            for layer, rows in enumerate(outputs_of(plain, batch)):
                open_window[layer] += rows
        if not recounts:
            states = [system.sums.roles.layers[layer] for layer in range(2)]
            recounts = [RoleRecount(state.direction_ED.tolist()) for state in states]
        system.step(step)
        if step % INTERVAL:
            continue
        for layer, recount in enumerate(recounts):
            recount.close(open_window[layer])
            reading, state = readings[-1][layer], system.sums.roles.layers[layer]
            assert reading.moments_EM[:, (0, 1, 5)].tolist() == [[row[i] for i in (0, 1, 5)] for row in recount.moments]
            np.testing.assert_allclose(reading.moments_EM, recount.moments, rtol=2e-3, atol=2e-2)
            np.testing.assert_allclose(reading.pairs_PEE[0], recount.together, rtol=1e-6)
            np.testing.assert_allclose(reading.pairs_PEE[1], recount.agreement, atol=1e-4)
            np.testing.assert_allclose(state.role_vectors(), recount.role_vectors(), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(state.direction_ED, recount.direction, atol=2e-3)
            np.testing.assert_allclose(reading.cosine_EE, recount.cosines(False), atol=1e-4)
            np.testing.assert_allclose(reading.centred_EE, recount.cosines(True), atol=1e-4)
            assert reading.updates_E.tolist() == recount.updates
            assert not any(each.any() for each in state.window()), "a closed window starts at zero"
        open_window = [[], []]
    assert len(readings) == 3 and min(recounts[0].updates) > 0, "bad test setup"
    if top_k > 1:
        assert np.triu(readings[-1][0].pairs_PEE[0], 1).any(), "bad test setup: no token is shared"


def test_the_direction_is_the_main_one_of_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """After some windows of one batch: the first eigenvector of the covariance of each expert's outputs."""
    model = models.tiny_model("mixtral")
    plain = copy.deepcopy(model)
    system = watched(model, interval=1)
    batch = models.tiny_batch("mixtral", batch=8, seed=3)
    for step in range(1, 61):
        model(**batch).loss.backward()
        system.step(step)
    state, found = system.sums.roles.layers[0], 0
    for expert in range(models.NUM_EXPERTS):
        rows = [y for ids, given in outputs_of(plain, batch)[0] for e, y in zip(ids, given, strict=True) if e == expert]
        values, vectors = np.linalg.eigh(np.cov(np.array(rows).T))
        if values[-2] < 0.8 * values[-1]:
            found += 1
            assert abs(float(vectors[:, -1] @ state.direction_ED[expert].numpy())) > 0.999
    assert found >= 3, "bad test setup: no expert has one main direction"


def test_off_there_is_nothing_and_on_no_bit_of_the_training_moves() -> None:
    losses, weights = [], []
    for roles in (False, True, None):
        torch.manual_seed(0)
        model = models.tiny_model("mixtral", attention_dropout=0.1)
        system = None if roles is None else watched(model, roles=roles)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(1)
        for step in range(1, 5):
            loss = model(**models.tiny_batch("mixtral", seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if system is not None:
                system.step(step)
        weights.append([value.detach().clone() for value in model.parameters()])
        if roles is False:
            assert system is not None and system.sums.roles is None and system.step_state.roles is None
            state = system.state_dict()
            assert not any("role" in name for name in state["tensors"]) and "roles" not in state["meta"]["lifecycle"]
            assert all("roles" not in layer for layer in system.last_snapshot.to_record()["layers"])
    assert torch.equal(torch.stack(losses[:4]), torch.stack(losses[4:8]))
    assert torch.equal(torch.stack(losses[:4]), torch.stack(losses[8:]))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*weights, strict=True))
    with pytest.raises(ConfigError, match="roles"):
        CoherenceConfig(enabled=False, roles=True)


def test_evaluation_adds_nothing_and_begin_forgets_the_open_window() -> None:
    model = models.tiny_model("mixtral")
    system = watched(model, interval=4)
    model(**models.tiny_batch("mixtral")).loss.backward()
    system.step(1)
    before = [each.clone() for each in system.sums.roles.layers[0].window()]
    model.eval()
    with torch.no_grad(), system.recording_eval():
        model(**models.tiny_batch("mixtral", seed=1))
    assert system.take_evaluation() is not None
    after = system.sums.roles.layers[0].window()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and before[0].any()
    system.begin()
    assert not any(each.any() for each in system.sums.roles.layers[0].window())


def run(steps: range, system: Any, model: Any) -> None:
    for step in steps:
        model(**models.tiny_batch("mixtral", seed=step)).loss.backward()
        system.step(step)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Saved in the middle of a window, loaded into a new system: tensors, records and proposals."""
    model = models.tiny_model("mixtral")
    system = watched(model, interval=4)
    run(range(1, 7), system, model)
    system.save(tmp_path)
    run(range(7, 13), system, model)
    again = models.tiny_model("mixtral")
    other = watched(again, interval=4)
    other.load(tmp_path)
    run(range(7, 13), other, again)
    one, two = system.state_dict(), other.state_dict()
    assert set(one["tensors"]) == set(two["tensors"])
    assert {name.rpartition(".")[2] for name in one["tensors"] if name.startswith("role.0.")} == {*KEPT, *WINDOW}
    assert all(torch.equal(value, two["tensors"][name]) for name, value in one["tensors"].items())
    assert one["meta"]["lifecycle"] == two["meta"]["lifecycle"]
    mine, its = (each.last_snapshot.to_record()["layers"] for each in (system, other))
    assert [layer["roles"] for layer in mine] == [layer["roles"] for layer in its]
    assert system.sums.roles.layers[0].updates_E.max() == 3


def test_states_with_and_without_roles_load_into_each_other(tmp_path: Path) -> None:
    with_roles, without = models.tiny_model("mixtral"), models.tiny_model("mixtral")
    one, two = watched(with_roles), watched(without, roles=False)
    run(range(1, 6), one, with_roles)
    run(range(1, 6), two, without)
    one.save(tmp_path / "on")
    two.save(tmp_path / "off")
    with pytest.warns(UserWarning, match=r"the roles of experts \(coherence.roles is False\)"):
        two.load(tmp_path / "on")
    assert two.step_state.roles is None and two.global_step == 5
    with pytest.warns(UserWarning, match="coherence.roles"):
        one.load(tmp_path / "off")
    assert one.sums.roles.layers == {} and one.lifecycle.roles.standing == {}
    run(range(6, 9), one, with_roles)
    assert one.last_snapshot.layers[0].roles is not None


def test_layers_that_agree_bring_their_roles_but_not_their_open_window(tmp_path: Path) -> None:
    model, more = models.tiny_model("mixtral"), models.tiny_model("mixtral", num_hidden_layers=3)
    system = watched(model)
    run(range(1, 4), system, model)
    system.save(tmp_path)
    coherence = CoherenceConfig(roles=True, max_tokens=None)
    config = ChronoConfig.observe(
        interval=INTERVAL, coherence=coherence, checkpoint=CheckpointConfig(allow_partial=True, other_weights="warn")
    )
    other = chronomoe_hf.system_of(chronomoe_hf.wrap(more, config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load(tmp_path)
    assert set(other.sums.roles.layers) == {0, 1}
    for layer, state in other.sums.roles.layers.items():
        own = system.sums.roles.layers[layer]
        assert all(torch.equal(getattr(state, name), getattr(own, name)) for name in KEPT)
        assert own.sum_ED.any() and not any(each.any() for each in state.window())


def test_a_cut_state_leaves_the_roles_behind() -> None:
    model = models.tiny_model("mixtral")
    system = watched(model)
    run(range(1, 4), system, model)
    state = system.state_dict()
    tensors, meta = cut_state(state["tensors"], state["meta"], keeping(model, [list(range(6)), list(range(2, 8))]))
    small = models.tiny_model("mixtral", num_local_experts=6)
    other = watched(small)
    other.load_state_dict({"tensors": tensors, "meta": meta})
    assert other.global_step == 3 and other.sums.roles.layers == {}
    run(range(4, 6), other, small)
    assert other.last_snapshot.layers[0].roles is not None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: tensors.pop("role.0.mean_ED"),
        lambda tensors: tensors.update({"role.7.mean_ED": torch.zeros(8, 32)}),
        lambda tensors: tensors.update({"role.0.more_E": torch.zeros(8)}),
        lambda tensors: tensors.update({"role.0.mean_ED": torch.full((8, 32), float("nan"))}),
        lambda tensors: tensors.update({"role.0.sum_ED": torch.zeros(8, 31)}),
        lambda tensors: tensors.update({"role.0.updates_E": torch.zeros(8)}),
        lambda tensors: tensors.update({"role.0.updates_E": torch.full((8,), -1)}),
    ],
)
def test_a_state_with_bad_roles_is_refused_and_changes_nothing(spoil: Any) -> None:
    model = models.tiny_model("mixtral")
    system = watched(model)
    run(range(1, 4), system, model)
    state = system.state_dict()
    state["tensors"] = dict(state["tensors"])
    spoil(state["tensors"])
    before = system.state_dict()["tensors"]
    with pytest.raises(StateCorruptError, match=r"role"):
        system.load_state_dict(state)
    after = system.state_dict()["tensors"]
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def reading_of(rows_SKD: torch.Tensor, index_SK: torch.Tensor, num_experts: int) -> Reading:
    """Rows of one layer, all of them valid."""
    hit_GAE = index_SK.flatten()[None, :, None] == torch.arange(num_experts)
    output_GED = torch.zeros(1, num_experts, rows_SKD.shape[-1])
    output_GED[0].index_add_(0, index_SK.flatten(), rows_SKD.flatten(0, 1).float())
    return Reading(rows_SKD[None].clone(), hit_GAE, None, output_GED, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scaled_rows_are_divided_out_and_dtypes_agree(dtype: torch.dtype) -> None:
    """The same outputs, once as they are and once multiplied with weights, as a block with one expert gives them."""
    generator = torch.Generator().manual_seed(0)
    rows_SKD = torch.randn(40, 1, 16, generator=generator, dtype=torch.float64).to(dtype)
    index_SK = torch.randint(0, 4, (40, 1), generator=generator)
    gain_GSK = torch.full((1, 40, 1), 4.0)
    states = []
    for gain in (None, gain_GSK):
        state = RoleState([4])
        reading = reading_of(rows_SKD, index_SK, 4)
        if gain is not None:
            reading = reading._replace(gain_GSK=gain, rows_GSKD=reading.rows_GSKD / 4)
        state.add([0], reading)
        states.append(state.layers[0])
    for one, other in zip(states[0].window(), states[1].window(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)
    assert states[0].table_EM[:, 0].tolist() == torch.bincount(index_SK.flatten(), minlength=4).tolist()
