"""The split: what is planned on planted idle experts, what is written, and that every bit comes back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import models, moe_zoo
from support.idle import IDLE, with_idle
from support.plans import digest
from torch import Tensor

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.errors import LifecycleError, PlanMismatchError
from chronomoe_hf.lifecycle import SplitPlan, apply, plan_split
from chronomoe_hf.lifecycle.live.model import live_layers
from chronomoe_hf.lifecycle.live.projections import expert_outputs
from chronomoe_hf.lifecycle.live.weights import Changes, ExpertWeights
from chronomoe_hf.splitting import plan_split as plan_split_module
from chronomoe_hf.splitting.router_tap import read_calls


def batches(count: int = 4, *, padded: bool = True) -> list[dict[str, Any]]:
    made = [models.tiny_batch("mixtral", seed=70 + i, batch=8, length=48, padded=padded) for i in range(count)]
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in made]


def recount(model: Any, read: list[dict[str, Any]]) -> list[Tensor]:
    """Shares of the assignments per layer in fair shares, by hooks on the experts, padding left out."""
    counts = [torch.zeros(8, dtype=torch.float64) for _ in model.model.layers]
    mask = torch.empty(0)

    def hook(index: int) -> Any:
        def listen(module: Any, args: Any) -> None:
            chosen_TK = args[1][mask.reshape(-1).bool()]
            counts[index] += torch.bincount(chosen_TK.reshape(-1), minlength=8)

        return listen

    handles = [layer.mlp.experts.register_forward_pre_hook(hook(i)) for i, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        for batch in read:
            mask = batch["attention_mask"]
            model(**batch)
    for handle in handles:
        handle.remove()
    return [count * 8 / count.sum() for count in counts]


def router_inputs(model: Any, index: int, read: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """What a router read for real tokens, and the experts chosen."""
    rows, chosen = [], []
    gate = model.model.layers[index].mlp.gate

    def listen(module: Any, args: Any, output: Any) -> None:
        real = batch["attention_mask"].reshape(-1).bool()
        rows.append(args[0].reshape(-1, args[0].shape[-1])[real])
        chosen.append(output[2][real])

    handle = gate.register_forward_hook(listen)
    with torch.no_grad():
        for batch in read:
            model(**batch)
    handle.remove()
    return torch.cat(rows), torch.cat(chosen)


# ---------------------------------------------------------------------------------------------------------- k = 1


def test_idle_experts_become_copies_and_rows_are_split_as_defined() -> None:
    model, read = with_idle(), batches()
    before = recount(model, read)
    was = copy.deepcopy(model)
    plan = plan_split(model, read)
    assert digest(model) == digest(was) and plan.tokens == sum(int(b["attention_mask"].sum()) for b in read)
    for layer, share in zip(plan.layers, before, strict=True):
        assert layer.share_before == pytest.approx(share.tolist())
        assert set(IDLE) & {one.target for one in layer.copies} and not {one.donor for one in layer.copies} & set(IDLE)
    apply(model, plan)
    for index, layer in enumerate(plan.layers):
        new, old = model.model.layers[index].mlp, was.model.layers[index].mlp
        for one in layer.copies:
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(new.experts, name)
                assert torch.equal(weight[one.target], getattr(old.experts, name)[one.donor])
        untouched = set(range(8)) - {one.target for one in layer.copies}
        for expert in untouched:
            assert torch.equal(new.experts.down_proj[expert], old.experts.down_proj[expert])
        # the first split, by hand: w + v and w - v, v orthogonal to the mean input, spread a tenth of the logits'
        first = layer.copies[0]
        donors_own = sum(one.row_of == first.donor for one in layer.copies) == 1
        again = {one.row_of for one in layer.copies[1:]}
        if donors_own and first.target not in again:
            hidden_TD, chosen_TK = router_inputs(was, index, read)
            split_D = new.gate.weight[first.donor] - old.gate.weight[first.donor]
            assert torch.allclose(new.gate.weight[first.target], old.gate.weight[first.donor] - split_D, atol=1e-6)
            own_ND = hidden_TD[chosen_TK[:, 0] == first.donor]
            std = float((hidden_TD @ old.gate.weight.T).var(-1, correction=0).mean().sqrt())
            assert abs(float(own_ND.mean(0) @ split_D)) < 1e-4 * std
            assert float((own_ND @ split_D).std(correction=0)) == pytest.approx(0.1 * std, rel=1e-3)
            values, vectors = torch.linalg.eigh(_covariance(own_ND))
            assert abs(float(vectors[:, -1] @ split_D / split_D.norm())) > 0.98, values[-3:]
    assert all(layer.copies for layer in plan.layers)


def _covariance(rows_ND: Tensor) -> Tensor:
    """Of the part of the rows that is orthogonal to their mean."""
    mean_D = rows_ND.mean(0)
    unit_D = mean_D / mean_D.norm()
    rest_ND = (rows_ND - mean_D) - ((rows_ND - mean_D) @ unit_D)[:, None] * unit_D
    return rest_ND.T @ rest_ND / len(rows_ND)


def test_the_first_layers_predicted_shares_are_those_of_the_changed_model_and_its_outputs_stay() -> None:
    """In layer 0 nothing before it has changed, so the prediction is exact. Copies give what their donors gave."""
    model, read = with_idle(), batches()
    before_TD, chosen_TK = layer_output(model, read)
    plan = plan_split(model, read)
    apply(model, plan)
    assert recount(model, read)[0].tolist() == pytest.approx(plan.layers[0].share_after)
    assert min(plan.layers[0].share_after) > min(plan.layers[0].share_before)
    after_TD, now_TK = layer_output(model, read)
    origin = {expert: expert for expert in range(8)} | {one.target: one.donor for one in plan.layers[0].copies}
    same = torch.tensor([origin[int(now)] == int(was) for was, now in zip(chosen_TK[:, 0], now_TK[:, 0], strict=True)])
    assert float(same.float().mean()) > 0.9
    # one expert a token and weights that sum to one: a token that goes to a copy gets the very same output
    torch.testing.assert_close(after_TD[same], before_TD[same], rtol=1e-4, atol=1e-5)


def layer_output(model: Any, read: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    rows: list[Tensor] = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: rows.append(out.reshape(-1, 32)))
    _, chosen = router_inputs(model, 0, read)
    handle.remove()
    real = torch.cat([batch["attention_mask"].reshape(-1).bool() for batch in read])
    return torch.cat(rows)[real], chosen


@pytest.mark.parametrize("wrapped", [False, True])
def test_moments_come_from_the_donor_and_undo_gives_every_bit_back(wrapped: bool) -> None:
    model, read = with_idle().train(), batches()
    if wrapped:
        chronomoe_hf.wrap(model, ChronoConfig.revive())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for seed in range(2):
        model(**models.tiny_batch("mixtral", seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plan = plan_split(model, read)
    was, moments = digest(model), copy.deepcopy(optimizer.state_dict())
    undo = apply(model, plan, optimizer)
    layer = model.model.layers[0].mlp
    assert plan.num_copies and digest(model) != was
    for one in plan.layers[0].copies:
        for tensor in (layer.experts.gate_up_proj, layer.experts.down_proj, layer.gate.weight):
            for name in ("exp_avg", "exp_avg_sq"):
                state = optimizer.state[tensor][name]
                assert torch.equal(state[one.target], state[one.donor]) and state[one.donor].any()
    undo()
    undo()
    assert digest(model) == was
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments["state"][index][name]) for name, value in state.items())


def test_what_was_trained_since_cannot_be_undone() -> None:
    model = with_idle().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    undo = apply(model, plan_split(model, batches()), optimizer)
    model(**models.tiny_batch("mixtral")).loss.backward()
    optimizer.step()
    now = digest(model)
    with pytest.raises(LifecycleError, match="trained or loaded since"):
        undo()
    assert digest(model) == now


def test_where_nothing_is_idle_nothing_is_done_and_it_says_so() -> None:
    model = models.tiny_model("mixtral", train=False, num_experts_per_tok=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(4))
    was, plan = digest(model), plan_split(model, batches(), idle=0.01)
    assert not plan.changes and str(plan).endswith("nothing to do")
    assert all(layer.reason.startswith("no expert is below") for layer in plan.layers)
    apply(model, plan)
    assert digest(model) == was


# ---------------------------------------------------------------------------------------------------------- k > 1


def test_with_several_experts_a_token_a_bias_brings_shares_into_bounds_and_the_refit_keeps_the_output() -> None:
    model, read = with_idle(k=2), batches(8, padded=True)
    chronomoe_hf.wrap(model, ChronoConfig.revive())
    system = chronomoe_hf.system_of(model)
    was, state = digest(model), system.step_state.state_dict()
    plan = plan_split(model, read)
    assert digest(model) == was and all(torch.equal(v, state[k]) for k, v in system.step_state.state_dict().items())
    assert all(layer.shift_E is not None and layer.copies for layer in plan.layers)
    idle = [{e for e, share in enumerate(layer.share_before) if share < 0.5} for layer in plan.layers]
    assert idle[1] and all(
        one.target in idle[i] and one.donor not in idle[i] for i in (0, 1) for one in plan.layers[i].copies
    )
    assert min(plan.layers[0].share_after) >= 0.4
    assert min(plan.layers[1].share_after) >= 0.5 and max(plan.layers[1].share_after) <= 2.0
    undo = apply(model, plan, held_out=0.25)
    assert recount(model, read)[0].tolist() == pytest.approx(plan.layers[0].share_after, abs=1e-9)
    beta_E = system.router_state(1).beta_applied
    assert torch.allclose(beta_E, plan.layers[1].shift_E, atol=1e-5) and beta_E.any()  # type: ignore[arg-type]
    assert all(one.applied and one.error_after < 0.7 * one.error_before for one in undo.refits)
    undo()
    assert digest(model) == was and not system.governed
    assert all(torch.equal(v, state[k]) for k, v in system.step_state.state_dict().items())
    assert not system.router_state(1).beta_on


def test_the_refitted_layer_solves_the_normal_equations() -> None:
    """Layer 0, three sweeps against the joint ridge solution in float64, target = the layer before the split."""
    model, read = with_idle(k=2, initializer_range=0.2), batches(6, padded=False)
    chronomoe_hf.wrap(model, ChronoConfig.revive())
    plan = plan_split(model, read)
    was = copy.deepcopy(model.model.layers[0].mlp)
    target_TD, _ = layer_output(model, read)
    hidden_TD, _ = router_inputs(model, 0, read)
    applied = apply(model, plan, held_out=0.2, sweeps=40, ridge=0.01)
    fit = 5 * 8 * 48
    mlp, spec = model.model.layers[0].mlp, plan.layers[0]
    with torch.no_grad():
        z_TE = (hidden_TD @ was.gate.weight.T).double()
    weight_TE = torch.zeros_like(z_TE)
    biased = z_TE + spec.shift_E.double() if ChronoConfig.revive().beta.scope == "routing" else z_TE  # type: ignore[union-attr]
    index_TK = (z_TE + spec.shift_E.double()).topk(2).indices  # type: ignore[union-attr]
    p_TK = biased.softmax(-1).gather(1, index_TK)
    weight_TE.scatter_(1, index_TK, p_TK / p_TK.sum(-1, keepdim=True))
    origin = {e: e for e in range(8)} | {one.target: one.donor for one in spec.copies}
    designs, now = [], []
    for expert in range(8):
        up = hidden_TD.double() @ was.experts.gate_up_proj[origin[expert]].detach().double().T
        gate, value = up.chunk(2, dim=-1)
        designs.append(weight_TE[:, expert, None] * torch.nn.functional.silu(gate) * value)
        now.append(was.experts.down_proj[origin[expert]].detach().double().T)
    design_TB, start = torch.cat(designs, dim=1), torch.cat(now)
    residual_TD = target_TD.double() - design_TB @ start
    a = design_TB[:fit]
    lam = 0.01 * float(a.square().sum()) / a.shape[1]
    step = torch.linalg.solve(a.T @ a + lam * torch.eye(a.shape[1]).double(), a.T @ residual_TD[:fit])
    wanted = start + step
    for expert in range(8):
        got = mlp.experts.down_proj[expert].detach().double().T
        assert torch.allclose(got, wanted[32 * expert : 32 * expert + 32], rtol=1e-2, atol=2e-3), expert
    assert applied.refits[0].applied


def test_a_native_correction_bias_takes_the_shift() -> None:
    model: Any = moe_zoo.build("deepseek_v3", num_experts_per_tok=2, n_routed_experts=8, n_group=1, topk_group=1)
    moe_zoo.randomise(model)
    chronomoe_hf.wrap(model, ChronoConfig.revive())
    system = chronomoe_hf.system_of(model)
    layer = system.layers[0]
    bias_E = layer.adapter.native_bias(layer.router, layer.parent)
    assert bias_E is not None
    with torch.no_grad():
        bias_E[:3] -= 5.0
    read = [{"input_ids": torch.randint(2, 60, (8, 32), generator=torch.Generator().manual_seed(s))} for s in range(4)]
    was, before = digest(model), bias_E.clone()
    plan = plan_split(model, read)
    assert plan.layers[0].changes and min(plan.layers[0].share_after) >= 0.4 > min(plan.layers[0].share_before)
    undo = apply(model, plan)
    slope = layer.adapter.rule.bias_slope(8)
    assert torch.allclose(bias_E - before, plan.layers[0].shift_E * slope, atol=1e-5)  # type: ignore[operator]
    assert not system.router_state(0).beta_applied.any()
    undo()
    assert digest(model) == was and torch.equal(bias_E, before)


# ------------------------------------------------------------------------------------------------ families, refusals

NOT_COPIED = {
    "dbrx": "share one flattened weight",
    "jetmoe": "cannot be reached",
    "longcat_flash": "identities",
    "nllb_moe": "cannot be reached",
    "zaya": "no tensor of one expert",  # its router has a class without an expert
}


@pytest.mark.parametrize("family", sorted(moe_zoo.ROUTED))
def test_a_copied_expert_computes_what_its_donor_computes(family: str) -> None:
    model = moe_zoo.build(family).eval()
    moe_zoo.randomise(model)
    was = digest(model)
    for layer in live_layers(model)[:2]:
        if family in NOT_COPIED:
            with pytest.raises(LifecycleError, match=NOT_COPIED[family]):
                ExpertWeights(layer)
            continue
        weights, changes = ExpertWeights(layer), Changes()
        width = 16 if family == "muse_spark" else layer.adapter.weight(layer.router).shape[-1]
        hidden_ND = torch.randn(6, width)
        if family == "llama4":  # its experts are not called one by one here: compare the weights
            weights.copy(0, 1, changes)
            assert len(weights.fused) == 2 and all(torch.equal(tensor[0], tensor[1]) for tensor in weights.fused)
            changes.undo()
            continue
        with torch.no_grad():
            donor, other = expert_outputs(layer, hidden_ND, 0), expert_outputs(layer, hidden_ND, 1)
            assert not torch.equal(donor, other)
            weights.copy(0, 1, changes)
            assert torch.equal(expert_outputs(layer, hidden_ND, 1), donor)
            assert torch.equal(expert_outputs(layer, hidden_ND, 0), donor)
        changes.undo()
    assert digest(model) == was


@pytest.mark.parametrize("k", [1, 2])
def test_few_passes_or_many_give_the_same_plan(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that holds one layer's router inputs at a time: as many passes as layers, and the same plan."""
    model = with_idle(k=k)
    if k > 1:
        model = chronomoe_hf.wrap(model, ChronoConfig.revive())
    held: list[int] = []

    def counted(model: Any, taps: Any, read: Any) -> None:
        read_calls(model, taps, read)
        held.append(len(taps))

    monkeypatch.setattr(plan_split_module, "read_calls", counted)
    whole = plan_split(model, batches())
    few = plan_split(model, batches(), memory_gb=4 * 8 * 48 * 1000 / 1e9)  # a layer takes 176 + 416 bytes a token
    assert held[0] == 2 and held[1:] == [2]
    monkeypatch.setattr(plan_split_module, "within_memory", lambda layers, read, memory_gb, what: list(read))
    many = plan_split(model, batches(), memory_gb=1e-9)
    assert held[2:] == [1, 1]
    assert any(layer.changes for layer in whole.layers), "bad test setup: nothing is idle"
    for one in (few, many):
        assert one.tokens == whole.tokens
        for ours, wanted in zip(one.layers, whole.layers, strict=True):
            assert ours.to_record() == wanted.to_record()
            assert ours.rows.keys() == wanted.rows.keys()
            assert all(torch.equal(ours.rows[e], wanted.rows[e]) for e in wanted.rows)
            assert (ours.shift_E is None) == (wanted.shift_E is None)
            assert ours.shift_E is None or torch.equal(ours.shift_E, wanted.shift_E)


