"""Which pass a forward is, what it repeats, and that nothing changes where nothing is repeated."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from support import models
from torch import Tensor, nn

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of
from chronomoe_hf.errors import ConfigError, ReplayError
from chronomoe_hf.system import ChronoSystem

VOCAB = models.VOCAB


def wrapped(family: str = "qwen3_moe", preset: str = "observe", **settings: Any) -> tuple[nn.Module, ChronoSystem]:
    torch.manual_seed(0)
    model = models.tiny_model(family)
    settings = {f"replay__{name}": value for name, value in settings.items()}
    chronomoe_hf.wrap(model, ChronoConfig.preset(preset, interval=1, **settings))
    return model, system_of(model)


def batch(rows: int = 3, length: int = 10, pad: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Left-padded rows, the first one whole."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def rows_of(data: dict[str, Tensor]) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(data["input_ids"], data["attention_mask"], strict=True)]


class Used:
    """The ids that reach the experts of every layer, in order of the calls."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[tuple[int, Tensor]] = []
        layers = system_of(model).layers
        self.handles = [
            layer.experts.register_forward_pre_hook(self._hook(layer.layer_id)) for layer in layers if layer.experts
        ]

    def _hook(self, layer_id: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.calls.append((layer_id, args[1].detach().clone()))

        return hook

    def take(self) -> dict[int, list[Tensor]]:
        out: dict[int, list[Tensor]] = {}
        for layer_id, ids in self.calls:
            out.setdefault(layer_id, []).append(ids)
        self.calls.clear()
        return out


def made_up(system: ChronoSystem, tokens: list[int], rows: int, seed: int = 0) -> Tensor:
    """Routes of one row that no router would choose: (rows, layers, k)."""
    layer = system.layers[0]
    noise = torch.rand(rows, len(system.layers), layer.num_experts, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(-1)[..., : layer.top_k]


def fill(system: ChronoSystem, data: dict[str, Tensor], seed: int = 0) -> dict[int, Tensor]:
    """Made-up records of every row; the targets ``(T, k)`` of every layer, -1 where nothing is known."""
    num_rows, length = data["input_ids"].shape
    targets = {layer.layer_id: torch.full((num_rows, length, layer.top_k), -1) for layer in system.layers}
    for at, tokens in enumerate(rows_of(data)):
        routes = made_up(system, tokens, len(tokens) - 1, seed + at)
        system.replay.add(tokens, routes, prompt=3)
        places = data["attention_mask"][at].nonzero()[:, 0]
        for layer in system.layers:
            targets[layer.layer_id][at, places[:-1]] = routes[:, layer.layer_id]
    return {layer_id: each.reshape(-1, each.shape[-1]) for layer_id, each in targets.items()}


def sets(ids: Tensor) -> Tensor:
    return ids.sort(-1)[0]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen3_next"])
def test_the_rollout_mode_makes_old_and_gradient_pass_choose_what_was_recorded(family: str) -> None:
    model, system = wrapped(family, mode="rollout", max_mismatch=1.0)
    data = batch()
    targets, used = fill(system, data), Used(model)
    with torch.no_grad():
        model(**data)
    model(**data).logits.sum().backward()
    for layer_id, calls in used.take().items():
        assert len(calls) == 2
        known = (targets[layer_id] >= 0).all(-1)
        assert 0 < int(known.sum()) < len(known)
        for ids in calls:
            assert torch.equal(sets(ids[known]), sets(targets[layer_id][known]))
    for layer in system.layers:
        grad = layer.adapter.weight(layer.router).grad
        assert grad is not None and grad.abs().sum() > 0
    record = system.step(1).replay  # type: ignore[union-attr]
    assert record is not None and record["coverage"] == 1.0 and record["unknown_rows"] == 0
    assert record["pairs"]["rollout_old"]["mean"] > 0.5


def test_what_is_not_the_policy_is_neither_recorded_nor_repeated() -> None:
    model, system = wrapped(mode="rollout", max_mismatch=1.0)
    data = batch()
    plain, _ = wrapped()
    fill(system, data)
    plain.eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**data).logits, plain(**data).logits), "an evaluation was changed"
    model.train()
    plain.train()
    with torch.no_grad(), system.replay.apart():
        assert torch.equal(model(**data).logits, plain(**data).logits), "a pass set apart was changed"
    with torch.no_grad():
        assert not torch.equal(model(**data).logits, plain(**data).logits), "the old-policy pass repeats nothing"
        cache = model(**data, use_cache=True).past_key_values
        one = {"input_ids": data["input_ids"][:, -1:], "past_key_values": cache}
        before = system.replay.passes.sums.passes["old"]
        model(**one, attention_mask=torch.nn.functional.pad(data["attention_mask"], (0, 1), value=1))
    assert system.replay.passes.sums.passes["old"] == before, "a step of a generation is no old-policy pass"
    assert system.replay.store.count("old") == 0


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_measure_changes_no_bit_of_output_gradient_and_count(family: str) -> None:
    if family == "switch_transformers":
        pytest.skip("an encoder-decoder model, refused below")
    results = []
    for mode in ("off", "measure"):
        model, system = wrapped(family, mode=mode)
        data = batch()
        if mode == "measure":
            fill(system, data)
        with torch.no_grad():
            old = model(**data).logits
        new = model(**data).logits
        (new.float() ** 2).mean().backward()
        counts = system.take_sums()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((old, new, grads, counts))
    (old1, new1, grads1, counts1), (old2, new2, grads2, counts2) = results
    assert torch.equal(old1, old2) and torch.equal(new1, new2) and torch.equal(counts1, counts2)
    assert grads1.keys() == grads2.keys() and all(torch.equal(grads1[name], grads2[name]) for name in grads1)


