"""How a lens reads its tokens: sums that add up, fits against plain solvers, and what the spread is for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from chronomoe_hf.config import ReaderName
from chronomoe_hf.lens.direction import RIDGE, UNREADABLE, RouterInputs, input_sums, sums_width

READERS: tuple[ReaderName, ...] = ("ridge", "mean")


def whole(x_TD: Tensor, reader: ReaderName, real_T: Tensor | None = None) -> Tensor:
    """Sums of a batch whose every row is sampled."""
    num = x_TD.shape[0]
    real_T = torch.ones(num) if real_T is None else real_T
    return input_sums(x_TD * real_T[:, None], real_T, torch.arange(num), real_T.bool(), reader)


def anisotropic(num: int, d_model: int, seed: int = 0) -> Tensor:
    """A short mean beside a few directions in which tokens differ much: what hidden states look like."""
    generator = torch.Generator().manual_seed(seed)
    spread_D = torch.full((d_model,), 0.1)
    spread_D[: d_model // 4 if d_model < 32 else 8] = 2.0
    mean_D = torch.full((d_model,), 3.0 / d_model**0.5)
    return mean_D + spread_D * torch.randn(num, d_model, generator=generator)


def test_the_mean_reader_on_numbers_worked_out_by_hand() -> None:
    """Folds are the even and the odd rows; each fold's direction reads the other fold."""
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 4.0]])
    sums = whole(x, "mean")
    # Means (2, 0) and (0, 3): directions (1/2, 0) and (0, 1/3), orthogonal to what they are tried on.
    assert sums.tolist() == pytest.approx([4.0, 6.0, 4 * 0.25, 4 / 6, 4.0, 4.0, 0.0, 0.0])
    got = RouterInputs.from_sums(sums)
    assert got.mean_D.tolist() == pytest.approx([1.0, 1.5])
    assert got.reader_D.tolist() == pytest.approx([0.25, 1 / 6])
    assert float(got.spread) == UNREADABLE
    along = whole(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [3.0, 0.0]]), "mean")
    # Means 1 and 2: the odd rows read 1 and 3 by the first, the even ones 1/2 and 1/2 by the second.
    mean, square = (1 + 3 + 0.5 + 0.5) / 4, (1 + 9 + 0.25 + 0.25) / 4
    assert float(RouterInputs.from_sums(along).spread) == pytest.approx(math.sqrt(square - mean**2) / mean)


def test_the_ridge_reader_is_the_least_squares_fit_of_one() -> None:
    x = anisotropic(40, 6).double()
    got = RouterInputs.from_sums(whole(x.float(), "ridge").double())
    directions, readings = [], []
    folds = (x[0::2], x[1::2])
    for index, fold in enumerate(folds):
        penalty = RIDGE * fold.square().sum(1).mean()
        # Ridge as plain least squares with rows sqrt(penalty) I and target 0 below.
        rows = torch.cat([fold, penalty.sqrt() * torch.eye(6).double()])
        target = torch.cat([torch.ones(len(fold)), torch.zeros(6)]).double()
        directions.append(torch.linalg.lstsq(rows, target[:, None]).solution.squeeze(1))
        readings.append(folds[1 - index] @ directions[-1])
    reading = torch.cat(readings)
    assert got.reader_D.tolist() == pytest.approx((sum(directions) / 2).tolist(), rel=1e-4, abs=1e-6)
    assert float(got.spread) == pytest.approx(float(reading.std(unbiased=False) / reading.mean()), rel=1e-4)
    assert got.mean_D.tolist() == pytest.approx(x.mean(0).tolist(), rel=1e-4)


@pytest.mark.parametrize("reader", READERS)
def test_padding_and_filler_count_for_nothing(reader: ReaderName) -> None:
    x = anisotropic(24, 5)
    padded = torch.full((48, 5), 1e3)
    padded[::2] = x  # real rows at 0, 2, 4, ...: sampled in pairs they would all fall into one fold
    real = torch.zeros(48)
    real[::2] = 1.0
    position = torch.cat([torch.arange(0, 48, 2), torch.zeros(6, dtype=torch.long)])
    valid = torch.cat([torch.ones(24), torch.zeros(6)]).bool()
    sums = input_sums(padded * real[:, None], real, position, valid, reader)
    assert sums.tolist() == pytest.approx(whole(x, reader).tolist(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("reader", READERS)
def test_batches_and_ranks_add_up_by_their_tokens(reader: ReaderName) -> None:
    parts = [anisotropic(20, 4, seed=1), anisotropic(60, 4, seed=2)]
    each = [RouterInputs.from_sums(whole(part, reader)) for part in parts]
    both = RouterInputs.from_sums(sum(whole(part, reader) for part in parts))  # type: ignore[arg-type]
    assert both.mean_D.tolist() == pytest.approx(torch.cat(parts).mean(0).tolist(), rel=1e-4)
    expected = (20 * each[0].reader_D + 60 * each[1].reader_D) / 80
    assert both.reader_D.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert min(float(one.spread) for one in each) < float(both.spread) < max(float(one.spread) for one in each) + 0.1


@pytest.mark.parametrize("d_model", [16, 128, 1024])
def test_ridge_reads_tokens_more_evenly_than_the_mean_where_they_differ_in_few_directions(d_model: int) -> None:
    x = anisotropic(256, d_model)
    spread = {reader: RouterInputs.from_sums(whole(x, reader)).spread for reader in READERS}
    fresh = anisotropic(4096, d_model, seed=9)
    for reader in READERS:
        reading = fresh @ RouterInputs.from_sums(whole(x, reader)).reader_D
        # The estimate is of one fold's direction: the mean of two reads tokens that nobody has seen at least as evenly.
        assert 0.5 * float(spread[reader]) < float(reading.std() / reading.mean()) < 1.2 * float(spread[reader])
    assert spread["ridge"] < 0.8 * spread["mean"]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("num", [0, 1])
def test_too_few_tokens_read_nothing(reader: ReaderName, num: int) -> None:
    got = RouterInputs.from_sums(whole(torch.ones(num, 3), reader))
    assert float(got.spread) == UNREADABLE
    assert bool(torch.isfinite(got.reader_D).all()) and bool(torch.isfinite(got.mean_D).all())
    empty = RouterInputs.from_sums(whole(torch.ones(8, 3), reader, torch.zeros(8)))
    assert float(empty.spread) == UNREADABLE and got.mean_D.shape == (3,)


@pytest.mark.parametrize("reader", READERS)
def test_tokens_without_a_common_part_cannot_be_read(reader: ReaderName) -> None:
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    assert float(RouterInputs.from_sums(whole(x, reader)).spread) > 2.0


def test_the_width_is_that_of_the_sums() -> None:
    assert whole(torch.ones(4, 7), "ridge").numel() == sums_width(7)
