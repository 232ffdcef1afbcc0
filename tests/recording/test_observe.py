"""Counts equal a plain recount of what the routers chose; phi equals its definition written out in plain Python."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from support import models as tiny
from support.guards import NoHost
from support.oracles import Recount, naive_phi, train_step

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import CoherenceConfig
from chronomoe_hf.recording.rows import sample_tokens

FIRST_CLASS = sorted(tiny.FAMILIES)
EXACT = CoherenceConfig(max_tokens=None)


def counts(system: Any) -> list[list[int]]:
    return [layer.expert_token_counts for layer in system.snapshot().layers]


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "ac", "ac-reentrant"])
@pytest.mark.parametrize("family", FIRST_CLASS)
def test_counts_equal_a_recount(family: str, checkpointing: bool | None) -> None:
    """Padding, accumulation 3, activation checkpointing, evaluation in the middle, no-grad forwards, generate."""
    model = tiny.tiny_model(family, **({"expert_capacity": 2} if family == "switch_transformers" else {}))
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    chronomoe_hf.wrap(model, ChronoConfig.observe())
    system = chronomoe_hf.system_of(model)
    recount = Recount(model, family)
    for step in (1, 2):
        for micro in range(3):
            train_step(model, tiny.tiny_batch(family, seed=10 * step + micro, padded=True), recount)
        recount.enabled = False
        batch = tiny.tiny_batch(family, seed=99)
        model.eval()
        with torch.no_grad():
            model(**batch)
            if family != "switch_transformers":
                model.generate(batch["input_ids"], max_new_tokens=3, do_sample=False)
        model.train()
        with torch.no_grad():
            model(**batch)  # TRL's label smoothing does this in training mode
        recount.enabled = True
        assert system.step(step) is None
    assert counts(system) == recount.lists()
    assert sum(map(sum, recount.lists())) > 0, "bad test setup"
    for layer, dropped in zip(system.snapshot().layers, recount.dropped, strict=True):
        assert layer.tokens == 2 * 3 * (4 * 16 - 6)
        assert layer.dropped == dropped
    if family == "switch_transformers":
        assert sum(recount.dropped) > 0, "bad test setup: capacity never dropped anything"


@pytest.mark.parametrize("family", [f for f in FIRST_CLASS if f != "switch_transformers"])
def test_generation_is_recorded_apart_and_masked(family: str) -> None:
    model = tiny.tiny_model(family, train=False)
    chronomoe_hf.wrap(model, ChronoConfig.observe())
    system = chronomoe_hf.system_of(model)
    batch = tiny.tiny_batch(family)
    mask = batch["attention_mask"].clone()
    mask[0, :5] = 0  # left padding, as generation wants it
    with system.recording_eval():
        model.generate(batch["input_ids"], attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    snapshot = system.take_evaluation()
    assert snapshot is not None and snapshot.mode == "EVAL"
    prefill, decoded = 4 * 16 - 5, 4 * 3
    assert [layer.tokens for layer in snapshot.layers] == [prefill + decoded] * 2
    assert [sum(layer.expert_token_counts) for layer in snapshot.layers] == [2 * (prefill + decoded)] * 2
    assert counts(system) == [[0] * 8] * 2, "training statistics must not see it"
    assert system.take_evaluation() is None


# ---- phase coherence ---------------------------------------------------------------------------------------------


def expert_outputs(model: Any, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[T, K, D] unweighted outputs of a Mixtral-like experts module, from its weights alone."""
    experts = model.model.layers[0].mlp.experts
    rows = []
    for state, chosen in zip(hidden, index.tolist(), strict=True):
        row = []
        for e in chosen:
            gate, up = (experts.gate_up_proj[e] @ state).chunk(2)
            row.append(experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("reference", ["leave_one_out", "mixture"])
@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("num_k", [1, 2, 3])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_phi_equals_the_definition(family: str, num_k: int, backend: str, reference: str) -> None:
    model = tiny.tiny_model(family, num_experts_per_tok=num_k)
    model.set_experts_implementation(backend)
    config = ChronoConfig.observe(coherence=CoherenceConfig(max_tokens=None, reference=reference))
    chronomoe_hf.wrap(model, config)
    system = chronomoe_hf.system_of(model)
    seen: dict[str, Any] = {}
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda m, args: seen.update(args=args))
    batch = tiny.tiny_batch(family, padded=True)
    model(**batch).loss.backward()
    hidden, index, weights = (t.detach() for t in seen["args"])
    real = [bool(v) for v in batch["attention_mask"].flatten().tolist()]
    with torch.no_grad():
        outputs = expert_outputs(model, hidden, index)
    effective = "mixture" if num_k == 1 else reference
    want, saliency = naive_phi(outputs.tolist(), weights.tolist(), index.tolist(), real, effective)
    system.step(1)
    states = system.coherence(0).snapshot(1)
    layer = system.snapshot().layers[0]
    assert len(want) >= 6, "bad test setup: too few experts used"
    for e in range(8):
        if e not in want:
            assert states[e].phi_raw is None
            continue
        assert states[e].phi_raw == pytest.approx(want[e], abs=1e-5)
        assert states[e].phi_fast == pytest.approx(want[e], abs=1e-5), "a first update is bias-corrected"
        assert layer.contribution[e] == pytest.approx(saliency[e], rel=1e-5)
        assert layer.saliency[e] == pytest.approx(saliency[e] / layer.expert_token_counts[e], rel=1e-5)
        assert layer.phi_rows[e] == layer.expert_token_counts[e]