def test_counts_are_those_of_the_used_ids() -> None:
    model, system = wrapped(mode="rollout", max_mismatch=1.0)
    data = batch()
    fill(system, data)
    used = Used(model)
    model(**data).logits.sum().backward()
    real = data["attention_mask"].reshape(-1).bool()
    calls = used.take()
    counts = system.step_state.row.count(system.take_sums())
    for layer in system.layers:
        expected = torch.bincount(calls[layer.layer_id][0][real].flatten(), minlength=layer.num_experts)
        assert torch.equal(counts[layer.layer_id].long(), expected)


def test_mode_old_repeats_the_old_pass_after_the_weights_have_moved() -> None:
    model, system = wrapped(mode="old")
    data = batch()
    used = Used(model)
    with torch.no_grad():
        model(**data)
        before = used.take()
        for layer in system.layers:
            weight = layer.adapter.weight(layer.router)
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    model(**data).logits.sum().backward()
    after, real = used.take(), data["attention_mask"].reshape(-1).bool()
    for layer_id, calls in before.items():
        assert torch.equal(sets(calls[0][real]), sets(after[layer_id][0][real])), "used flips are not 0"
    record = system.step(1).replay  # type: ignore[union-attr]
    assert record is not None and record["pairs"]["old_gradient"]["mean"] > 0.0, "no native choice moved: shows nothing"
    assert record["tokens_repeated"] == int(real.sum()) - len(real) // data["input_ids"].shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ratio_at_equal_weights_is_one_in_both_modes(dtype: torch.dtype) -> None:
    for mode in ("old", "rollout"):
        model, system = wrapped(mode=mode, max_mismatch=1.0)
        model.to(dtype)
        data = batch()
        if mode == "rollout":
            fill(system, data)
        with torch.no_grad():
            old = model(**data).logits.float().log_softmax(-1)
        new = model(**data).logits.float().log_softmax(-1)
        ratio = (new - old).exp()[data["attention_mask"].bool()][:-1]
        assert (ratio - 1).abs().max() <= 1e-5


