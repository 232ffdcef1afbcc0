"""MoE blocks that are called in slices of a forward's rows, as tiled MLPs of long contexts do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import moe_zoo
from torch import Tensor, nn

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of
from chronomoe_hf.config import CoherenceConfig

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3")
OBSERVE = ChronoConfig.observe(interval=1, coherence=CoherenceConfig(max_tokens=None))
REAL = 11  # of 16 tokens a row


def blocks_of(model: Any) -> list[nn.Module]:
    return list(dict.fromkeys(parent for _, _, parent in moe_zoo.routers_of(model)))


def tile(model: Any, parts: int, flat: bool = False) -> None:
    """Call every MoE block with one slice of the sequence after the other; `flat` = of all rows, as DeepSpeed does."""
    for block in blocks_of(model):

        def forward(x: Tensor, native: Any = block.forward) -> Tensor:
            given = x.reshape(1, -1, x.shape[-1]) if flat else x
            return torch.cat([native(part.contiguous()) for part in given.chunk(parts, 1)], 1).view_as(x)

        block.forward = forward  # type: ignore[method-assign]


def built(family: str) -> Any:
    model = moe_zoo.build(family)
    moe_zoo.randomise(model)
    return model.train()


def batch(rows: int, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(4, 60, (rows, 16), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(16) < REAL).expand(rows, 16).long()
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("parts", [2, 3, 4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_slices_are_counted_as_the_whole(family: str, parts: int) -> None:
    whole, tiled = built(family), built(family)
    tile(tiled, parts)
    systems = []
    for model in (whole, tiled):
        chronomoe_hf.wrap(model, OBSERVE)
        systems.append(system_of(model))
    # What is read of outputs goes by the forward before, so the first one is left out there.
    for step in (1, 2):
        for model in (whole, tiled):
            model(**batch(1, step))
        want, got = (system.step(step) for system in systems)
        assert want is not None and got is not None
        assert [layer.tokens for layer in got.layers] == [REAL] * len(got.layers)
        for one, other in zip(want.layers, got.layers, strict=True):
            assert other.expert_token_counts == one.expert_token_counts
            assert other.notes == one.notes
    for one, other in zip(want.layers, got.layers, strict=True):
        for name in ("mean_norm", "gate_sum"):  # phi is of a call, and so of a slice
            assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_of_several_rows_are_told(family: str) -> None:
    model = built(family)
    tile(model, 4, flat=True)
    chronomoe_hf.wrap(model, OBSERVE)
    model(**batch(3))
    snapshot = system_of(model).step(1)
    assert snapshot is not None
    for layer in snapshot.layers:
        assert layer.tokens == 3 * 16 and any("padding is counted as real tokens" in note for note in layer.notes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_of_the_rows_alone_is_no_slice(family: str) -> None:
    """A block that is given only some rows (one of two modalities): which ones is not known."""
    model = built(family)
    for block in blocks_of(model):

        def forward(x: Tensor, native: Any = block.forward) -> Tensor:
            return torch.cat([x[:, :8], native(x[:, 8:].contiguous())], 1)

        block.forward = forward  # type: ignore[method-assign]
    chronomoe_hf.wrap(model, OBSERVE)
    for step in (1, 2):
        model(**batch(1))
        snapshot = system_of(model).step(step)
        assert snapshot is not None
        assert all(layer.tokens == 8 for layer in snapshot.layers)
        assert all(
            any("the router sees 8 rows, the mask has 16" in note for note in layer.notes) for layer in snapshot.layers
        )


def test_slices_that_change_from_forward_to_forward_are_counted() -> None:
    model = built("mixtral")
    native = [block.forward for block in blocks_of(model)]
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    for step, parts in enumerate((4, 1, 2, 16), 1):
        for block, forward in zip(blocks_of(model), native, strict=True):
            block.forward = forward
        tile(model, parts)
        model(**batch(1, step))
        snapshot = system_of(model).step(step)
        assert snapshot is not None and [layer.tokens for layer in snapshot.layers] == [REAL] * 2, parts