def test_phi_of_switch_uses_the_mixture_and_skips_dropped_tokens() -> None:
    model = tiny.tiny_model("switch_transformers", expert_capacity=2)
    chronomoe_hf.wrap(model, ChronoConfig.observe(coherence=EXACT))
    system = chronomoe_hf.system_of(model)
    seen: dict[str, Any] = {}
    experts = system.layers[0].experts
    experts.register_forward_pre_hook(lambda m, args: seen.update(args=args))
    batch = tiny.tiny_batch("switch_transformers", padded=True)
    model(**batch).loss.backward()
    hidden, mask, weights = (t.detach() for t in seen["args"])
    real = [bool(v) for v in batch["attention_mask"].flatten().tolist()]
    kept = [ok and bool(row.sum()) for ok, row in zip(real, mask[:, 0], strict=True)]
    index = mask[:, 0].argmax(-1, keepdim=True).tolist()
    with torch.no_grad():
        outputs = [[experts[f"expert_{i[0]}"](h[None])[0].tolist()] for h, i in zip(hidden, index, strict=True)]
    want, _ = naive_phi(outputs, weights.tolist(), index, kept, "mixture")
    assert 0 < sum(kept) < sum(real), "bad test setup: nothing was dropped"
    system.step(1)
    states = system.coherence(0).snapshot(1)
    for e, value in want.items():
        assert states[e].phi_raw == pytest.approx(value, abs=1e-5)


def test_phi_is_the_token_weighted_mean_over_micro_batches() -> None:
    model = tiny.tiny_model("mixtral")
    chronomoe_hf.wrap(model, ChronoConfig.observe(coherence=EXACT))
    system = chronomoe_hf.system_of(model)
    singles = []
    for micro, length in enumerate((16, 5)):
        twin = copy.deepcopy(model)
        model(**tiny.tiny_batch("mixtral", seed=micro, length=length)).loss.backward()
        twin(**tiny.tiny_batch("mixtral", seed=micro, length=length)).loss.backward()
        other = chronomoe_hf.system_of(twin)
        if micro == 0:
            other.step(1)
        else:
            other.discard()
            twin(**tiny.tiny_batch("mixtral", seed=micro, length=length)).loss.backward()
            other.step(1)
        singles.append((other.coherence(0).snapshot(1), other.snapshot().layers[0].expert_token_counts))
    system.step(1)
    both = system.coherence(0).snapshot(1)
    compared = 0
    for e in range(8):
        parts = [(s[e].phi_raw, n[e]) for s, n in singles if n[e]]
        if not parts:
            continue
        want = sum(p * n for p, n in parts) / sum(n for _, n in parts)
        assert both[e].phi_raw == pytest.approx(want, abs=1e-6)
        compared += len(parts) == 2
    assert compared >= 4, "bad test setup"


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
def test_a_row_cap_reads_fewer_rows_says_so_and_stays_close(backend: str) -> None:
    model = tiny.tiny_model("mixtral")
    model.set_experts_implementation(backend)
    exact = copy.deepcopy(model)
    chronomoe_hf.wrap(model, ChronoConfig.observe(coherence=CoherenceConfig(max_tokens=64)))
    chronomoe_hf.wrap(exact, ChronoConfig.observe(coherence=EXACT))
    layers = []
    for one in (model, exact):
        batch = tiny.tiny_batch("mixtral", batch=16, length=64, padded=True)
        one(**batch).loss.backward()
        system = chronomoe_hf.system_of(one)
        system.step(1)
        layers.append(system.snapshot().layers[0])
    capped, full = layers
    assert sum(capped.phi_rows) == 64 * 2 and sum(full.phi_rows) == sum(full.expert_token_counts)
    total = sum(capped.contribution), sum(full.contribution)
    assert total[0] == pytest.approx(total[1], rel=0.15)


