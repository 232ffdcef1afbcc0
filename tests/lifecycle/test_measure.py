"""measure: the plain two-forward computation, its controls, and what it leaves behind (nothing)."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from support import models
from support.plans import digest, keeping

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.errors import LifecycleError, PlanError
from chronomoe_hf.lifecycle import masked, measure, random_plan, worst_plan

KEPT = [[0, 2, 3, 5, 7], [1, 2, 4, 6, 7]]


def batches(family: str, count: int = 3, **fields: Any) -> list[dict[str, Any]]:
    return [models.tiny_batch(family, seed=100 + index, padded=True, **fields) for index in range(count)]


def by_sequence(model: Any, batch: dict[str, Any], shift: int) -> tuple[list[list[float]], list[list[torch.Tensor]]]:
    """Loss and log-probabilities of every predicted token, sequence by sequence, one token at a time."""
    with torch.no_grad():
        logits = model(**batch).logits
    losses, logs = [], []
    for row in range(logits.shape[0]):
        losses.append([])
        logs.append([])
        for position in range(logits.shape[1] - shift):
            target = int(batch["labels"][row, position + shift])
            if target != -100:
                log_p = logits[row, position].double().log_softmax(-1)
                losses[-1].append(-float(log_p[target]))
                logs[-1].append(log_p)
    return losses, logs


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_measure_is_two_forwards_compared_token_by_token(family: str) -> None:
    model = models.tiny_model(family)
    plan = keeping(model, KEPT if family == "mixtral" else KEPT * 2)
    effect = measure(model, plan, batches(family), controls=0, worst=False)
    assert model.training
    model.eval()
    shift = 0 if family == "switch_transformers" else 1
    number, rises, kl, overlap, total = [], [], [], [], []
    for batch in batches(family):
        full, full_logs = by_sequence(model, batch, shift)
        with masked(model, plan):
            cut, cut_logs = by_sequence(model, batch, shift)
        for a, b, p_log, q_log in zip(full, cut, full_logs, cut_logs, strict=True):
            number.append(len(a))
            total += a
            rises.append(sum(b) - sum(a))
            for p, q in zip(p_log, q_log, strict=True):
                kl.append(float((p.exp() * (p - q)).sum()))
                overlap.append(float(torch.minimum(p.exp(), q.exp()).sum()))
    mean = sum(rises) / sum(number)
    assert effect.plan.delta_loss == pytest.approx(mean, abs=1e-6) and abs(mean) > 1e-4
    assert effect.loss == pytest.approx(statistics.fmean(total), rel=1e-6)
    assert effect.plan.kl == pytest.approx(statistics.fmean(kl), rel=1e-4)
    assert effect.plan.overlap == pytest.approx(statistics.fmean(overlap), rel=1e-5)
    assert (effect.tokens, effect.sequences) == (sum(number), len(number))
    spread = sum((rise - n * mean) ** 2 for rise, n in zip(rises, number, strict=True))
    error = math.sqrt(spread * len(number) / (len(number) - 1)) / sum(number)
    assert effect.plan.delta_loss_error == pytest.approx(error, rel=1e-3)


def test_expert_overlap_counts_the_choices_that_stay() -> None:
    model = models.tiny_model("mixtral", train=False)
    plan = keeping(model, KEPT)
    chosen: list[list[torch.Tensor]] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda router, args, output: chosen[-1].append(output[2].clone()))
    same = total = 0
    for batch in batches("mixtral"):
        chosen += [[]]
        by_sequence(model, batch, 1)
        for layer in model.model.layers:
            hooks = list(layer.mlp.gate._forward_hooks.items())
            layer.mlp.gate._forward_hooks.clear()
            layer.mlp._kept_hooks = hooks
        with masked(model, plan):
            for layer in model.model.layers:  # behind the mask's own hook
                layer.mlp.gate._forward_hooks.update(layer.mlp._kept_hooks)
            chosen += [[]]
            by_sequence(model, batch, 1)
        for before, after in zip(chosen[-2], chosen[-1], strict=True):
            for token in range(before.shape[0]):
                same += len(set(before[token].tolist()) & set(after[token].tolist()))
                total += before.shape[1]
    effect = measure(model, plan, batches("mixtral"), controls=0, worst=False)
    assert effect.plan.expert_overlap == pytest.approx(same / total) and 0.2 < same / total < 0.95


def test_controls_worst_and_single_experts_are_measured_like_plans_of_their_own() -> None:
    model = models.tiny_model("mixtral", train=False)
    plan = keeping(model, KEPT)
    held_out = batches("mixtral", 2)
    effect = measure(model, plan, held_out, controls=2, leave_one_out=[(1, 3)], seed=7)
    assert len(effect.random) == 2 and effect.worst is not None
    for got, other in zip(
        (*effect.random, effect.worst), (random_plan(plan, 8), random_plan(plan, 9), worst_plan(plan)), strict=True
    ):
        assert got == measure(model, other, held_out, controls=0, worst=False).plan
    single = keeping(model, [list(range(8)), list(range(8))])
    assert measure(model, single, held_out, controls=0, worst=False).plan.delta_loss == 0.0
    alone = keeping(model, [[0, 1, 2, 4, 5, 6, 7]] * 2)  # both layers; the single case masks one
    assert effect.leave_one_out[1, 3].delta_loss != measure(model, alone, held_out, controls=0).plan.delta_loss
    record = effect.to_record()
    assert record["leave_one_out"][0]["expert_id"] == 3 and record["plan"]["kl"] == effect.plan.kl
    assert "random" in str(effect) and "worst" in str(effect)


def test_measuring_in_training_changes_no_bit_of_it() -> None:
    """The dry run with everything on: weights, losses and records are those of a run without it."""

    def train(measuring: bool) -> tuple[str, list[float], list[Any]]:
        model = chronomoe_hf.wrap(models.tiny_model("mixtral"), ChronoConfig(interval=2))
        system = chronomoe_hf.system_of(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses, counts = [], []
        for step in range(1, 5):
            loss = model(**models.tiny_batch("mixtral", seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            snapshot = system.step(step)
            if snapshot is not None:
                counts.append([layer.to_record() for layer in snapshot.layers])
            losses.append(loss.item())
            if measuring:
                bits = digest(model)
                with system.recording_eval():
                    measure(model, keeping(model, KEPT), batches("mixtral"), controls=2, leave_one_out=[(0, 0)])
                assert digest(model) == bits and model.training and system.take_evaluation() is None
        return digest(model), losses, counts

    assert train(True) == train(False)


@pytest.mark.parametrize(
    ("held_out", "fields", "error", "words"),
    [
        ([], {}, LifecycleError, "at least one batch"),
        ([torch.zeros(2, 3)], {}, LifecycleError, "dictionaries with input_ids"),
        ([{"input_ids": [[5, 6]], "labels": [[5, 6]]}], {}, LifecycleError, "input_ids is a list; let a data collator"),
        ([{"input_ids": torch.ones(8), "labels": torch.ones(8)}], {}, LifecycleError, r"shape \(8,\): a single row"),
        ([{"input_ids": torch.ones(2, 8, dtype=torch.int64)}], {}, LifecycleError, "needs labels"),
        (
            [{"input_ids": torch.ones(2, 8, dtype=torch.int64), "labels": torch.full((2, 8), -100)}],
            {},
            LifecycleError,
            "no token is counted",
        ),
        (None, {"controls": -1}, PlanError, "controls"),
        (None, {"leave_one_out": [(0, 8)]}, PlanError, "expert 8 of layer 0"),
    ],
)
def test_bad_batches_and_settings_are_refused(held_out: Any, fields: Any, error: type[Exception], words: str) -> None:
    model = models.tiny_model("mixtral")
    with pytest.raises(error, match=words):
        measure(model, keeping(model, KEPT), batches("mixtral") if held_out is None else held_out, **fields)


def test_a_loss_that_is_not_finite_is_no_measurement() -> None:
    model = models.tiny_model("mixtral")
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(LifecycleError, match="not finite"):
        measure(model, keeping(model, KEPT), batches("mixtral"), controls=0)
