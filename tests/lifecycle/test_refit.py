"""refit: the normal equations of a real layer, what it refuses, and that nothing else moves."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support import models, moe_zoo
from support.idle import with_idle
from support.plans import digest, keeping

import chronomoe_hf
from chronomoe_hf import ChronoConfig, lifecycle
from chronomoe_hf.errors import LifecycleError, PlanMismatchError
from chronomoe_hf.lifecycle import layer_specs, masked, measure, refit
from chronomoe_hf.lifecycle.live.fit_model import CutReader
from chronomoe_hf.lifecycle.live.model import live_layers
from chronomoe_hf.lifecycle.live.streams import find_streams

KEPT = [[0, 2, 3, 5, 7], [1, 2, 4, 6, 7]]
NOT_REFITTED = {
    "jetmoe": "cannot be reached",
    "diffusion_gemma": "language-model head",
    "dbrx": "one flattened weight",
    "deepseek_v4": "cannot be masked",
    "nllb_moe": "cannot be reached",
    "llama4": "scales the input",
    "longcat_flash": "identities",
    "zaya": "no down_proj of shape",
    "muse_spark": "are not its output projection",
    "ernie4_5_vl_moe": "called 0 times",  # text alone does not call the experts of images
}


def smooth(**fields: Any) -> Any:
    """A tiny Mixtral with decisive routers, whose other weights are small enough for layers to be near-linear."""
    model = models.tiny_model("mixtral", train=False, initializer_range=0.05, **fields)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(10.0)
    return model


def batches(count: int = 6, *, length: int = 64, padded: bool = True) -> list[dict[str, Any]]:
    made = [models.tiny_batch("mixtral", seed=50 + i, batch=8, length=length, padded=padded) for i in range(count)]
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in made]


def layer_inputs(model: Any, index: int, made: list[dict[str, Any]]) -> np.ndarray:
    """What the experts of a layer read for real tokens."""
    rows: list[torch.Tensor] = []
    handle = model.model.layers[index].mlp.experts.register_forward_pre_hook(lambda m, args: rows.append(args[0]))
    real = []
    with torch.no_grad():
        for batch in made:
            model(**batch)
            real.append(batch["attention_mask"].reshape(-1).bool())
    handle.remove()
    return torch.cat([row[mask] for row, mask in zip(rows, real, strict=True)]).double().numpy()


def routed(router: Any, hidden: np.ndarray, kept: list[int]) -> np.ndarray:
    """Dense weights (tokens, experts) of a softmax router that has only the experts `kept`."""
    z = hidden @ router.weight.detach().double().numpy().T
    z[:, [e for e in range(z.shape[1]) if e not in kept]] = -np.inf
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    weights = np.zeros_like(p)
    for token, row in enumerate(p):
        best = np.argsort(row)[-router.top_k :]
        weights[token, best] = row[best] / row[best].sum()
    return weights


def activations(experts: Any, hidden: np.ndarray, expert: int) -> np.ndarray:
    up = hidden @ experts.gate_up_proj[expert].detach().double().numpy().T
    gate, value = np.split(up, 2, axis=-1)
    return gate / (1.0 + np.exp(-gate)) * value


def test_refit_solves_the_normal_equations_of_the_layer() -> None:
    """Every kept projection of both layers, from the definition, in one joint solve."""
    model = smooth()
    before = copy.deepcopy(model)
    made = batches()
    report = refit(model, keeping(model, KEPT), made, ridge=0.05, sweeps=400, sequential=False, held_out=0.2)
    assert report.applied and report.kl_after < report.kl_before
    assert all(layer.error_after < layer.error_before for layer in report.layers)
    for index, kept in enumerate(KEPT):
        block = before.model.layers[index].mlp
        fit = layer_inputs(before, index, made[:-1])
        full, cut = routed(block.gate, fit, list(range(8))), routed(block.gate, fit, kept)
        down = block.experts.down_proj.detach().double().numpy()
        outputs = {e: activations(block.experts, fit, e) for e in range(8)}
        target = sum((full - cut)[:, e : e + 1] * (outputs[e] @ down[e].T) for e in range(8))
        design = np.concatenate([cut[:, e : e + 1] * outputs[e] for e in kept], axis=1)
        gram = design.T @ design
        weight = 0.05 * np.diag(gram).mean()
        change = np.linalg.solve(gram + weight * np.eye(len(gram)), design.T @ target)
        after = model.model.layers[index].mlp.experts.down_proj.detach().double().numpy()
        for slot, expert in enumerate(kept):
            expected = down[expert] + change[32 * slot : 32 * slot + 32].T
            np.testing.assert_allclose(after[expert], expected, atol=2e-3 * np.abs(down).max())
        # the report's errors, on the batch that was held out
        held = layer_inputs(before, index, made[-1:])
        full, cut = routed(block.gate, held, list(range(8))), routed(block.gate, held, kept)
        outputs = {e: activations(block.experts, held, e) for e in range(8)}
        wanted = sum(full[:, e : e + 1] * (outputs[e] @ down[e].T) for e in range(8))
        for weights, error in ((down, report.layers[index].error_before), (after, report.layers[index].error_after)):
            got = sum(cut[:, e : e + 1] * (outputs[e] @ weights[e].T) for e in kept)
            assert float(((wanted - got) ** 2).sum() / (wanted**2).sum()) == pytest.approx(error, rel=1e-3)


def stream_after(model: Any, index: int, made: list[dict[str, Any]]) -> np.ndarray:
    """Hidden states of real tokens behind a block."""
    rows: list[torch.Tensor] = []
    handle = model.model.layers[index].register_forward_hook(lambda m, args, out: rows.append(out))
    with torch.no_grad():
        for batch in made:
            model(**batch)
    handle.remove()
    real = [batch["attention_mask"].bool() for batch in made]
    return torch.cat([row[mask] for row, mask in zip(rows, real, strict=True)]).double().numpy()


def test_a_sequential_refit_makes_up_for_what_the_layer_before_it_lost() -> None:
    """The second layer from the definition: on what the cut and refitted first layer gives, towards the full stream."""
    model = smooth()
    full = copy.deepcopy(model)
    made, plan = batches(), keeping(smooth(), KEPT)
    report = refit(model, plan, made, ridge=0.05, sweeps=400, held_out=0.2)
    assert report.applied and report.sequential and report.to_record()["sequential"] is True
    half = copy.deepcopy(full)  # the first layer refitted and cut, the second as it was and cut
    with torch.no_grad():
        half.model.layers[0].mlp.experts.down_proj.copy_(model.model.layers[0].mlp.experts.down_proj)
    block, kept = half.model.layers[1].mlp, KEPT[1]
    with masked(half, plan):
        fit, cut_stream = layer_inputs(half, 1, made[:-1]), stream_after(half, 1, made[:-1])
    wanted = stream_after(full, 1, made[:-1]) - cut_stream
    cut = routed(block.gate, fit, kept)
    design = np.concatenate([cut[:, e : e + 1] * activations(block.experts, fit, e) for e in kept], axis=1)
    gram = design.T @ design
    change = np.linalg.solve(gram + 0.05 * np.diag(gram).mean() * np.eye(len(gram)), design.T @ wanted)
    old = full.model.layers[1].mlp.experts.down_proj.detach().double().numpy()
    after = model.model.layers[1].mlp.experts.down_proj.detach().double().numpy()
    for slot, expert in enumerate(kept):
        expected = old[expert] + change[32 * slot : 32 * slot + 32].T
        np.testing.assert_allclose(after[expert], expected, atol=2e-3 * np.abs(old).max())
    # and it pays: the same text, the same ridge, layer by layer against all at once
    at_once = copy.deepcopy(full)
    other = refit(at_once, plan, made, ridge=0.05, sweeps=400, held_out=0.2, sequential=False)
    assert report.kl_after < other.kl_after < other.kl_before == report.kl_before


def test_blocks_that_are_skipped_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six layers: from the third on the earlier blocks are not run again. Against a reader that runs them all."""
    kept = [[e for e in range(8) if e != layer] for layer in range(6)]
    runs, results = [], []
    for skip in (True, False):
        model = smooth(num_hidden_layers=6)
        calls = [0]
        model.model.layers[0].self_attn.register_forward_hook(
            lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1)
        )
        monkeypatch.setattr(CutReader, "skips", skip)
        report = refit(model, keeping(model, kept), batches())
        assert report.applied
        runs.append(calls[0])
        results.append(digest(model))
    assert results[0] == results[1]
    assert runs[0] < runs[1] - 6 * 2, "nothing was skipped"


