"""Activation checkpointing: the recompute chooses what its own forward chose, in any order, or the run stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import models
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of
from chronomoe_hf.errors import ReplayError
from chronomoe_hf.patches import registry
from chronomoe_hf.system import ChronoSystem


def data(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, models.VOCAB, (2, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def made(family: str, experts: str, reentrant: bool | None, **settings: Any) -> tuple[nn.Module, ChronoSystem]:
    torch.manual_seed(0)
    model = models.tiny_model(family)
    model.set_experts_implementation(experts)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    settings = {f"replay__{name}": value for name, value in settings.items()}
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1, **settings))
    return model, system_of(model)


def random_routes(system: ChronoSystem, batch: dict[str, Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = system.layers[0]
    for row in batch["input_ids"].tolist():
        noise = torch.rand(len(row), len(system.layers), layer.num_experts, generator=generator)
        system.replay.add(row, noise.argsort(-1)[..., : layer.top_k])


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(**batch).logits.float() ** 2).mean()


def gradients(model: nn.Module, order: str, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    model.zero_grad()
    if order == "fb fb":
        for batch in batches:
            loss_of(model, batch).backward()
    else:
        losses = [loss_of(model, batch) for batch in batches]
        for loss in reversed(losses) if order == "ff bb" else losses:
            loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", ["fb fb", "ff bb", "ff bb forwards"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_are_those_without(reentrant: bool, experts: str, order: str) -> None:
    batches, results = [data(1), data(2)], []
    for kind in (None, reentrant):
        model, system = made("qwen3_moe", experts, kind, mode="rollout", max_mismatch=1.0)
        for seed, batch in enumerate(batches):
            random_routes(system, batch, seed)
        results.append(gradients(model, order, batches))
        record = system.step(1).replay  # type: ignore[union-attr]
        assert record is not None and ("recompute" in record) == (kind is not None)
        if kind is not None:
            assert record["recompute"]["flips"] == [0.0, 0.0]
    plain, checkpointed = results
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        assert torch.equal(checkpointed[name], grad), f"{name}: {(checkpointed[name] - grad).abs().max()}"


def test_without_the_targets_the_gradient_would_be_another_one() -> None:
    """What the test above can find: the recompute forgets what it was told."""
    results = []
    for forget in (False, True):
        model, system = made("qwen3_moe", "grouped_mm", True, mode="rollout", max_mismatch=1.0)
        random_routes(system, data(1), 0)
        loss = loss_of(model, data(1))
        if forget:
            for layer in system.layers:
                layer.handle.replay = None
        loss.backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (results[0] - results[1]).abs().max() > 1e-3 * results[0].abs().max()


@pytest.mark.parametrize("mode", ["old", "rollout"])
def test_a_missing_target_raises(mode: str) -> None:
    model, system = made("mixtral", "eager", True, mode=mode)
    loss = loss_of(model, data(1))
    system.step(1)  # forgets what waits: a step between a forward and its backward
    with pytest.raises(ReplayError, match="whose choices are not there any more"):
        loss.backward()


def test_a_recompute_of_something_else_raises_before_the_optimizer_moves() -> None:
    model, system = made("mixtral", "eager", True, mode="rollout")
    loss = loss_of(model, data(1))
    waiting = system.replay.passes.pending._waiting
    for layer_id, (one,) in waiting.items():
        waiting[layer_id] = [type(one)((one.own_TK + 1) % 8, one.given_TK)]
    loss.backward()
    with pytest.raises(ReplayError, match="matches its forward in only"):
        system.replay.check()


class Wobble:
    """Adds noise to a router's input in its recompute alone: what GPU kernels do by another order of their sums."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        self.scale, self.hits = scale, 0
        for layer in system_of(model).layers:
            layer.router.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: Any) -> Any:
        if torch._C._current_graph_task_id() == -1:
            return None
        self.hits += 1
        noise = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(self.hits))
        return (args[0] + self.scale * noise, *args[1:])


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen3_next"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_count_sees_flips_and_pin_takes_them_away(family: str, reentrant: bool) -> None:
    found = {}
    for recompute in ("count", "pin"):
        model, system = made(family, "eager", reentrant, recompute=recompute)
        used: dict[int, list[Tensor]] = {}
        for layer in system.layers:
            assert layer.experts is not None
            layer.experts.register_forward_pre_hook(
                lambda module, args, at=layer.layer_id, used=used: used.setdefault(at, []).append(args[1].sort(-1)[0])
            )
        wobble = Wobble(model, 0.05)
        flipped = failed = False
        try:
            loss_of(model, data(1)).backward()
        except CheckpointError:  # non-reentrant: the flip shows in the shapes of what eager experts save
            failed = True
        for forward, *again in used.values():
            flipped |= any(not torch.equal(forward, each) for each in again)
        record = system.step(1).replay  # type: ignore[union-attr]
        assert record is not None and wobble.hits
        found[recompute] = flipped or failed, max(value or 0.0 for value in record["recompute"]["flips"])
    assert found["count"][0] and found["count"][1] > 0.0, "no choice flipped: shows nothing"
    assert not found["pin"][0] and found["pin"][1] > 0.0, "a pinned recompute chose something else"


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
@pytest.mark.parametrize("recompute", ["count", "pin"])
def test_where_nothing_flips_no_bit_changes(family: str, recompute: str) -> None:
    results = []
    for kind in ("off", recompute):
        torch.manual_seed(0)
        model = models.tiny_model(family)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1, replay__recompute=kind))
        batch = models.tiny_batch(family, padded=True)
        output = model(**batch)
        output.loss.backward()
        counts = system_of(model).take_sums()
        results.append((output.logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, counts))
    (logits, grads, counts), (logits2, grads2, counts2) = results
    assert torch.equal(logits, logits2) and torch.equal(counts, counts2)
    assert grads.keys() == grads2.keys() and all(torch.equal(grads[name], grads2[name]) for name in grads)


def test_what_waits_does_not_pile_up() -> None:
    model, system = made("qwen3_moe", "eager", False, recompute="pin")
    for seed in range(6):
        loss_of(model, data(seed)).backward()
        assert all(len(each) == 1 for each in system.replay.passes.pending._waiting.values())
    system.step(1)
    assert not system.replay.passes.pending._waiting
    model, system = made("qwen3_moe", "eager", None, recompute="count")
    loss_of(model, data(1)).backward()
    system.step(1)
    assert not system.replay.passes.pending._waiting, "without checkpointing what waits goes with the step"


def test_phimoe_is_counted_and_not_pinned() -> None:
    """It samples in training: a pinned choice would be weighed as in evaluation, and its forward was not."""
    assert {a.router_class for a in registry.all_adapters() if a.samples} == {"PhimoeTopKRouter"}
    from support import moe_zoo

    results = []
    for recompute in ("off", "pin"):
        model = moe_zoo.build("phimoe").train()
        moe_zoo.randomise(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1, replay__recompute=recompute))
        torch.manual_seed(3)
        loss_of(model, data(1)).backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