def test_a_text_that_does_not_fit_is_read_in_part_and_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = with_idle(k=1)
    layer, read = live_layers(model)[0], batches(padded=False)
    width = layer.router.weight.shape[-1]
    per_token = width * 4 + 24 + 12 * width + 4 * 8
    plan = plan_split(model, read, memory_gb=(8 * 48 + 3 * 48 + 7) * per_token / 1e9)
    assert [one["input_ids"].shape[0] for one in plan.batches] == [8, 3]
    assert torch.equal(plan.batches[1]["input_ids"], read[1]["input_ids"][:3])
    assert plan.tokens == 11 * 48
    assert "plan_split reads 528 of the 1536 tokens" in caplog.text


def test_bad_input_is_refused_before_anything_changes() -> None:
    model, read = with_idle(), batches()
    was = digest(model)
    with pytest.raises(LifecycleError, match=r"0 < idle < 1 < busy.*idle=2"):
        plan_split(model, read, idle=2.0)
    with pytest.raises(LifecycleError, match="too few to tell which of 8 experts"):
        plan_split(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    with pytest.raises(LifecycleError, match="at least one batch"):
        plan_split(model, [])
    with pytest.raises(LifecycleError, match=r"wrap the model first.*revive"):
        plan_split(with_idle(k=2), read)
    for config in (ChronoConfig.observe(), ChronoConfig.protect()):
        with pytest.raises(LifecycleError, match=r"beta\.law '(none|coherence)'.*none of that size may act"):
            plan_split(chronomoe_hf.wrap(with_idle(k=2), config), read)
    plan: SplitPlan = plan_split(model, read)
    with pytest.raises(PlanMismatchError):
        apply(models.tiny_model("mixtral", num_experts_per_tok=2), plan)
    for parameter in model.model.layers[1].mlp.experts.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(LifecycleError, match=r"model\.layers\.1.*frozen"):
        plan_split(model, read)
    assert digest(model) == was
    adapted = get_peft_model(with_idle(), LoraConfig(target_parameters=["mlp.experts.down_proj"], r=2))
    with pytest.raises(LifecycleError, match=r"carries an adapter|frozen"):
        plan_split(adapted, read)


def test_an_optimizer_that_keeps_less_than_a_number_per_weight_is_refused() -> None:
    from transformers.optimization import Adafactor

    model = with_idle().train()
    optimizer = Adafactor(model.parameters(), lr=1e-3, relative_step=False)
    model(**models.tiny_batch("mixtral")).loss.backward()
    optimizer.step()
    plan, was = plan_split(model, batches()), digest(model)
    with pytest.raises(LifecycleError, match=r"exp_avg_sq_row.*cannot be copied"):
        apply(model, plan, optimizer)
    assert digest(model) == was