@pytest.mark.parametrize(
    ("family", "name", "factor"),
    [
        ("mixtral", "model.layers.{}", 1.0),
        ("deepseek_v3", "model.layers.{}", 1.0),
        ("switch_transformers", "{}.block.1", 1.0),
        ("cohere2_moe", "model.layers.{}", 0.5),  # averaged with its shared expert
        ("afmoe", "block", 1.0),  # a norm stands between its experts and the stream
        ("flex_olmo", "block", 1.0),
        ("gemma4", "", 1.0),  # and here right behind the experts
    ],
)
def test_where_the_routed_output_is_added_up(family: str, name: str, factor: float) -> None:
    model = moe_zoo.build(family).eval()
    moe_zoo.randomise(model)
    layers = live_layers(model)
    with torch.no_grad():
        streams = find_streams(model, layers, zoo_batches(model)[0])
    assert len(streams) == len(layers)
    for stream, layer in zip(streams, layers, strict=True):
        assert stream.factor == pytest.approx(factor, rel=1e-3)
        if name in ("", "block"):  # the experts themselves, or the block that holds them and shared ones
            assert stream.name == (layer.name.rpartition(".")[0] if name else "")
        else:
            prefix = layer.name.split(".")[0] if family == "switch_transformers" else layer.name.split(".")[2]
            assert stream.name == name.format(prefix)


