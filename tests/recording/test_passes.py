"""A batch counts once, whichever of its passes has the gradient: in a plain forward, or inside backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import tiny_batch, tiny_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from chronomoe_hf import ChronoConfig, system_of, wrap


def watched(family: str = "qwen3_moe") -> Any:
    return wrap(tiny_model(family).model, ChronoConfig.observe(interval=1, alerts__min_window_tokens=1)).train()


def batch(seed: int, family: str = "qwen3_moe") -> dict[str, Tensor]:
    made = tiny_batch(family, padded=True, seed=seed)
    made.pop("labels")
    return made


def _events(model: Any, step: int) -> list[Any]:
    system = system_of(model)
    system.step(step)
    return list(system.last_snapshot.layers)


def plain(seeds: list[int], family: str = "qwen3_moe") -> list[int]:
    """Tokens of each layer where every batch goes through once."""
    model = watched(family)
    for seed in seeds:
        model(**batch(seed, family)).last_hidden_state.sum().backward()
    return [layer.tokens for layer in _events(model, 1)]


def shares(model: Any, step: int) -> list[Any]:
    return [(layer.tokens, layer.n_effective, layer.top2_share, layer.max_violation) for layer in _events(model, step)]


def expected(seeds: list[int]) -> list[Any]:
    model = watched()
    for seed in seeds:
        model(**batch(seed)).last_hidden_state.sum().backward()
    return shares(model, 1)


def cached(model: Any, parts: list[dict[str, Tensor]]) -> None:
    """A loss whose forwards with gradient run inside backward, part by part (GradCache, cached contrastive losses)."""
    with torch.no_grad():
        held = [model(**part).last_hidden_state.mean(1) for part in parts]
    leaves = [value.detach().requires_grad_() for value in held]
    loss = torch.cat(leaves).pow(2).sum()

    def again(grad: Tensor) -> None:
        with torch.enable_grad():
            for part, leaf in zip(parts, leaves, strict=True):
                out = model(**part).last_hidden_state.mean(1)
                torch.dot(out.flatten(), (2 * leaf).detach().flatten()).backward()

    gate = torch.ones((), requires_grad=True)
    gate.register_hook(again)
    (loss.detach() * gate).backward()


@pytest.mark.parametrize("preset", ["observe", "balance"])
def test_a_cached_loss_counts_once(preset: str) -> None:
    model = wrap(
        tiny_model("qwen3_moe").model, getattr(ChronoConfig, preset)(interval=1, alerts__min_window_tokens=1)
    ).train()
    cached(model, [batch(1), batch(2), batch(3)])
    assert shares(model, 1) == expected([1, 2, 3])
    cached(model, [batch(4)])
    cached(model, [batch(5)])
    assert [layer.tokens for layer in _events(model, 2)] == plain([4, 5])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_whole_model_that_is_checkpointed_counts_once(reentrant: bool, accumulation: int) -> None:
    model = watched()

    def run(embeds: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        return out

    for seed in range(accumulation):
        one = batch(seed)
        embeds = model.get_input_embeddings()(one["input_ids"])
        checkpoint(run, embeds, one["attention_mask"], use_reentrant=reentrant).sum().backward()
    assert shares(model, 1) == expected(list(range(accumulation)))


def test_a_reference_pass_does_not_make_a_recompute_count() -> None:
    model = watched()
    one = batch(1)

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return out

    first = checkpoint(run, one["input_ids"], one["attention_mask"], use_reentrant=False)
    with torch.no_grad():
        run(one["input_ids"], one["attention_mask"])  # the reference model of a preference loss is the model itself
    first.sum().backward()
    assert shares(model, 1) == expected([1])


def test_only_passes_without_gradient_are_named() -> None:
    model = watched()
    with torch.no_grad():
        model(**batch(1))
        model(**batch(2))
    first = _events(model, 1)[0]
    assert first.tokens == 0
    assert any("its 2 forwards in training mode ran under torch.no_grad()" in note for note in first.notes)
    model(**batch(1)).last_hidden_state.sum().backward()
    assert not [note for note in _events(model, 2)[0].notes if "no_grad" in note]


def test_only_passes_inside_backward_are_named() -> None:
    model = watched()
    one = batch(1)
    gate = torch.ones((), requires_grad=True)

    def inside(grad: Tensor) -> None:
        with torch.enable_grad():
            model(**one).last_hidden_state.sum().backward()

    gate.register_hook(inside)
    gate.backward()
    first = _events(model, 1)[0]
    assert first.tokens == 0 and any("1 forwards with gradient ran inside backward" in note for note in first.notes)


def test_parts_of_outputs_are_read_in_the_same_micro_batches() -> None:
    """``CoherenceConfig(every=2)`` goes by the micro-batches that count, whatever ran without gradient between."""

    def rows(interrupted: bool) -> list[list[int]]:
        config = ChronoConfig.observe(interval=1, coherence__every=2, alerts__min_window_tokens=1)
        model = wrap(tiny_model("qwen3_moe").model, config).train()
        found = []
        for step in (1, 2, 3):
            for seed in (2 * step, 2 * step + 1):
                if interrupted:
                    with torch.no_grad():
                        model(**batch(seed + 50))
                model(**batch(seed)).last_hidden_state.sum().backward()
            system = system_of(model)
            before = system.step_state.row.expert(system.take_sums(), "phi_rows")
            found.append(before.int().tolist())
        return found

    assert rows(True) == rows(False) and any(any(row) for step in rows(False) for row in step)
