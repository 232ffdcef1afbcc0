"""What wrapping adds on an accelerator: launches, host reads and memory, counted on a pretend device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import models as tiny
from support import phantom

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoSystem
from chronomoe_hf.config import CoherenceConfig
from chronomoe_hf.recording import tape

INTERVAL = 4
FAST = ("qwen3_moe",)
FAMILIES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in sorted(tiny.FAMILIES)]
# A layer and micro-batch over the untouched model, and what comes once per micro-batch: the promise of the README.
A_LAYER = {"observe": 12, "protect": 25, "balance": 16}
FIXED, A_STEP = 150, 60
DRIFT = 6  # when a window closes, with LifecycleConfig(router_drift=True)
ROLES = 36  # a micro-batch, with CoherenceConfig(roles=True)


def counted(
    family: str, preset: str | None, layers: int, *, last_step: bool = False, **coherence: Any
) -> dict[str, Any]:
    """Launches, host reads and uploads of one micro-batch, and of one step, with governance acting.

    Between windows; or in the last step of one, in which the lens's reader is fitted and whose step closes the window.
    """
    switch, hits = family == "switch_transformers", []
    if switch:
        # Its experts launch one by one, those that have a token. So that these are the same ones in every run: all.
        depth = {"num_layers": 2 * layers, "num_sparse_encoder_layers": layers, "num_experts": 4}
    else:
        depth = {"num_hidden_layers": layers}
        if "layer_types" in tiny.FAMILIES[family][2]:
            depth["layer_types"] = ["full_attention"] * layers
    with phantom.device():
        model = tiny.tiny_model(family, **depth)
        if switch:
            for module in model.modules():
                if type(module).__name__ == "SwitchTransformersExperts":
                    module.register_forward_hook(lambda _, given, out: hits.append(every_expert(given[1])))
        else:
            model.set_experts_implementation("grouped_mm")
        phantom.to_device(model)
        size = {"batch": 8, "length": 64} if switch else {}
        batch = phantom.to_device(tiny.tiny_batch(family, padded=True, **size))
        system: ChronoSystem | None = None
        if preset is not None:
            config = ChronoConfig.preset(preset, interval=INTERVAL, coherence=CoherenceConfig(**coherence))
            chronomoe_hf.wrap(model, config)
            system = chronomoe_hf.system_of(model)
            for step in range(1, (2 * INTERVAL if last_step else INTERVAL + 1)):
                model(**batch).loss.backward()
                system.step(step)
            assert system.switches.router_input == (last_step and preset == "protect"), "bad test setup"
        hits.clear()
        model.zero_grad()  # a gradient that is there already costs a launch more
        with phantom.counting() as micro:
            model(**batch).loss.backward()
        with phantom.counting() as stepping:
            if system is not None and not last_step:
                assert system.step(INTERVAL + 1) is None, "bad test setup: a window closed"
                assert preset == "observe" or any(layer.handle.state.beta_on for layer in system.layers)
    assert all(hits) and switch == bool(hits), "bad test setup: an expert without a token launches nothing"
    reads = sum(micro.reads.values())
    return {
        "launches": micro.total,
        "reads": reads,
        "uploads": sum(micro.uploads.values()),
        "step": stepping.total,
        "step_reads": sum(stepping.reads.values()) + sum(stepping.uploads.values()),
    }


def every_expert(mask: Any) -> bool:
    """Whether every expert has a token, by a dispatch mask ``[T, 1, E]`` on the pretend device; counts nothing."""
    return bool(mask.host.reshape(-1, mask.shape[-1]).any(0).all())


@pytest.mark.parametrize("preset", ["observe", "protect", "balance"])
@pytest.mark.parametrize("family", FAMILIES)
def test_launches_stay_within_the_budget_and_nothing_reads_the_host(family: str, preset: str) -> None:
    few, many = 2, 4
    plain = {layers: counted(family, None, layers) for layers in (few, many)}
    mine = {layers: counted(family, preset, layers) for layers in (few, many)}
    added = {layers: mine[layers]["launches"] - plain[layers]["launches"] for layers in (few, many)}
    a_layer = (added[many] - added[few]) / (many - few)
    fixed = added[few] - few * a_layer
    scopes = 2 if family == "switch_transformers" else 1  # an encoder and a decoder, each with a scope of its own
    assert 0 < a_layer <= A_LAYER[preset], (a_layer, fixed)
    assert fixed <= FIXED * scopes, (a_layer, fixed)
    for layers in (few, many):
        if family != "switch_transformers":  # its experts read the host for every expert that has a token
            assert mine[layers]["reads"] == plain[layers]["reads"]
        assert mine[layers]["uploads"] == plain[layers]["uploads"]
        assert mine[layers]["step_reads"] == 0
        assert mine[layers]["step"] <= A_STEP
    assert mine[few]["step"] == mine[many]["step"], "a step costs the same whatever the number of layers"


@pytest.mark.parametrize(
    "family", [each for each in FAMILIES if "switch_transformers" not in getattr(each, "values", ())]
)
def test_the_last_step_of_a_window_fits_the_reader_within_the_budget(family: str) -> None:
    few, many = 2, 4
    added = {
        layers: counted(family, "protect", layers, last_step=True)["launches"]
        - counted(family, None, layers)["launches"]
        for layers in (few, many)
    }
    a_layer = (added[many] - added[few]) / (many - few)
    between = counted(family, "protect", few)["launches"] - counted(family, None, few)["launches"]
    assert between < added[few], "bad test setup: nothing was fitted"
    assert a_layer <= A_LAYER["protect"] and added[few] - few * a_layer <= FIXED, (a_layer, added)


def test_roles_cost_what_the_docs_say_and_read_no_host() -> None:
    off = {layers: counted("qwen3_moe", "observe", layers) for layers in (2, 4)}
    on = {layers: counted("qwen3_moe", "observe", layers, roles=True) for layers in (2, 4)}
    added = {layers: on[layers]["launches"] - off[layers]["launches"] for layers in (2, 4)}
    assert added[2] == added[4] == ROLES, "layers of one shape are summed together"
    for layers in (2, 4):
        assert {**on[layers], "launches": 0} == {**off[layers], "launches": 0}, "reads, uploads and steps are the same"


@pytest.mark.parametrize("top_k", [1, 2])
def test_roles_on_the_device_are_those_of_the_cpu(top_k: int) -> None:
    """A device sums with matrix products, a CPU row by row."""
    found = []
    with phantom.device():
        for place in (phantom.to_device, lambda value: value):
            model = tiny.tiny_model("mixtral", num_experts_per_tok=top_k)
            model.set_experts_implementation("grouped_mm" if top_k > 1 else "eager")
            coherence = CoherenceConfig(roles=True, max_tokens=40)
            chronomoe_hf.wrap(place(model), ChronoConfig.observe(interval=2, coherence=coherence))
            system = chronomoe_hf.system_of(model)
            for step in range(1, 6):
                model(**place(tiny.tiny_batch("mixtral", seed=step, padded=True))).loss.backward()
                system.step(step)
            tensors = {n: v.cpu() for n, v in system.state_dict()["tensors"].items() if n.startswith("role.")}
            found.append((tensors, [layer.roles for layer in system.last_snapshot.layers]))
    assert found[0][0]["role.1.updates_E"].max() == 2 and found[0][0]["role.1.sum_ED"].any(), "bad test setup"
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], rtol=1e-2, atol=1e-2)
    for mine, its in zip(found[0][1], found[1][1], strict=True):
        assert mine["history"] == its["history"]
        assert mine["free_energy"]["total"] == pytest.approx(its["free_energy"]["total"], rel=1e-4)
        assert [pair["first"] for pair in mine["pairs"]] == [pair["first"] for pair in its["pairs"]]


def test_reading_every_fourth_micro_batch_costs_a_quarter_of_the_readings() -> None:
    read, skipped = counted("qwen3_moe", "observe", 2, every=1), counted("qwen3_moe", "observe", 2, every=4)
    assert skipped["launches"] < read["launches"] - 20


def test_sums_stay_estimates_when_only_every_second_micro_batch_is_read() -> None:
    model = tiny.tiny_model("mixtral")
    every = copy.deepcopy(model)
    chronomoe_hf.wrap(model, ChronoConfig.observe())
    chronomoe_hf.wrap(every, ChronoConfig.observe(coherence=CoherenceConfig(every=2)))
    system, other = chronomoe_hf.system_of(model), chronomoe_hf.system_of(every)
    read = 0
    for step in range(1, 4):
        batch = tiny.tiny_batch("mixtral", seed=0)
        for one, each in ((model, system), (every, other)):
            for _ in range(2):  # the same batch twice: one of both is read, and counts for two
                one(**batch).loss.backward()
            each.step(step)
        got, want = other.snapshot().layers[0], system.snapshot().layers[0]
        assert got.expert_token_counts == want.expert_token_counts, "counting is not sampled"
        assert got.contribution == pytest.approx(want.contribution, rel=1e-5)
        assert got.phi_fast == pytest.approx(want.phi_fast, abs=1e-5)
        assert 2 * sum(got.phi_rows) == sum(want.phi_rows)
        read += sum(got.phi_rows)
    assert read > 0, "bad test setup"


def test_router_drift_costs_nothing_between_windows_and_little_when_one_closes() -> None:
    found = {}
    for on, layers in ((False, 2), (True, 2), (True, 4)):
        with phantom.device():
            model = phantom.to_device(tiny.tiny_model("qwen3_moe", num_hidden_layers=layers))
            model.set_experts_implementation("grouped_mm")
            config = ChronoConfig.observe(interval=2, lifecycle__router_drift=on)
            system = chronomoe_hf.system_of(chronomoe_hf.wrap(model, config))
            parts = []
            for step in (1, 2):
                with phantom.counting() as forward:
                    model(**phantom.to_device(tiny.tiny_batch("qwen3_moe", padded=True))).loss.backward()
                with phantom.counting() as stepping:
                    snapshot = system.step(step)
                moved = sum(stepping.reads.values()), sum(stepping.uploads.values())
                parts.append((forward.total, stepping.total, *moved))
            assert snapshot is not None and (snapshot.layers[0].router_drift == [0.0] * 8) == on
            found[on, layers] = parts
    assert found[True, 2][0] == found[False, 2][0], "the same launches, reads and uploads"
    added = [mine - other for mine, other in zip(found[True, 2][1], found[False, 2][1], strict=True)]
    assert added == [0, DRIFT, 1, 1]
    assert found[True, 4][1][1:] == found[True, 2][1][1:], "layers of one shape are compared together"


def test_two_runs_on_the_device_give_the_same_bits() -> None:
    rows = []
    with phantom.device():
        for _ in range(2):
            model = tiny.tiny_model("mixtral")
            model.set_experts_implementation("grouped_mm")
            chronomoe_hf.wrap(phantom.to_device(model), ChronoConfig(interval=2))
            system = chronomoe_hf.system_of(model)
            for step in (1, 2, 3):
                model(**phantom.to_device(tiny.tiny_batch("mixtral", seed=step, padded=True))).loss.backward()
                system.step(step)
            rows.append([value.cpu() for value in system.step_state.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*rows, strict=True))
    assert any(value.any() for value in rows[0])


def no_atomics(model: Any, batch: Any) -> set[str]:
    with phantom.counting() as seen:
        model(**batch)
    return set(seen.launches)


def test_no_float_sum_depends_on_the_order_in_which_a_device_adds() -> None:
    """The only scatter that adds has whole numbers in float64; what a GPU would add in any order is not used."""
    with phantom.device():
        model = phantom.to_device(tiny.tiny_model("mixtral"))
        model.set_experts_implementation("grouped_mm")
        batch = phantom.to_device({k: v for k, v in tiny.tiny_batch("mixtral").items() if k != "labels"})
        plain = no_atomics(model, batch)
        chronomoe_hf.wrap(model, ChronoConfig.observe(coherence=CoherenceConfig(roles=True)))
        mine = no_atomics(model, batch) - plain
    assert "scatter_add_" in mine, "bad test setup: nothing was counted"
    assert not mine & {"index_add_", "index_put_", "scatter_reduce_", "_index_put_impl_", "bincount", "histc"}


@pytest.mark.parametrize("limit", [2**14, 2**17])
def test_small_chunks_give_the_same_sums(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of few layers, and pieces of one layer that is too large by itself."""
    snapshots = []
    for each in (2**40, limit):
        monkeypatch.setattr(tape, "LIMIT", each)
        model = tiny.tiny_model("mixtral", num_hidden_layers=5)
        chronomoe_hf.wrap(model, ChronoConfig(interval=1))
        system = chronomoe_hf.system_of(model)
        for step in (1, 2):
            model(**tiny.tiny_batch("mixtral", batch=8, length=64, seed=step, padded=True)).loss.backward()
            snapshots.append(system.step(step))
    for got, want in zip(snapshots[2:], snapshots[:2], strict=True):
        for one, other in zip(got.layers, want.layers, strict=True):
            assert (one.expert_token_counts, one.tokens, one.calls) == (
                other.expert_token_counts,
                other.tokens,
                other.calls,
            )
            assert one.prob_mean == pytest.approx(other.prob_mean, abs=1e-6)
            assert one.phi_fast == pytest.approx(other.phi_fast, abs=1e-6)
            assert one.disagreement_js == pytest.approx(other.disagreement_js, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 6])