@pytest.mark.parametrize("repeatable", [True, False])
def test_streams_cost_two_forwards_whatever_the_depth(repeatable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = smooth(num_hidden_layers=6)
    layers, batch = live_layers(model), batches(1)[0]
    seen = [0] * 6
    for at, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(lambda *_, at=at: seen.__setitem__(at, seen[at] + 1))
    if not repeatable:  # a second forward of this block raises: it is followed in two forwards of its own
        block = model.model.layers[3]
        native, calls = block.forward, [0]

        def once(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == 2:
                raise ValueError("this block has run")
            return native(*args, **kwargs)

        monkeypatch.setattr(block, "forward", once)
    with torch.no_grad():
        streams = find_streams(model, layers, batch)
    assert [(s.name, s.factor) for s in streams] == [
        (f"model.layers.{at}", pytest.approx(1.0, rel=1e-3)) for at in range(6)
    ]
    assert seen == ([2] * 6 if repeatable else [4, 4, 4, 3, 2, 2])


def test_only_the_survivors_projections_move_and_undo_gives_every_bit_back() -> None:
    model = smooth()
    bits, before = digest(model), {name: value.clone() for name, value in model.state_dict().items()}
    report = refit(model, keeping(model, KEPT), batches())
    assert report.applied and not model.training
    for name, value in model.state_dict().items():
        if not name.endswith("down_proj"):
            assert torch.equal(value, before[name]), name
            continue
        kept = KEPT[int(name.split(".")[2])]
        for expert in range(8):
            assert torch.equal(value[expert], before[name][expert]) == (expert not in kept)
    report.undo()
    assert digest(model) == bits and not report.applied
    report.undo()
    assert digest(model) == bits


def test_every_change_of_a_live_model_is_taken_back_in_one_way() -> None:
    """A mask, a refit and a split: each a context that leaves every bit as it was, the last two by ``undo()`` too."""
    model = smooth()
    plan, bits = keeping(model, KEPT), digest(model)
    with masked(model, plan):
        cut = model(**batches(1)[0]).logits
    with refit(model, plan, batches()) as report:
        assert report.applied and digest(model) != bits
    assert digest(model) == bits and not report.applied
    assert not torch.equal(model(**batches(1)[0]).logits, cut)
    with pytest.raises(ZeroDivisionError), refit(model, plan, batches()):
        raise ZeroDivisionError
    assert digest(model) == bits, "also where the block fails"
    idle = with_idle()
    was = digest(idle)
    with lifecycle.apply(idle, lifecycle.plan_split(idle, batches())) as done:
        assert digest(idle) != was
    assert digest(idle) == was
    done.undo()
    assert digest(idle) == was


def test_what_was_trained_since_a_refit_cannot_be_undone() -> None:
    model = smooth()
    report = refit(model, keeping(model, KEPT), batches())
    assert report.applied
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.mul_(1.5)
    now = digest(model)
    with pytest.raises(LifecycleError, match="trained or loaded since the refit"):
        report.undo()
    assert digest(model) == now and report.applied


@pytest.mark.parametrize("wrapped", [False, True])
def test_it_takes_damage_away_on_text_that_it_has_not_seen(wrapped: bool) -> None:
    model = smooth().train()
    if wrapped:
        model = chronomoe_hf.wrap(model, ChronoConfig.observe())
    plan = keeping(model, KEPT)
    unseen = [models.tiny_batch("mixtral", seed=900 + i, batch=8, length=64) for i in range(3)]
    before = measure(model, plan, unseen, controls=0, worst=False).plan.kl
    dense = copy.deepcopy(model).eval()
    report = refit(model, plan, batches(12))
    assert report.applied and model.training
    model.eval()
    kl = 0.0
    with torch.no_grad():
        for batch in unseen:
            p = dense(**batch).logits[:, :-1].log_softmax(-1)
            with masked(model, plan):
                q = model(**batch).logits[:, :-1].log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum(-1).mean()) / len(unseen)
    assert kl < 0.75 * before


def test_few_passes_or_many_give_the_same() -> None:
    results = []
    for memory in (2.0, 1e-9):
        model = smooth()
        lines: list[str] = []
        refit(model, keeping(model, KEPT), batches(), memory_gb=memory, progress=lines.append)
        results.append(digest(model))
        assert [line.split(":")[0] for line in lines] == ["layer 0", "layer 1"]
    assert results[0] == results[1]


def test_a_refit_that_does_not_help_is_refused_and_changes_nothing() -> None:
    """Fitted on a handful of tokens with no ridge to speak of: it fits them, and fails on the held-out ones."""
    model = smooth()
    bits = digest(model)
    few = batches(2, length=5)
    few[0] = {name: value[:1] for name, value in few[0].items()}
    report = refit(model, keeping(model, KEPT), few, ridge=1e-4, held_out=0.5)
    assert not report.applied and ("does not fall" in report.reason or "no layer" in report.reason)
    assert digest(model) == bits and not any(layer.applied for layer in report.layers)
    assert report.to_record()["layers"][0]["layer_id"] == 0


def test_few_tokens_for_the_width_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = smooth()
    report = refit(model, keeping(model, KEPT), batches(1))
    routed_rows = report.layers[0].tokens * 2 / 5  # two experts a token, five survivors
    assert report.layers[0].rows_per_width == pytest.approx(routed_rows / 32, rel=0.5)
    warned = [record.message for record in caplog.records if "tokens per input" in record.message]
    assert len(warned) == (min(layer.rows_per_width for layer in report.layers) < 4.0)
    caplog.clear()
    report.undo()
    many = refit(model, keeping(model, KEPT), batches(24))
    assert min(layer.rows_per_width for layer in many.layers) >= 4.0
    assert not [record for record in caplog.records if "tokens per input" in record.message]


def test_bf16_weights_are_solved_in_fp32() -> None:
    model = smooth(dtype=torch.bfloat16)
    report = refit(model, keeping(model, KEPT), batches(12))
    assert report.applied and model.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    wide = smooth(dtype=torch.bfloat16).float()
    reference = refit(wide, keeping(wide, KEPT), batches(12))
    for ours, theirs in zip(report.layers, reference.layers, strict=True):
        assert ours.error_after == pytest.approx(theirs.error_after, rel=0.1)


def test_a_single_batch_is_split_by_sequences_and_one_sequence_is_too_few() -> None:
    model = smooth()
    assert refit(model, keeping(model, KEPT), batches(1)).layers[0].tokens > 0
    alone = [{name: value[:1] for name, value in batches(1)[0].items()}]
    with pytest.raises(LifecycleError, match="two sequences"):
        refit(model, keeping(model, KEPT), alone)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ridge": 0.0}, "ridge"),
        ({"sweeps": 0}, "sweeps"),
        ({"held_out": 1.0}, "held_out"),
        ({"held_out": 0.0}, "held_out"),
    ],
)
def test_bad_settings_are_refused_before_anything_changes(fields: dict[str, Any], words: str) -> None:
    model = smooth()
    bits = digest(model)
    with pytest.raises(LifecycleError, match=words):
        refit(model, keeping(model, KEPT), batches(2), **fields)
    assert digest(model) == bits


