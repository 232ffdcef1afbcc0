"""Reading a run's first training batches before it starts, so that training sees them all the same.

A data set with an order of its own begins anew when it is read again. A stream may keep its position: what was read of
it is put back, and training goes on with the very iteration that was begun.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from chronomoe_hf.lifecycle.live.model import Batch, first_batches


def training_batches(batches: Iterable[Batch], count: int) -> list[Batch]:
    """The first `count` batches of the training data; the next iteration over it begins with them.

    Call it where random states are put back afterwards: what starting the iteration draws of them is drawn again when
    training starts it.

    Args:
        batches: the data loader of a run. A bare iterator (a generator) cannot be given its batches back.
        count: how many to read, fewer where there are fewer.
    """
    if _begins_anew(batches):
        return first_batches(batches, count)
    before = _random_states()
    after: list[Any] | None = None
    iterator = iter(batches)
    read: list[Batch] = []
    while len(read) < count and (batch := next(iterator, None)) is not None:
        read.append(batch)
        after = after or _random_states()
    if iterator is not batches:
        _put_back(batches, _Begun(read, iterator, before, after or before))
    return [dict(batch) for batch in read]


def _begins_anew(batches: Any) -> bool:
    """Whether a second iteration over the data is a first one again."""
    indexed = isinstance(batches, DataLoader) and not isinstance(batches.dataset, IterableDataset)
    return indexed or isinstance(batches, list | tuple)


class _Begun(Iterator[Batch]):
    """An iteration that was begun: the batches that were read of it, then the rest.

    Args:
        read: these batches.
        rest: the iterator that they came from.
        before: random states when it was started.
        after: and once it had given the first batch.
    """

    def __init__(self, read: list[Batch], rest: Iterator[Batch], before: list[Any], after: list[Any]) -> None:
        self.read, self.rest = deque(read), rest
        self.states: tuple[list[Any], list[Any]] | None = (before, after)

    def __next__(self) -> Batch:
        if self.states is not None:
            _draw_again(*self.states)
            self.states = None
        return self.read.popleft() if self.read else next(self.rest)

    def close(self) -> None:
        """Training has left the iteration early."""
        if hasattr(self.rest, "close"):
            self.rest.close()


def _put_back(batches: Any, begun: _Begun) -> None:
    """Let the next ``iter(batches)``, and no other, be `begun`."""
    native = type(batches)

    def once(self: Any) -> Iterator[Batch]:
        _become(self, native)
        return begun

    space = {"__iter__": once, "__module__": native.__module__, "__doc__": native.__doc__}
    _become(batches, type(native.__name__, (native,), space))


def _become(instance: Any, cls: type) -> None:
    object.__dict__["__class__"].__set__(instance, cls)  # Accelerate's loaders have a property of that name


# ---- random states ---------------------------------------------------------------------------------------------------

_STATES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (random.getstate, random.setstate),
    (lambda: np.random.get_state(legacy=False), np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
)


def _random_states() -> list[Any]:
    return [get() for get, _ in _STATES]


def _draw_again(before: list[Any], after: list[Any]) -> None:
    """Where a random state is what it was when the iteration was started, starting it draws what it drew."""
    for (get, put), first, then in zip(_STATES, before, after, strict=True):
        if _same(get(), first):
            put(then)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else bool(one == other)