def test_a_cut_expert_wins_over_a_recorded_one() -> None:
    model, system = wrapped(mode="rollout", max_mismatch=1.0)
    data = batch()
    targets = fill(system, data)
    dropped = 2
    from chronomoe_hf.lifecycle.live.masking import CutMask

    for layer in system.layers:
        layer.handle.mask = CutMask(layer.adapter, [dropped], layer.num_experts)
    used = Used(model)
    model(**data).logits.sum().backward()
    masked = 0
    for layer_id, (ids,) in used.take().items():
        assert not (ids == dropped).any()
        kept = (targets[layer_id] >= 0).all(-1) & (targets[layer_id] != dropped).all(-1)
        masked += int((targets[layer_id] == dropped).any(-1).sum())
        assert torch.equal(sets(ids[kept]), sets(targets[layer_id][kept]))
    record = system.step(1).replay  # type: ignore[union-attr]
    assert record is not None and sum(record["masked"]) == masked > 0


def test_own_rollout_is_covered_but_for_the_last_token_and_scored() -> None:
    model, system = wrapped(mode="measure")
    data = batch(length=6)
    with system.replay.rollout(pad_token_id=0) as tape, torch.no_grad():
        out = model.generate(**data, max_new_tokens=5, do_sample=True, pad_token_id=0)
        tape.end(out)
    new = out.shape[1] - 6
    mask = torch.cat([data["attention_mask"], torch.ones(3, new, dtype=torch.long)], 1)
    with torch.no_grad():
        logits = model(input_ids=out, attention_mask=mask).logits
    logp = logits[:, :-1].log_softmax(-1).gather(-1, out[:, 1:, None])[..., 0][:, -new:]
    system.replay.logps(out, mask, logp, gradient=False)
    snapshot = system.step(1)
    assert snapshot is not None and snapshot.replay is not None
    assert snapshot.replay["coverage"] == 1.0
    assert snapshot.replay["pairs"]["rollout_old"]["mean"] == 0.0, "fp32 and one model: the passes choose alike"
    seen = snapshot.replay["logps"]["rollout_old"]
    assert seen["tokens"] == 3 * new and seen["logp_diff_max"] < 1e-4, "log-probabilities of a rollout are shifted"
    assert snapshot.scalars()["moe/rollout_k3"] < 1e-8


def test_a_token_without_a_record_chooses_itself_or_stops_the_run() -> None:
    data, plain = batch(), wrapped()[0]
    model, _ = wrapped(mode="rollout")
    assert torch.equal(model(**data).logits, plain(**data).logits)
    model, system = wrapped(mode="rollout", on_missing="raise")
    with pytest.raises(ReplayError, match="3 of 3 rows are unknown"):
        model(**data)
    with pytest.raises(ReplayError, match="no record of the rollout pass"), torch.no_grad():
        model(**data)
    assert not system.replay.passes.active, "a failed forward left its pass open"


def shifted(routes: Tensor, how: str) -> Tensor:
    if how == "token":
        return torch.cat([routes[:1], routes[:-1]])
    return routes.roll(1, dims=1)


@pytest.mark.parametrize(("how", "words"), [("token", "one token late"), ("layer", "one layer"), ("row", "row")])
@pytest.mark.parametrize("mode", ["rollout", "measure"])
def test_routes_of_other_tokens_layers_or_rows_are_found_in_the_first_batch(how: str, words: str, mode: str) -> None:
    torch.manual_seed(0)
    config = models.tiny_config("qwen3_moe", num_hidden_layers=4, num_experts=16)
    model = type(models.tiny_model("qwen3_moe"))(config).train()
    data = batch(rows=4, length=24, pad=0)
    recorder = copy.deepcopy(model)
    chronomoe_hf.wrap(recorder, ChronoConfig.observe(replay__mode="measure", interval=1))
    with torch.no_grad():
        recorder(**data)
    store = system_of(recorder).replay.store
    chronomoe_hf.wrap(model, ChronoConfig.observe(replay__mode=mode, interval=1))
    system = system_of(model)
    rows = rows_of(data)
    routes = [store.find("old", np.array(row)).record.routes_NLK for row in rows]  # type: ignore[union-attr]
    for at, row in enumerate(rows):
        own = torch.from_numpy(routes[(at + 1) % len(rows)] if how == "row" else routes[at]).long()
        system.replay.add(row, own if how == "row" else shifted(own, how))
    if mode == "rollout":
        with pytest.raises(ReplayError, match="belong to other tokens, layers or weights") as caught, torch.no_grad():
            model(**data)
        message = str(caught.value)
    else:
        with torch.no_grad():
            model(**data)
        snapshot = system.step(1)
        assert snapshot is not None
        (alert,) = [alert for alert in snapshot.alerts if alert.kind == "REPLAY_INVALID"]
        message = alert.detail
    assert words in message.split("they are ")[1].split(".")[0], message


