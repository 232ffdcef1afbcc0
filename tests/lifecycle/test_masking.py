"""masked: equal to router logits and native biases at -inf, and gone without a trace."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import jobs, models, moe_zoo
from support.plans import digest, keeping
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.errors import LifecycleError, PlanMismatchError
from chronomoe_hf.lifecycle import layer_specs, masked
from chronomoe_hf.lifecycle.live.masking import CutMask, mask_experts
from chronomoe_hf.lifecycle.live.model import match_layers

KEPT = [[0, 2, 3, 5, 7], [1, 2, 4, 6, 7]]
REFUSED = {"dbrx", "deepseek_v4", "nllb_moe"}


def logits_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
    return output.get("logits", output.get("last_hidden_state")).clone()


def softmax_router(dropped: list[int]) -> Any:
    """The forward of Mixtral's and Qwen3-MoE's router as the definition has it, logits of `dropped` at -inf."""

    def forward(self: Any, hidden: Tensor) -> Any:
        z_TE = F.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
        z_TE[:, dropped] = float("-inf")
        weight_TK, index_TK = F.softmax(z_TE, dtype=torch.float, dim=-1).topk(self.top_k, dim=-1)
        return z_TE, (weight_TK / weight_TK.sum(-1, keepdim=True)).to(weight_TK.dtype), index_TK

    return forward


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_masked_is_the_router_with_logits_at_minus_infinity(family: str, wrapped: bool) -> None:
    model = models.tiny_model(family, train=False, norm_topk_prob=True)
    batch = models.tiny_batch(family, padded=True)
    oracle = copy.deepcopy(model)
    for layer, kept in zip(oracle.model.layers, KEPT, strict=True):
        dropped = [e for e in range(8) if e not in kept]
        layer.mlp.gate.forward = softmax_router(dropped).__get__(layer.mlp.gate)
    if wrapped:
        model = chronomoe_hf.wrap(model, ChronoConfig.observe())
    before = logits_of(model, batch)
    with masked(model, keeping(model, KEPT)) as same:
        assert same is model
        inside = logits_of(model, batch)
    torch.testing.assert_close(inside, logits_of(oracle, batch), rtol=0, atol=1e-5)
    assert (inside - before).abs().max() > 0.01
    assert torch.equal(logits_of(model, batch), before)


def test_sigmoid_groups_and_native_bias_as_defined() -> None:
    """DeepSeek-V3's choice written out for one call, with the dropped experts' logits and biases at -inf."""
    model = moe_zoo.build("deepseek_v3", n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=3).eval()
    moe_zoo.randomise(model)
    made = layer_specs(model)[0]
    assert (made.num_experts, made.num_groups, made.groups_kept, made.top_k) == (16, 4, 2, 3)
    layer = match_layers(model, layer_specs(model))[0]
    router: Any = layer.router
    dropped = [1, 6, 11, 12]
    hidden_TD = torch.randn(40, router.weight.shape[1])
    with mask_experts([layer], [dropped]), torch.no_grad():
        _, weight_TK, index_TK = router(hidden_TD)
    for token in range(40):
        z_E = router.weight @ hidden_TD[token]
        score = [float(torch.sigmoid(z)) if e not in dropped else 0.0 for e, z in enumerate(z_E)]
        choice = [
            s + float(router.e_score_correction_bias[e]) if e not in dropped else -float("inf")
            for e, s in enumerate(score)
        ]
        best = [sum(sorted(choice[4 * g : 4 * g + 4])[-2:]) for g in range(4)]
        groups = sorted(range(4), key=lambda g: best[g])[-2:]
        chosen = sorted((e for e in range(16) if e // 4 in groups), key=lambda e: choice[e])[-3:]
        assert set(index_TK[token].tolist()) == set(chosen)
        total = sum(score[e] for e in chosen) if router.norm_topk_prob else 1.0
        for slot, expert in enumerate(index_TK[token].tolist()):
            expected = score[expert] / total * router.routed_scaling_factor
            assert float(weight_TK[token, slot]) == pytest.approx(expected, rel=1e-4)


def test_a_steered_model_is_masked_with_its_beta() -> None:
    model = chronomoe_hf.wrap(models.tiny_model("mixtral", train=False), ChronoConfig())
    system = chronomoe_hf.system_of(model)
    for layer in system.layers:
        layer.handle.state.beta_applied.copy_(torch.linspace(-0.5, 0.5, 8))
        layer.handle.state.beta_on = True
    batch = models.tiny_batch("mixtral")
    plain = logits_of(model, batch)
    with masked(model, keeping(model, KEPT)):
        inside = logits_of(model, batch)
    for layer, kept in zip(system.layers, KEPT, strict=True):
        layer.handle.state.beta_applied[[e for e in range(8) if e not in kept]] = -float("inf")
    torch.testing.assert_close(inside, logits_of(model, batch), rtol=0, atol=1e-6)
    assert (inside - plain).abs().max() > 0.01


def test_nesting_joins_the_masks_and_errors_leave_nothing_behind() -> None:
    model = models.tiny_model("mixtral", train=False)
    batch = models.tiny_batch("mixtral")
    before, bits = logits_of(model, batch), digest(model)
    first, second = keeping(model, [[0, 1, 2, 3, 4]] * 2), keeping(model, [[2, 3, 4, 5, 6]] * 2)
    with masked(model, keeping(model, [[2, 3, 4]] * 2)):
        both = logits_of(model, batch)
    with masked(model, first):
        outer = logits_of(model, batch)
        with masked(model, second):
            assert torch.equal(logits_of(model, batch), both)
        assert torch.equal(logits_of(model, batch), outer)
        with pytest.raises(RuntimeError, match="stop"), masked(model, second):
            raise RuntimeError("stop")
        assert torch.equal(logits_of(model, batch), outer)
        with (
            pytest.raises(LifecycleError, match="1 experts would be left"),
            masked(model, keeping(model, [[4, 7]] * 2)),
        ):
            pass
        assert torch.equal(logits_of(model, batch), outer)
    assert torch.equal(logits_of(model, batch), before) and digest(model) == bits
    for layer in model.model.layers:
        assert not layer.mlp.gate._forward_hooks and not [name for name in vars(layer.mlp.gate) if "chrono" in name]


def test_gradients_flow_to_the_survivors_only() -> None:
    model = models.tiny_model("mixtral")
    with masked(model, keeping(model, KEPT)):
        model(**models.tiny_batch("mixtral")).loss.backward()
    for layer, kept in zip(model.model.layers, KEPT, strict=True):
        grad = layer.mlp.experts.down_proj.grad
        assert torch.isfinite(grad).all() and torch.isfinite(layer.mlp.gate.weight.grad).all()
        for expert in range(8):
            assert bool(grad[expert].any()) == (expert in kept)


def test_a_plan_of_another_model_is_refused() -> None:
    model, other = models.tiny_model("mixtral"), models.tiny_model("qwen3_moe")
    plan = keeping(model, KEPT)
    with pytest.raises(PlanMismatchError, match="Qwen3MoeTopKRouter"), masked(other, plan):
        pass
    fewer = models.tiny_model("mixtral", num_hidden_layers=1)
    with pytest.raises(PlanMismatchError, match="2 MoE layers, MixtralForCausalLM has 1"), masked(fewer, plan):
        pass
    wider = models.tiny_model("mixtral", num_local_experts=4)
    with pytest.raises(PlanMismatchError, match="2 of 8 experts"), masked(wider, plan):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("family", moe_zoo.ROUTED)
def test_no_family_chooses_a_masked_expert(family: str) -> None:
    model = moe_zoo.build(family).eval()
    moe_zoo.randomise(model)
    specs = layer_specs(model)
    layers = match_layers(model, specs)
    dropped = [tuple(range(0, s.num_experts, s.group_size)) if s.num_groups > 1 else (1,) for s in specs]
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids.flip(1)
    if family in REFUSED:
        with pytest.raises(LifecycleError, match="cannot be masked"), mask_experts(layers, dropped):
            pass
        return
    before = logits_of(model, batch)
    chosen: list[tuple[int, Tensor]] = []
    with mask_experts(layers, dropped) as masks:
        for index, layer in enumerate(layers):

            def look(router: Any, args: Any, output: Any, index: int = index, layer: Any = layer) -> None:
                routing = layer.adapter.read(router, output)
                kept = (
                    torch.ones_like(routing.index_TK, dtype=torch.bool) if routing.kept_TK is None else routing.kept_TK
                )
                chosen.append((index, routing.index_TK[kept]))

            layer.router.register_forward_hook(look)
        inside = logits_of(model, batch)
    assert all(mask.calls == 1 for mask in masks) or family.startswith("ernie4_5_vl")
    assert torch.isfinite(inside).all() and not torch.equal(inside, before)
    for index, experts in chosen:
        assert not set(experts.tolist()) & set(dropped[index])
    assert torch.equal(logits_of(model, batch), before)


def test_training_in_the_mask_resumes_where_it_stopped(tmp_path: Path) -> None:
    """Four steps in one go, and two and two with a checkpoint between: the same weights, and dropped ones unmoved."""

    def trainer(steps: int) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=steps,
            save_steps=2,
            weight_decay=0.0,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        made = Trainer(models.tiny_model("mixtral"), arguments, train_dataset=jobs.rows(64))
        chronomoe_hf.attach(made, ChronoConfig.observe())
        return made

    whole = trainer(4)
    plan = keeping(whole.model, KEPT)
    before = whole.model.model.layers[0].mlp.experts.down_proj.detach().clone()
    with masked(whole.model, plan):
        whole.train()
    after = whole.model.model.layers[0].mlp.experts.down_proj.detach()
    for expert in range(8):
        assert torch.equal(after[expert], before[expert]) == (expert not in KEPT[0])
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = trainer(4)
    with masked(resumed.model, plan):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert digest(resumed.model) == digest(whole.model)


@pytest.mark.slow
@pytest.mark.parametrize("family", moe_zoo.ROUTED)
def test_a_wrapped_router_masks_as_the_plain_one_and_records_what_was_dispatched(family: str) -> None:
    """Every family, cut in a run: the logits of the plain masked model, and no assignment of a dropped expert."""
    if family in REFUSED:
        return
    model = moe_zoo.build(family).eval()
    moe_zoo.randomise(model)
    specs = layer_specs(model)
    dropped = [tuple(range(0, s.num_experts, s.group_size)) if s.num_groups > 1 else (1,) for s in specs]
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids.flip(1)
    with mask_experts(match_layers(model, specs), dropped):
        plain = logits_of(model, batch)
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(model, ChronoConfig.observe()))
    for layer, ids_dropped in zip(system.layers, dropped, strict=True):
        layer.handle.mask = CutMask(layer.adapter, ids_dropped, layer.num_experts)
    with system.recording_eval():
        inside = logits_of(model, batch)
    assert torch.equal(inside, plain)
    snapshot = system.take_evaluation()
    assert snapshot is not None
    for layer, gone in zip(snapshot.layers, dropped, strict=True):
        assert layer.cut == list(gone) and not any(layer.expert_token_counts[expert] for expert in gone)
        assert layer.nonfinite_tokens == 0 and (layer.token_count > 0 or family.startswith("ernie4_5_vl"))