def test_adapters_that_are_not_merged_other_models_and_no_text_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = smooth()
    plan = keeping(model, KEPT)
    with pytest.raises(LifecycleError, match="at least one batch"):
        refit(model, plan, [])
    with pytest.raises(PlanMismatchError):
        refit(models.tiny_model("qwen3_moe"), plan, batches(2))
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_parameters=targets, r=2))
    bits = digest(adapted)
    with pytest.raises(LifecycleError, match="merge_and_unload"):
        refit(adapted, plan, batches(2))
    assert digest(adapted) == bits
    merged = adapted.merge_and_unload()
    assert refit(merged, plan, batches()).applied


def test_a_model_with_nan_weights_is_refused() -> None:
    model = smooth()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[0, 0, 0] = float("nan")
    with pytest.raises(LifecycleError, match="not finite|are not its output"):
        refit(model, keeping(model, KEPT), batches(2))


def zoo_batches(model: Any) -> list[dict[str, Any]]:
    out = []
    for seed in range(6):
        ids = torch.randint(3, 60, (12, 24), generator=torch.Generator().manual_seed(seed))
        out.append({"input_ids": ids})
        if getattr(model.config, "is_encoder_decoder", False):
            out[-1]["decoder_input_ids"] = ids.flip(1)
    return out


