"""A run that is cut in its middle: planned from its own windows, masked, trained on, saved and resumed."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import jobs, models
from support.oracles import Recount, train_step
from support.plans import digest, keeping
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import BetaConfig, CoherenceConfig, LifecycleConfig
from chronomoe_hf.errors import ConfigError, EvidenceError, LifecycleError, PlanError, StateCorruptError
from chronomoe_hf.in_run.dry_run import measure_dry_run
from chronomoe_hf.lifecycle import Evidence, PrunePlan, export, export_checkpoint, masked, plan_prune
from chronomoe_hf.report.data import load_run, relative_load
from chronomoe_hf.step_state import StepState
from chronomoe_hf.telemetry import read_jsonl

CUT = {"cut_at": 3, "keep": 0.5}


def wrapped(preset: str = "observe", family: str = "mixtral", **lifecycle: Any) -> tuple[Any, Any]:
    config = ChronoConfig.preset(preset, interval=2, lifecycle=LifecycleConfig(**{**CUT, **lifecycle}))
    if preset == "balance":  # a force on every expert
        config = config.replace(beta__dead_zone=None, beta__first_layer="same", beta__rate=0.3)
    model = chronomoe_hf.wrap(models.tiny_model(family), config)
    return model, chronomoe_hf.system_of(model)


def train(model: Any, system: Any, steps: range) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in steps:
        train_step(model, models.tiny_batch("mixtral", seed=step, padded=True))
        optimizer.step()
        optimizer.zero_grad()
        system.step(step)
    return optimizer


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        out = model(**models.tiny_batch("mixtral", seed=99)).logits.clone()
    model.train()
    return out


@pytest.mark.parametrize("rank", ["contribution", "mean_norm"])
def test_the_plan_is_that_of_the_runs_own_windows_and_touches_no_weight(rank: str, tmp_path: Path) -> None:
    model, system = wrapped(rank=rank)
    system.begin()
    system.open_telemetry(tmp_path)
    optimizer = train(model, system, range(1, 3))
    train_step(model, models.tiny_batch("mixtral", seed=3, padded=True))
    optimizer.step()
    optimizer.zero_grad()
    before, moments = digest(model), copy.deepcopy(optimizer.state_dict())
    assert system.cut.plan is None
    snapshot = system.step(3)
    plan = system.cut.plan
    assert snapshot is not None and snapshot.step == 3 and not snapshot.layers[0].cut, "its window ends at the cut"
    assert digest(model) == before and str(optimizer.state_dict()) == str(moments)
    assert all(len(layer.kept) == 4 for layer in plan.layers)
    known = Evidence.from_directory(tmp_path)
    assert (known.source.first_step, known.source.last_step) == (1, 3)
    again = plan_prune(known, keep=0.5, rank=rank)
    assert plan.rank == rank and [layer.kept for layer in again.layers] == [layer.kept for layer in plan.layers]
    assert PrunePlan.load(tmp_path / "chronomoe" / "prune_plan.json") == plan
    records, _ = read_jsonl(tmp_path / "chronomoe" / "lifecycle_cuts.jsonl")
    assert [(r["step"], r["dry_run"], r["num_kept"], r["kept"][1]) for r in records] == [
        (3, False, 4, list(plan.layers[1].kept))
    ]
    inside = logits(model)
    twin = models.tiny_model("mixtral")
    twin.load_state_dict(model.state_dict())
    assert (logits(twin) - inside).abs().max() > 0.01
    with masked(twin, plan):
        assert torch.equal(logits(twin), inside)
    assert not system.cut.due(4)


def test_inside_the_cut_counts_are_dispatched_ones_and_the_cut_are_not_dead(tmp_path: Path) -> None:
    model, system = wrapped(after_step=0, min_tokens=10**6, confirmations=1)
    system.begin()
    system.open_telemetry(tmp_path)
    train(model, system, range(1, 4))
    recount = Recount(model, "mixtral")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4, 13):
        train_step(model, models.tiny_batch("mixtral", seed=step, padded=True), recount)
        optimizer.step()
        optimizer.zero_grad()
        snapshot = system.step(step)
        if step % 2:
            continue
        for layer, planned, counted in zip(snapshot.layers, system.cut.plan.layers, recount.lists(), strict=True):
            assert layer.expert_token_counts == counted and layer.cut == list(planned.dropped)
            left = [counted[e] for e in planned.kept]
            assert layer.dead_experts == left.count(0) and sum(counted) == sum(left) > 0
            assert layer.max_violation == pytest.approx(max(left) / (sum(left) / 4) - 1)
            assert layer.max_violation_ceiling == 4 / 2 - 1
        for counts in recount.counts:
            counts.clear()
    assert not [alert for alert in snapshot.active_alerts if alert.kind in ("COLLAPSE_CONFIRMED", "DRIFT")]
    later = [d for d in system.prune_decisions if d.step > 3]
    gone = {(layer.spec.layer_id, e) for layer in system.cut.plan.layers for e in layer.dropped}
    assert {(d.layer_id, d.expert) for d in system.prune_decisions if d.step <= 3} & gone, "there were cases before"
    assert not {(d.layer_id, d.expert) for d in later} & gone
    events, _ = read_jsonl(tmp_path / "chronomoe" / "routing_events.jsonl")
    assert all(("cut" in event) == (event["step"] > 3) for event in events)
    assert measure_dry_run(system, model, [models.tiny_batch("mixtral")]) is None
    seen = load_run(tmp_path).windows[-1].layers[0]
    assert seen.num_choices == 4 and seen.neff_fraction == pytest.approx(snapshot.layers[0].n_effective / 4)
    load_LE, layers = relative_load(load_run(tmp_path), 12)
    for layer_id, row in zip(layers, load_LE, strict=True):
        kept = list(system.cut.plan.layers[layer_id].kept)
        assert np.flatnonzero(np.isfinite(row)).tolist() == kept and row[kept].mean() == pytest.approx(1.0)
    assert np.isfinite(relative_load(load_run(tmp_path), 3)[0]).all()


@pytest.mark.parametrize("settings", [{}, {"dead_zone": (0.5, 2.0)}, {"rule": "sign"}])
def test_the_balance_law_balances_the_survivors_as_if_there_were_no_others(settings: dict[str, Any]) -> None:
    kept, beta = [1, 2, 5, 6], BetaConfig(law="balance", **settings)
    cut, small = StepState([8], top_k=[2]), StepState([4], top_k=[2])
    cut.apply_balance(torch.ones(1, 8, dtype=torch.float64), beta)
    cut.beta_LE.fill_(0.7)
    cut.cut([[e for e in range(8) if e not in kept]])
    assert cut.beta_LE[0].tolist() == [pytest.approx(0.7) if e in kept else 0.0 for e in range(8)]
    cut.beta_LE.zero_()
    for seed in range(5):
        count_4 = torch.randint(0, 50, (1, 4), generator=torch.Generator().manual_seed(seed)).double()
        count_8 = torch.zeros(1, 8, dtype=torch.float64)
        count_8[0, kept] = count_4[0]
        step_8, step_4 = cut.apply_balance(count_8, beta), small.apply_balance(count_4, beta)
        torch.testing.assert_close(step_8[0, kept], step_4[0])
        assert not step_8[0, [0, 3, 4, 7]].any()
        torch.testing.assert_close(cut.beta_LE[0, kept], small.beta_LE[0])
    cut.recentre(4.0)
    small.recentre(4.0)
    torch.testing.assert_close(cut.beta_LE[0, kept], small.beta_LE[0])
    assert not cut.beta_LE[0, [0, 3, 4, 7]].any()
    cut.cut([[]])
    assert bool(cut.mask_LE.all())


@pytest.mark.parametrize("preset", ["protect", "balance"])
def test_a_governed_run_goes_on_balancing_what_is_left(preset: str) -> None:
    model, system = wrapped(preset)
    train(model, system, range(1, 9))
    for layer, planned in zip(system.layers, system.cut.plan.layers, strict=True):
        beta_E = layer.handle.state.beta_coeff
        assert not beta_E[list(planned.dropped)].any() and beta_E[list(planned.kept)].any()
        assert float(beta_E.sum()) == pytest.approx(0.0, abs=1e-5)
    assert all(share is None or 0.0 <= share <= 1.0 for share in system.step_state.topk_disagreement())


def test_the_state_carries_the_cut_and_what_it_will_be_made_of(tmp_path: Path) -> None:
    model, system = wrapped()
    train(model, system, range(1, 3))
    system.save(tmp_path / "before")
    older = copy.deepcopy(system.state_dict())
    assert all(layer.pop("gate_sum") and layer.pop("mean_norm") for layer in older["meta"]["cut"]["windows"][0])
    again, other = wrapped()
    third, last = wrapped()
    again.load_state_dict(model.state_dict())
    third.load_state_dict(model.state_dict())
    other.load(tmp_path / "before")
    last.load_state_dict(older)  # windows of a version that did not have these
    for one, its in ((model, system), (again, other), (third, last)):
        train(one, its, range(3, 4))
    assert last.cut.plan == other.cut.plan == system.cut.plan is not None
    system.save(tmp_path / "after")
    third, last = wrapped()
    third.load_state_dict(model.state_dict())
    last.load(tmp_path / "after")
    assert last.cut.plan == system.cut.plan and torch.equal(logits(third), logits(model))
    other.load(tmp_path / "before", check_weights=False)  # a step of training further
    assert other.cut.plan is None and other.cut.pending, "a state from before the cut takes it off"
    plain = chronomoe_hf.wrap(models.tiny_model("mixtral"), ChronoConfig.observe(interval=2))
    with pytest.warns(UserWarning, match="the cut to 4 experts a layer"):
        chronomoe_hf.system_of(plain).load(tmp_path / "after", check_weights=False)
    assert chronomoe_hf.system_of(plain).cut.plan is None
    state = system.state_dict()
    for wrong in ({**state["meta"]["cut"], "plan": {}}, {"plan": None, "step": 1, "windows": [[{}]]}, {}):
        with pytest.raises(StateCorruptError, match="saved cut"):
            last.load_state_dict({**state, "meta": {**state["meta"], "cut": wrong}})
    assert last.cut.plan == system.cut.plan


def test_what_was_cut_is_no_idle_expert_to_spawn_into() -> None:
    from chronomoe_hf.lifecycle.dry_run.proposals import SeenRoles
    from chronomoe_hf.lifecycle.dry_run.role_numbers import FreeEnergy
    from chronomoe_hf.telemetry import LayerSnapshot

    counts = [60, 0, 20, 20, 0, 0, 0, 0]
    for cut, idle, loaded in (([4, 5, 6, 7], [1], [0]), ([], [1, 4, 5, 6, 7], [0, 2, 3])):
        layer = LayerSnapshot(layer_id=0, n_experts=8, top_k=2, expert_token_counts=counts, cut=cut)
        assert layer.shares is not None
        energy: Any = FreeEnergy
        seen = SeenRoles(layer, layer.shares, None, [], [], energy)  # type: ignore[arg-type]
        assert seen.idle == idle and seen.overloaded == loaded


def test_copies_and_pickles_are_cut_too_and_unwrapping_says_that_the_cut_is_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, system = wrapped()
    train(model, system, range(1, 4))
    want = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), want)
    chronomoe_hf.unwrap(model)
    assert not torch.equal(logits(model), want)
    assert any("take part again" in record.message for record in caplog.records)


def test_a_loss_on_the_routers_logits_sees_the_survivors_only() -> None:
    """Mixtral's load-balancing loss: of the smaller model, times E / E' (Transformers multiplies with the old E)."""
    model = models.tiny_model("mixtral", output_router_logits=True, num_hidden_layers=1)
    plan = keeping(model, [[0, 2, 3, 5]])
    with masked(model, plan):
        aux = model(**models.tiny_batch("mixtral")).aux_loss
        aux.backward()
    small = models.tiny_model("mixtral", output_router_logits=True, num_hidden_layers=1, num_local_experts=4)
    small.load_state_dict({n: v for n, v in model.state_dict().items() if "mlp" not in n}, strict=False)
    gate = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():
        small.model.layers[0].mlp.gate.weight.copy_(gate[[0, 2, 3, 5]])
    assert aux.item() == pytest.approx(2.0 * small(**models.tiny_batch("mixtral")).aux_loss.item(), rel=1e-5)
    assert torch.isfinite(gate.grad).all() and not gate.grad[[1, 4, 6, 7]].any() and gate.grad[0].any()


def test_counts_inside_masked_are_those_of_a_plain_recount() -> None:
    """The same inside the context manager: ids that were dispatched, not those before the mask."""
    model = chronomoe_hf.wrap(models.tiny_model("mixtral"), ChronoConfig.observe(interval=1))
    recount = Recount(model, "mixtral")
    with masked(model, keeping(model, [[0, 2, 3, 5, 7], [1, 2, 4, 6, 7]])):
        train_step(model, models.tiny_batch("mixtral", padded=True), recount)
    snapshot = chronomoe_hf.system_of(model).step(1)
    assert snapshot is not None and [layer.expert_token_counts for layer in snapshot.layers] == recount.lists()
    assert recount.lists()[0][1] == recount.lists()[1][0] == 0 < recount.lists()[0][0]
    assert snapshot.layers[0].nonfinite_tokens == 0


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut_at", [0, -3, 0.0, 1.0, 1.5, True, "0.5"])
def test_a_cut_outside_the_run_is_refused(cut_at: Any) -> None:
    with pytest.raises(ConfigError, match=r"(cut|Cut\w+)\.at "):
        LifecycleConfig(cut_at=cut_at)


def test_a_cut_that_the_model_cannot_have_is_refused_before_it_is_wrapped() -> None:
    model = models.tiny_model("mixtral")

    def refused(error: type[LifecycleError], match: str, **fields: Any) -> None:
        lifecycle = {"cut_at": 3, **fields.pop("lifecycle", {})}
        with pytest.raises(error, match=match):
            chronomoe_hf.wrap(model, ChronoConfig(lifecycle=LifecycleConfig(**lifecycle), **fields))
        assert not [name for module in model.modules() for name in vars(module) if "chrono" in name]

    refused(PlanError, "keep at least 2", lifecycle={"keep": 0.1})
    refused(PlanError, "leaves all 8", lifecycle={"multiple_of": 8})
    refused(EvidenceError, "needs expert outputs", coherence=CoherenceConfig(enabled=False))
    refused(EvidenceError, "under the balance law", lifecycle={"rank": "frequency"}, beta=BetaConfig(law="balance"))
    for keep in (0.0, 1.0, -1.0):
        with pytest.raises(ConfigError, match="keep"):
            LifecycleConfig(cut_at=3, keep=keep)


def test_a_family_that_cannot_be_masked_is_refused() -> None:
    from support import moe_zoo

    with pytest.raises(LifecycleError, match="cannot be masked: dbrx"):
        chronomoe_hf.wrap(moe_zoo.build("dbrx"), ChronoConfig.observe(lifecycle=LifecycleConfig(cut_at=3)))


def trainer(output_dir: Path, steps: int, config: ChronoConfig, **arguments: Any) -> Trainer:
    made = Trainer(
        models.tiny_model("mixtral", attention_dropout=0.1),
        TrainingArguments(
            str(output_dir),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            max_steps=steps,
            logging_steps=1,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=jobs.rows(64),
        eval_dataset=jobs.rows(16, seed=1),
    )
    chronomoe_hf.attach(made, config)
    return made


def test_a_cut_at_the_end_of_the_run_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for cut_at in (4, 9, 0.99):
        made = trainer(tmp_path, 4, ChronoConfig.observe(lifecycle=LifecycleConfig(cut_at=cut_at)))
        before = digest(made.model)
        with pytest.raises(PlanError, match="the run ends at step 4"):
            made.train()
        assert digest(made.model) == before and made.state.global_step == 0
    model, system = wrapped(cut_at=0.5)
    train_step(model, models.tiny_batch("mixtral"))
    with pytest.raises(PlanError, match="fraction of the run"):
        system.step(1)


# ---- a Trainer's run -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["observe", "protect", "balance"])
def test_a_cut_run_resumed_is_the_uninterrupted_one_and_exports(preset: str, tmp_path: Path) -> None:
    """Cut at 6 of 12 steps; resumed from before (4, in a window), at (6) and after (8) the cut."""
    config = ChronoConfig.preset(preset, interval=5, lifecycle=LifecycleConfig(cut_at=0.5, keep=0.5, measure=True))
    schedule = {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "gradient_accumulation_steps": 2}
    whole = trainer(tmp_path / "run", 12, config, **schedule)
    whole.train()
    system = chronomoe_hf.system_of(whole.model)
    plan, want, numbers = system.cut.plan, digest(whole.model), system.state_dict()
    assert plan is not None and system.cut.step == 6
    losses = {e["step"]: e["eval_loss"] for e in whole.state.log_history if "eval_loss" in e}
    evaluated = [r for r in read_jsonl(tmp_path / "run/chronomoe/routing_events.jsonl")[0] if r["mode"] == "EVAL"]
    for record in evaluated:
        dropped = plan.layers[record["layer_id"]].dropped
        assert (sum(record["expert_token_counts"][e] for e in dropped) == 0) == (record["step"] > 6)
    effects, _ = read_jsonl(tmp_path / "run/chronomoe/lifecycle_effects.jsonl")
    assert [effect["step"] for effect in effects] == [4], "measured until it is decided"
    for step in (4, 6, 8):
        resumed = trainer(tmp_path / f"from-{step}", 12, config, **schedule)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        its = chronomoe_hf.system_of(resumed.model)
        assert its.cut.plan == plan and its.cut.step == 6 and digest(resumed.model) == want
        for name, value in its.state_dict()["tensors"].items():
            assert torch.equal(value, numbers["tensors"][name]), name
        again = {e["step"]: e["eval_loss"] for e in resumed.state.log_history if "eval_loss" in e}
        assert {s: again[s] for s in losses if s > step} == {s: losses[s] for s in losses if s > step}
        assert PrunePlan.load(tmp_path / f"from-{step}" / "chronomoe" / "prune_plan.json") == plan
        shutil.rmtree(tmp_path / f"from-{step}")
    uncut = trainer(tmp_path / "late", 12, config.replace(lifecycle__cut__at=2), **schedule)
    with pytest.raises(PlanError, match="resumes at step 4"):
        uncut.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    export(whole.model, plan, tmp_path / "small")
    state = json.loads((tmp_path / "small" / "chronomoe" / "state.json").read_text())
    assert "cut" not in state and all(row["num_experts"] == 4 for row in state["layers"])
    export_checkpoint(tmp_path / "run" / "checkpoint-12", plan, tmp_path / "small-too")
    for directory in ("small", "small-too"):
        small = AutoModelForCausalLM.from_pretrained(tmp_path / directory).eval()
        assert small.config.num_local_experts == 4
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-12")
    chronomoe_hf.wrap(again, config, state=tmp_path / "run" / "checkpoint-12")
    assert torch.equal(logits(again), logits(whole.model))
    chronomoe_hf.detach(whole)
    with masked(whole.model, plan):
        torch.testing.assert_close(logits(small), logits(whole.model), rtol=0, atol=1e-5)