def test_routes_of_an_engine_with_other_weights_are_refused_and_the_cause_is_named() -> None:
    data = batch(rows=4, length=24, pad=0)
    torch.manual_seed(0)
    config = models.tiny_config("qwen3_moe", num_hidden_layers=4, num_experts=16)
    model = type(models.tiny_model("qwen3_moe"))(config).train()
    stale = copy.deepcopy(model)
    chronomoe_hf.wrap(stale, ChronoConfig.observe(replay__mode="measure", interval=1))
    with torch.no_grad():
        stale(**data)
        for name, weight in model.named_parameters():
            if "gate.weight" in name:
                weight.copy_(torch.randn_like(weight))
    chronomoe_hf.wrap(model, ChronoConfig.observe(replay__mode="rollout", interval=1))
    for row in rows_of(data):
        record = system_of(stale).replay.store.find("old", np.array(row)).record  # type: ignore[union-attr]
        system_of(model).replay.add(row, torch.from_numpy(record.routes_NLK).long())
    with pytest.raises(ReplayError, match="an engine that was not synced since"), torch.no_grad():
        model(**data)


@pytest.mark.parametrize("mode", ["measure", "old", "rollout"])
@pytest.mark.filterwarnings("ignore")
def test_a_model_compiled_in_a_loop_of_ones_own_is_never_silently_native(mode: str) -> None:
    model, system = wrapped(mode=mode)
    torch._dynamo.reset()
    torch.compile(model, backend="eager")(**batch()).logits.sum().backward()
    snapshot = system.step(1)
    assert snapshot is not None and snapshot.replay is not None
    assert snapshot.replay["passes"]["gradient"] == 0, "bad test setup: the forward was not traced"
    (alert,) = [alert for alert in snapshot.alerts if alert.kind == "REPLAY_IDLE"]
    assert "compile" in alert.detail


def test_what_cannot_be_looked_up_is_refused_by_name() -> None:
    model, _ = wrapped(mode="old")
    with pytest.raises(ReplayError, match="inputs_embeds"), torch.no_grad():
        model(inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(ReplayError, match="packed"), torch.no_grad():
        model(input_ids=torch.arange(3, 11)[None], position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
    with pytest.raises(ConfigError, match="encoder and decoder"):
        wrapped("switch_transformers", mode="measure")
    wrapped("switch_transformers", recompute="count")
    with pytest.raises(ConfigError, match=r"needs ReplayConfig\(mode="):
        wrapped()[1].replay.add([1, 2], None)


def test_two_models_and_copies_keep_their_own_records() -> None:
    one, first = wrapped(mode="measure")
    two, second = wrapped("mixtral", mode="measure")
    with torch.no_grad():
        one(**batch())
    assert (len(first.replay.store), len(second.replay.store)) == (3, 0)
    twin = copy.deepcopy(one)
    assert system_of(twin).replay.store is not first.replay.store
    assert system_of(twin).layers[0].handle.replay is system_of(twin).replay.passes
    with torch.no_grad():
        twin(**batch(rows=2))
    assert len(first.replay.store) == 3
    back = pickle.loads(pickle.dumps(one))
    assert len(system_of(back).replay.store) == 0
    chronomoe_hf.unwrap(one)
    assert torch.equal(one(**batch()).logits, wrapped()[0](**batch()).logits)
    assert two is not None