def check_family(family: str) -> None:
    """The errors of a strong ridge fall on the tokens of the fit, and the module's own outputs say the same."""
    model = moe_zoo.build(family).eval()
    moe_zoo.randomise(model)
    kept = [
        [e for e in range(s.num_experts) if (e % s.group_size if s.num_groups > 1 else e) != 0]
        for s in layer_specs(model)
    ]
    plan = keeping(model, kept)
    bits = digest(model)
    if family in NOT_REFITTED:
        with pytest.raises(LifecycleError, match=NOT_REFITTED[family]):
            refit(model, plan, zoo_batches(model))
        assert digest(model) == bits
        return
    if "logits" not in model(**zoo_batches(model)[0]):
        with pytest.raises(LifecycleError, match="language-model head"):
            refit(model, plan, zoo_batches(model))
        return
    report = refit(model, plan, zoo_batches(model), ridge=1.0)
    assert len(report.layers) == len(kept) and all(layer.error_before > 1e-4 for layer in report.layers)
    assert any(layer.error_after < layer.error_before for layer in report.layers), report.layers
    report.undo()
    assert digest(model) == bits


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "switch_transformers", "muse_spark", "llama4"])
def test_layouts(family: str) -> None:
    check_family(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", moe_zoo.ROUTED)
def test_every_family(family: str) -> None:
    check_family(family)