@pytest.mark.parametrize(("backend", "auto"), [("eager", 64), ("grouped_mm", 256)])
def test_a_written_number_of_tokens_is_what_is_read_and_auto_reads_fewer_of_a_replay(backend: str, auto: int) -> None:
    if Version(transformers.__version__) < Version("5.20"):
        auto = 64  # rows cannot be read there yet: outputs are replayed on every backend
    for written, read in ((256, 256), (200, 200), ("auto", auto), (8, 8)):
        model = tiny.tiny_model("mixtral")
        model.set_experts_implementation(backend)
        chronomoe_hf.wrap(model, ChronoConfig.observe(coherence=CoherenceConfig(max_tokens=written)))
        model(**tiny.tiny_batch("mixtral", batch=16, length=64)).loss.backward()
        system = chronomoe_hf.system_of(model)
        system.step(1)
        for layer in system.snapshot().layers:
            assert sum(layer.phi_rows) == read * 2


# ---- samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("real", [0, 1, 5, 8, 9, 40])
def test_samples_are_distinct_real_tokens_spread_over_the_call(real: int) -> None:
    mask = torch.zeros(50, dtype=torch.bool)
    mask[torch.randperm(50)[:real]] = True
    sample = sample_tokens(mask, 50, 8, torch.device("cpu"))
    chosen = sample.position_S[sample.valid_S].tolist()
    assert len(chosen) == len(set(chosen)) == min(real, 8)
    assert all(mask[p] for p in chosen)
    assert float(sample.scale) == pytest.approx(max(real, 8) / 8)
    everything = sample_tokens(mask, 50, None, torch.device("cpu"))
    assert everything.position_S is None and torch.equal(everything.valid_S, mask)


# ---- faults ------------------------------------------------------------------------------------------------------


def test_non_finite_tokens_are_left_out_and_alerted() -> None:
    model = tiny.tiny_model("mixtral")
    chronomoe_hf.wrap(model, ChronoConfig(interval=1))
    system = chronomoe_hf.system_of(model)
    hidden = model.model.layers[0].mlp
    bad = {"on": True}

    def poison(module: Any, args: Any) -> Any:
        if not bad["on"]:
            return None
        states = args[0].clone()
        states[0, :3] = float("nan")
        return (states,)

    hidden.register_forward_pre_hook(poison)
    batch = tiny.tiny_batch("mixtral")
    model(**batch)
    snapshot = system.step(1)
    assert snapshot is not None
    layer = snapshot.layers[0]
    assert layer.nonfinite_tokens == 3
    assert sum(layer.expert_token_counts) == 2 * (64 - 3)
    assert torch.isfinite(system.step_state.ema_CLE).all() and torch.isfinite(system.step_state.beta_LE).all()
    assert {a.kind for a in snapshot.alerts} >= {"NON_FINITE"}
    bad["on"] = False
    model(**batch)
    again = system.step(2)
    assert again is not None
    assert ("NON_FINITE", "cleared") in {(a.kind, a.state) for a in again.alerts if a.layer_id == 0}


def test_a_router_that_is_never_called_is_reported() -> None:
    model = tiny.tiny_model("mixtral")
    chronomoe_hf.wrap(model, ChronoConfig(interval=1))
    system = chronomoe_hf.system_of(model)
    snapshot = system.step(1)
    assert snapshot is not None
    assert sorted(a.layer_id for a in snapshot.alerts if a.kind == "NOT_OBSERVED") == [0, 1]


def test_counts_do_not_round_beyond_what_a_float32_can_count() -> None:
    model = tiny.tiny_model("mixtral")
    chronomoe_hf.wrap(model, ChronoConfig.observe())
    system = chronomoe_hf.system_of(model)
    sums_LR = system.sums.on("train", torch.device("cpu"))
    sums_LR[0, 0] += 2**24
    model(**tiny.tiny_batch("mixtral")).loss.backward()
    before = int(sums_LR[0, 0])
    assert sums_LR.dtype == torch.float64
    system.step(1)
    assert system.snapshot().layers[0].expert_token_counts[0] == before > 2**24


# ---- no transfer to the host ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["observe", "protect", "balance"])
def test_no_value_reaches_the_host_between_snapshots(preset: str) -> None:
    model = tiny.tiny_model("mixtral")
    config = ChronoConfig.preset(preset, interval=4)
    chronomoe_hf.wrap(model, config)
    system = chronomoe_hf.system_of(model)
    batch = tiny.tiny_batch("mixtral", padded=True)
    for step in range(1, 5):  # beta acts from the first closed window on
        model(**batch).loss.backward()
        system.step(step)
    hidden = torch.randn(4, 16, 32, requires_grad=True)
    block = model.model.layers[0].mlp
    window = system.layers[0].recorder.scope
    model.set_experts_implementation("grouped_mm")
    for step in (5, 6, 7):
        with NoHost() as guard:
            window.open(True, (), {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
            block(hidden).sum().backward()
            window.close()
            assert system.step(step) is None
        assert guard.calls > 100, "bad test setup: the guard saw nothing"
    with pytest.raises(AssertionError, match="reads the device"), NoHost():
        system.step_state.beta_LE.sum().item()
