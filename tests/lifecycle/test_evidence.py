"""Evidence from a live system and from its records: the same numbers, recounted here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from support.plans import digest

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import CoherenceConfig
from chronomoe_hf.errors import EvidenceError, LifecycleError
from chronomoe_hf.lifecycle import Evidence, FisherSums, calibrate, plan_prune

INTERVAL = 2


def trained(output_dir: Path | None, steps: int = 5, **config: Any) -> Any:
    """A few recorded steps on padded batches; weights do not move, so that a recount can repeat them."""
    model = chronomoe_hf.wrap(models.tiny_model("mixtral"), ChronoConfig.observe(interval=INTERVAL, **config))
    system = chronomoe_hf.system_of(model)
    system.begin()
    if output_dir is not None:
        system.open_telemetry(output_dir)
    for step in range(1, steps + 1):
        model(**models.tiny_batch("mixtral", seed=step, padded=True)).loss.backward()
        system.step(step)
    return model, system


class Recounted:
    """Per layer and expert: assignments, sum of gate * |output|, of gates and of |output|."""

    def __init__(self) -> None:
        self.counts = [[0] * 8 for _ in range(2)]
        self.contribution, self.gates, self.norms = ([[0.0] * 8 for _ in range(2)] for _ in range(3))


def recount(steps: list[int]) -> Recounted:
    """The sums over real tokens, expert by expert."""
    model = models.tiny_model("mixtral", train=False)
    seen = Recounted()
    for step in steps:
        batch = models.tiny_batch("mixtral", seed=step, padded=True)
        real = batch["attention_mask"].reshape(-1).bool()
        for index, block in enumerate(layer.mlp for layer in model.model.layers):

            def look(module: Any, args: Any, index: int = index, real: Any = real) -> None:
                hidden, chosen, gate = args
                for token in real.nonzero().flatten().tolist():
                    for slot in range(chosen.shape[1]):
                        expert = int(chosen[token, slot])
                        up = hidden[token] @ module.gate_up_proj[expert].T
                        inner = module.act_fn(up[:32]) * up[32:]
                        size = float((module.down_proj[expert] @ inner).norm())
                        seen.counts[index][expert] += 1
                        seen.contribution[index][expert] += float(gate[token, slot]) * size
                        seen.gates[index][expert] += float(gate[token, slot])
                        seen.norms[index][expert] += size

            block.experts.register_forward_pre_hook(look)
        with torch.no_grad():
            model(**batch)
        for layer in model.model.layers:
            layer.mlp.experts._forward_pre_hooks.clear()
    return seen


def test_records_and_system_give_what_a_recount_gives(tmp_path: Path) -> None:
    _, system = trained(tmp_path)
    live = Evidence.from_system(system)  # the window of steps 3 and 4, and the open one of step 5
    seen = recount([3, 4, 5])
    counts = seen.counts
    assert [list(layer.counts) for layer in live.layers] == counts
    for index, layer in enumerate(live.layers):
        assert layer.contribution == pytest.approx(seen.contribution[index], rel=1e-5)
        assert layer.gate_sum == pytest.approx(seen.gates[index], rel=1e-5)
        for name, sums in (("saliency", seen.contribution[index]), ("mean_norm", seen.norms[index])):
            means = [total / count for total, count in zip(sums, layer.counts, strict=True)]
            assert getattr(layer, name) == pytest.approx(means, rel=1e-5), name
    system.close_window()
    stored = Evidence.from_directory(tmp_path)
    assert [list(layer.counts) for layer in stored.layers] == recount([1, 2, 3, 4, 5]).counts
    assert (stored.source.first_step, stored.source.last_step) == (1, 5)
    newest = Evidence.from_directory(tmp_path / "chronomoe", windows=2)
    assert [layer.counts for layer in newest.layers] == [layer.counts for layer in live.layers]
    assert (newest.source.first_step, newest.source.last_step) == (3, 5)
    for ours, theirs in zip(newest.layers, live.layers, strict=True):
        assert ours.contribution == pytest.approx(theirs.contribution, rel=1e-6)
        for name in ("saliency", "gate_sum", "mean_norm", "phi_slow", "total_tokens_seen"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-6), name
        assert ours.spec == theirs.spec
    assert stored.source.run_id == system.run_id and stored.source.rows_read == sum(map(sum, counts)) + sum(
        map(sum, recount([1, 2]).counts)
    )


def test_calibrate_reads_every_real_token() -> None:
    model = models.tiny_model("mixtral")
    bits = digest(model)
    read = [models.tiny_batch("mixtral", seed=step, padded=True) for step in (1, 2)]
    known = calibrate(model, read)
    assert model.training and digest(model) == bits
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    seen = recount([1, 2])
    assert [list(layer.counts) for layer in known.layers] == seen.counts
    assert known.source.tokens == sum(int(batch["attention_mask"].sum()) for batch in read)
    for index, layer in enumerate(known.layers):
        assert layer.contribution == pytest.approx(seen.contribution[index], rel=1e-5)
        assert layer.gate_sum == pytest.approx(seen.gates[index], rel=1e-5)
        for expert, count in enumerate(layer.counts):
            assert layer.saliency[expert] == pytest.approx(layer.contribution[expert] / count)
            assert layer.mean_norm[expert] == pytest.approx(seen.norms[index][expert] / count, rel=1e-5)
            assert layer.mean_norm[expert] <= layer.max_norm[expert]
            assert layer.saliency[expert] <= layer.max_norm[expert] * layer.gate_sum[expert] / count + 1e-6
        assert sum(layer.gate_sum) == pytest.approx(known.source.tokens, rel=1e-5)  # Mixtral's gates sum to 1
    plan = plan_prune(known, keep=0.5, rank="mean_norm")
    assert plan.notes == () and plan.layers[0].scores == known.layers[0].mean_norm
    with pytest.raises(LifecycleError, match="at least one batch"):
        calibrate(model, [])


@pytest.mark.parametrize("family", ["switch_transformers", "qwen3_5_moe"])
def test_calibrate_agrees_with_what_a_wrapped_model_records(family: str) -> None:
    config = ChronoConfig.observe(interval=10, coherence=CoherenceConfig(max_tokens=None))
    model = chronomoe_hf.wrap(models.tiny_model(family), config)
    system = chronomoe_hf.system_of(model)
    batch = models.tiny_batch(family, padded=True)
    model(**batch).loss.backward()
    system.step(1)
    live, known = Evidence.from_system(system), calibrate(model, [batch])
    for ours, theirs in zip(known.layers, live.layers, strict=True):
        assert ours.spec == theirs.spec and ours.counts == theirs.counts
        for name in ("contribution", "gate_sum", "mean_norm"):
            pairs = list(zip(getattr(ours, name), getattr(theirs, name), strict=True))
            assert all((a is None) == (b is None) for a, b in pairs), name
            assert all(a is None or a == pytest.approx(b, rel=1e-3) for a, b in pairs), name


def test_a_run_ranks_by_mean_norm_and_a_record_of_older_versions_does_not(tmp_path: Path) -> None:
    """Windows of before `gate_sum` and `mean_norm` give all that they gave, and no sum of a part."""
    trained(tmp_path)
    known = Evidence.from_directory(tmp_path)
    plan = plan_prune(known, keep=0.5, rank="mean_norm")
    for layer, planned in zip(known.layers, plan.layers, strict=True):
        assert planned.scores == layer.mean_norm
        assert set(planned.dropped) == set(sorted(range(8), key=lambda e: layer.mean_norm[e])[:4])
    path = tmp_path / "chronomoe" / "routing_events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    newer = {"gate_sum", "mean_norm"}
    for before, has_norm in ((2, True), (10, False)):  # all windows up to this step are old
        old = [{k: v for k, v in line.items() if k not in newer or line["step"] > before} for line in lines]
        assert 0 < sum(newer <= set(line) for line in lines) and old != lines, "bad test setup"
        path.write_text("".join(json.dumps(line) + "\n" for line in old))
        mixed = Evidence.from_directory(tmp_path)
        for layer, its in zip(mixed.layers, known.layers, strict=True):
            assert layer.gate_sum is None and (layer.mean_norm is not None) == has_norm
            assert (layer.contribution, layer.saliency, layer.counts) == (its.contribution, its.saliency, its.counts)
        if has_norm:
            assert mixed.layers[0].mean_norm == Evidence.from_directory(tmp_path, windows=1).layers[0].mean_norm
    with pytest.raises(EvidenceError, match="holds no mean_norm"):
        plan_prune(mixed, keep=0.5, rank="mean_norm")


def test_an_expert_whose_outputs_are_zero_is_known_to_contribute_nothing() -> None:
    model = chronomoe_hf.wrap(models.tiny_model("mixtral"), ChronoConfig.observe(interval=1))
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[3] = 0.0
    model(**models.tiny_batch("mixtral")).loss.backward()
    chronomoe_hf.system_of(model).step(1)
    layer = Evidence.from_system(chronomoe_hf.system_of(model)).layers[0]
    assert layer.counts[3] > 0 and layer.saliency[3] == layer.mean_norm[3] == layer.contribution[3] == 0.0
    assert layer.gate_sum[3] > 0.0


def test_json_round_trip_is_exact_and_strict(tmp_path: Path) -> None:
    _, system = trained(None)
    known = Evidence.from_system(system).with_vectors(fisher=[[0.5] * 8, [None] * 8])
    assert Evidence.load(known.save(tmp_path / "evidence.json")) == known
    data = known.to_dict()
    for change in (
        {"format": "x"},
        {"schema": 9},
        {"layers": []},
        {"layers": [{**data["layers"][0], "counts": [1]}]},
        {"layers": [{**data["layers"][0], "phi_slow": ["x"] * 8}]},
        {"more": 1},
    ):
        with pytest.raises(EvidenceError):
            Evidence.from_dict(json.loads(json.dumps({**data, **change})))
    with pytest.raises(EvidenceError, match="must be one of"):
        known.with_vectors(luck=[[0.0] * 8] * 2)


def test_a_balanced_run_says_so_and_its_frequencies_are_refused(tmp_path: Path) -> None:
    model = chronomoe_hf.wrap(models.tiny_model("mixtral"), ChronoConfig.balance(interval=1))
    system = chronomoe_hf.system_of(model)
    system.begin()
    system.open_telemetry(tmp_path)
    model(**models.tiny_batch("mixtral")).loss.backward()
    system.step(1)
    for known in (Evidence.from_directory(tmp_path), Evidence.from_system(system)):
        assert known.source.beta_law == "balance"
        with pytest.raises(EvidenceError, match="after balancing"):
            plan_prune(known, keep=0.5, rank="frequency")


def test_directories_without_evidence_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match=r"run_manifest\.json is missing"):
        Evidence.from_directory(tmp_path)
    _, system = trained(tmp_path, steps=1)
    with pytest.raises(EvidenceError, match=r"routing_events\.jsonl is missing or empty"):
        Evidence.from_directory(tmp_path)
    system.close_window()
    assert Evidence.from_directory(tmp_path).source.last_step == 1
    with pytest.raises(EvidenceError, match="no records of mode 'EVAL'"):
        Evidence.from_directory(tmp_path, mode="EVAL")
    with pytest.raises(EvidenceError, match="windows"):
        Evidence.from_directory(tmp_path, windows=0)
    manifest = tmp_path / "chronomoe" / "run_manifest.json"
    data = json.loads(manifest.read_text())
    for layer in data["layers"]:
        del layer["num_groups"]
    manifest.write_text(json.dumps(data))
    with pytest.raises(EvidenceError, match="older version"):
        Evidence.from_directory(tmp_path)


def test_a_system_that_has_seen_nothing_has_no_evidence() -> None:
    model = chronomoe_hf.wrap(models.tiny_model("mixtral"), ChronoConfig.observe())
    with pytest.raises(EvidenceError, match="no token yet"):
        Evidence.from_system(chronomoe_hf.system_of(model))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "switch_transformers"])
def test_fisher_sums_are_squared_gradients_of_the_routing_weights(family: str) -> None:
    model = models.tiny_model(family)
    blocks = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
    seen: list[tuple[int, Any, Any]] = []

    def keep(index: int) -> Any:
        def look(module: Any, args: Any) -> None:
            args[2].retain_grad()
            seen.append((index, args[1], args[2]))

        return look

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(keep(index))
    with FisherSums(model) as sums:
        for step in range(2):
            model(**models.tiny_batch(family, seed=step)).loss.backward()
    model(**models.tiny_batch(family, seed=9)).loss.backward()  # outside: not counted
    expected = [[0.0] * 8 for _ in blocks]
    for index, chosen, gate in seen[: 2 * len(blocks)]:
        for token in range(gate.shape[0]):
            for slot in range(gate.shape[1]):
                one_hot = family == "switch_transformers"
                if one_hot and not bool(chosen[token].any()):
                    continue
                expert = int(chosen[token].argmax() if one_hot else chosen[token, slot])
                expected[index][expert] += float((gate[token, slot] * gate.grad[token, slot]).detach()) ** 2
    assert len(seen) == 3 * len(blocks)
    for ours, theirs in zip(sums.scores(), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-14) and sum(theirs) > 0
