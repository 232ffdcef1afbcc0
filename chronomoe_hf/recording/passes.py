"""Which of several passes over the same batch is the one that trains: host-side, from what a forward is given.

Most batches go through a model once. Some go twice: first without gradient, then, inside backward, with gradient
(cached contrastive losses; reentrant checkpointing of a whole model), and then the second pass counts. Or first with
gradient and once more inside backward: the recompute of a whole model that was checkpointed, which has been counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Key = tuple[Any, ...]


@dataclass
class Passes:
    """The passes of one owner in the running step.

    Attributes:
        without_grad: forwards in training mode without gradient, in this window.
        in_backward: forwards inside backward that did not count, in this window.
    """

    without_grad: int = 0
    in_backward: int = 0
    _step: int = 0
    _seen: set[Key] = field(default_factory=set)  # passed without gradient
    _counted: set[Key] = field(default_factory=set)

    def new_window(self) -> None:
        """Numbers are told per window."""
        self.without_grad = self.in_backward = 0

    def note_without_grad(self, named: Mapping[str, Any], step: int) -> None:
        """A forward in training mode without gradient: not counted, but its batch may come again inside backward."""
        self._at(step)
        self.without_grad += 1
        self._seen.add(_key(named))

    def note_counted(self, named: Mapping[str, Any], step: int) -> None:
        """A forward with gradient outside backward: counted."""
        self._at(step)
        self._counted.add(_key(named))

    def counts_in_backward(self, named: Mapping[str, Any], step: int) -> bool:
        """Whether a forward with gradient inside backward is the first such pass over its batch."""
        self._at(step)
        key = _key(named)
        first = key in self._seen and key not in self._counted
        if first:
            self._seen.discard(key)
        else:
            self.in_backward += 1
        return first

    def _at(self, step: int) -> None:
        if step != self._step:
            self._step = step
            self._seen.clear()
            self._counted.clear()


def _key(named: Mapping[str, Any]) -> Key:
    """What tells one batch from another without reading it: where its ids lie; of embeddings, made anew, the shape."""
    ids = named.get("input_ids")
    if type(ids) is Tensor:
        return (ids.data_ptr(), ids.shape)
    embeds = named.get("inputs_embeds")
    return (embeds.shape if isinstance(embeds, Tensor) else None,)