def test_memory_is_bounded_at_a_large_shape(layers: int) -> None:
    """T 8192, E 128, k 8, D 2048 in bf16: what recording holds at its peak, with the model's own tensors left out."""
    from types import SimpleNamespace

    from chronomoe_hf.recording.recorder import LayerRecorder
    from chronomoe_hf.recording.scope import ForwardScope, Switches
    from chronomoe_hf.recording.totals import Sums
    from chronomoe_hf.router.state import Routing

    tokens, experts, k, width = 8192, 128, 8, 2048
    adapter = SimpleNamespace(distribution=lambda router, z: z.softmax(-1))
    router: Any = SimpleNamespace(adapter=adapter)
    sums = Sums(layers, experts)
    scope = ForwardScope(Switches(router_input=True), ("input_ids", "attention_mask"), None, sums)
    recorders = [LayerRecorder(i, experts, scope, sums, CoherenceConfig(), input_width=width) for i in range(layers)]
    ids = torch.ones(8, tokens // 8, dtype=torch.long)
    with phantom.device() as seen:
        put = phantom.to_device
        rows_AD = put(torch.randn(1, width).expand(tokens * k, width).bfloat16().contiguous())
        hidden_TD = put(torch.randn(tokens, width).bfloat16())
        for recorder in recorders:
            recorder.to_(hidden_TD.device)
        scope.open(True, (put(ids), put(ids)), {})
        before = phantom._Block.alive
        for recorder in recorders:
            logits_TE = put(torch.randn(tokens, experts).bfloat16())
            index_TK = put(torch.rand(tokens, experts).topk(k).indices)
            weight_TK = put(torch.rand(tokens, k).bfloat16())
            sample = recorder.sample(tokens, rows_AD.device)
            recorder.router_input(hidden_TD)
            recorder.outputs(rows_AD, recorder.slots(sample, k, rows_AD.device), sample, weight_TK, index_TK)
            beta_E = put(torch.randn(experts) * 0.1)
            recorder.routing(router, Routing(logits_TE, index_TK), index_TK, beta_E)
            del logits_TE, index_TK, weight_TK
        scope.close()
        peak = seen.peak + seen.start - before
    assert all(float(recorder.inputs.cpu()[-4]) == tokens for recorder in recorders), "bad test setup"
    assert peak <= (64 + 3 * layers) * 2**20, f"{peak / 2**20:.1f} MB"
    assert float(sums.on("train", torch.device("phantom", 0)).cpu()[:, :experts].sum()) == layers * tokens * k
