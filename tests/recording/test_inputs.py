"""Router inputs on the tape: layers summed together get what each would get alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chronomoe_hf.lens.direction import finite_rows, input_sums, sums_width
from chronomoe_hf.recording.inputs import InputTape
from chronomoe_hf.recording.rows import sample_tokens

WIDTH, TOKENS = 6, 41
CPU = torch.device("cpu")


def calls(count: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs with a common part, one row not finite; and which rows are real."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(TOKENS) % 7 != 3
    made = []
    for at in range(count):
        x = 1.0 + torch.randn(TOKENS, WIDTH, generator=generator)
        x[at] = float("nan")
        made.append((x, finite_rows(x) & mask))
    return made


@pytest.mark.parametrize("reader", ["ridge", "mean"])
@pytest.mark.parametrize("limit", [None, 8, 9, TOKENS])
@pytest.mark.parametrize("room", [1, 2**30])
def test_layers_together_are_each_layer_alone(reader: Any, limit: int | None, room: int) -> None:
    sample = sample_tokens(torch.arange(TOKENS) % 7 != 3, TOKENS, limit, CPU)
    layers = [SimpleNamespace(reader=reader, inputs=torch.zeros(sums_width(WIDTH))) for _ in range(3)]
    tape = InputTape(3, room)
    made = calls(3)
    for layer, (x, real) in zip(layers, made, strict=True):
        tape.add(layer, x, real, sample)
        x.fill_(-7.0)  # the inputs may be gone when the tape is summed
    tape.sum_up()
    for layer, (x, real) in zip(layers, calls(3), strict=True):
        alone = input_sums(x, real, sample.position_S, sample.valid_S, reader)
        assert torch.isfinite(alone).all() and alone[-4] == real.sum()
        torch.testing.assert_close(layer.inputs, alone, rtol=1e-4, atol=1e-4)
    assert not tape.chunks and not tape.folds


def test_a_layer_that_runs_twice_in_a_forward_counts_twice() -> None:
    sample = sample_tokens(None, TOKENS, 8, CPU)
    layer, other = (SimpleNamespace(reader="ridge", inputs=torch.zeros(sums_width(WIDTH))) for _ in range(2))
    tape, made = InputTape(4, 2**30), calls(3)
    for which, (x, real) in zip((layer, other, layer), made, strict=True):
        tape.add(which, x, real, sample)
    tape.sum_up()
    first, second, third = (input_sums(x, real, sample.position_S, None, "ridge") for x, real in made)
    torch.testing.assert_close(layer.inputs, first + third, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.inputs, second, rtol=1e-4, atol=1e-4)


def test_a_forward_that_failed_leaves_nothing() -> None:
    layer = SimpleNamespace(reader="ridge", inputs=torch.zeros(sums_width(WIDTH)))
    tape, ((x, real),) = InputTape(2, 2**30), calls(1)
    tape.add(layer, x, real, sample_tokens(None, TOKENS, 8, CPU))
    tape.clear()
    tape.sum_up()
    assert not layer.inputs.any()
