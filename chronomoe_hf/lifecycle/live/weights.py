"""All weights of one expert: found, copied onto another expert, and given back bit for bit.

Shape suffixes: E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from chronomoe_hf.distributed import is_sharded
from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.wrapping.discovery import FoundLayer
from chronomoe_hf.wrapping.weights import packed_as

# Whether the weights of a layer's experts can be written here: one answer for refitting, splitting and merging.


def require_writable(layer: FoundLayer, weights: Iterable[Tensor], doing: str) -> None:
    """Raise LifecycleError where `weights` cannot be changed in place.

    Args:
        layer: a live layer.
        weights: what is to be written.
        doing: the verb of the message, for example ``"refit"``.

    Raises:
        LifecycleError: an adapter in the layer's block is not merged, or the weights are sharded, quantised or
            offloaded; with the way out.
    """
    adapted = [name for name, module in layer.parent.named_modules() if "base_layer" in module._modules]
    if adapted:
        raise LifecycleError(
            f"{layer.name}: {adapted[0]} carries an adapter that is not merged; call model.merge_and_unload() first"
        )
    for weight in weights:
        if is_sharded(weight):
            raise LifecycleError(
                f"{layer.name}: its experts are sharded over the ranks (FSDP, DeepSpeed ZeRO-3, tensor parallel); "
                f"{doing} a model loaded whole, in one process"
            )
        if (packed := packed_as(weight)) is not None:
            raise LifecycleError(f"{layer.name}: its experts are stored as {packed}; {doing} before quantising")
        if weight.device.type == "meta":
            raise LifecycleError(f"{layer.name}: its experts are offloaded; load the model so that they are in memory")


class Undoable:
    """A change of a live model that can be taken back bit for bit: by ``undo()``, or at the end of a ``with`` block."""

    def undo(self) -> None:
        """Take it back; a second call does nothing.

        Raises:
            LifecycleError: the weights were trained or loaded since.
        """
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def trained_since(change: str) -> LifecycleError:
    """What says that a change can no more be taken back."""
    return LifecycleError(f"the weights were trained or loaded since the {change}, so it cannot be undone")


_NUMBERED = re.compile(r"(?:|.*[._])(\d+)")


@dataclass
class Changes:
    """Parts of tensors that were overwritten, with the bits that were there."""

    parts: list[tuple[Tensor, int | None, Tensor]] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @torch.no_grad()
    def write(self, tensor: Tensor, index: int | None, value: Tensor) -> None:
        """Overwrite ``tensor[index]`` (the whole tensor without an index) and remember what was there."""
        place = slice_of(tensor, index)
        self.parts.append((tensor, index, place.clone()))
        place.copy_(value)

    def seal(self) -> None:
        """From here on, :meth:`untouched` tells whether somebody else wrote into these tensors."""
        self.versions = [tensor._version for tensor, _, _ in self.parts]

    @property
    def untouched(self) -> bool:
        """Nobody wrote into the tensors since :meth:`seal`."""
        return self.versions == [tensor._version for tensor, _, _ in self.parts]

    @torch.no_grad()
    def undo(self) -> None:
        """Give every bit back, last change first."""
        for tensor, index, before in reversed(self.parts):
            slice_of(tensor, index).copy_(before)
        self.parts, self.versions = [], []


class ExpertWeights:
    """The parameters of every expert of one layer: slices of fused tensors, or modules of their own.

    Args:
        layer: a live layer.
        doing: what is to be done with them, for messages.
        trains: they are to be trained afterwards.

    Raises:
        LifecycleError: the family keeps no tensors of one expert apart, or the weights cannot be written here (see
            :func:`~chronomoe_hf.lifecycle.live.weights.require_writable`), or they are frozen and `trains`.
    """

    def __init__(self, layer: FoundLayer, doing: str = "split", *, trains: bool = True) -> None:
        self.layer = layer
        reason = layer.adapter.calls.not_apart
        if reason is not None or layer.experts is None:
            raise LifecycleError(f"{layer.name}: its experts cannot be told apart: {reason or 'no experts'}")
        self.num_experts = layer.adapter.num_experts(layer.router)
        self.fused: list[Tensor] = []
        self.own: dict[int, dict[str, Tensor]] = {}
        for name, tensor in [*layer.experts.named_parameters(), *layer.experts.named_buffers()]:
            self._add(name, tensor)
        sizes = {tuple(sorted(parts)) for parts in self.own.values()}
        complete = not self.own or (len(self.own) == self.num_experts and len(sizes) == 1)
        if not complete or not (self.fused or self.own):
            raise LifecycleError(
                f"{layer.name}: {type(layer.experts).__name__} has no tensors of each of its {self.num_experts} experts"
            )
        written = self.tensors()
        require_writable(layer, written, doing)
        if trains and any(isinstance(each, nn.Parameter) and not each.requires_grad for each in written):
            raise LifecycleError(
                f"{layer.name}: its weights are frozen (requires_grad=False), so a copy would stay one; unfreeze the "
                "experts and routers, or do not split"
            )

    def _add(self, name: str, tensor: Tensor) -> None:
        path, _, _ = name.rpartition(".")
        number = next((int(m[1]) for part in path.split(".") if (m := _NUMBERED.fullmatch(part))), None)
        if number is not None and path:
            rest = ".".join(re.sub(r"\d+$", "{}", part) for part in name.split("."))
            self.own.setdefault(number, {})[rest] = tensor
        elif tensor.dim() >= 1 and tensor.shape[0] == self.num_experts:
            self.fused.append(tensor)
        elif tensor.dim() > 1:  # a vector is a norm that all experts share
            raise LifecycleError(
                f"{self.layer.name}: {name} of shape {list(tensor.shape)} is no tensor of one expert, so its experts "
                "cannot be told apart"
            )

    def tensors(self) -> list[Tensor]:
        """All parameters that a split writes to: those of the experts, and the router's rows."""
        apart = [tensor for parts in self.own.values() for tensor in parts.values()]
        return [*self.fused, *apart, self.layer.adapter.weight(self.layer.router)]

    def parts(self, expert: int) -> list[tuple[Tensor, int | None]]:
        """Where one expert's weights are, in the same order for all: a tensor and the index in it (None: all of it)."""
        return [(tensor, expert) for tensor in self.fused] + [
            (tensor, None) for _, tensor in sorted(self.own.get(expert, {}).items())
        ]

    def copy(self, donor: int, target: int, changes: Changes, optimizer: Any = None) -> None:
        """Make `target` a copy of `donor`, moments in the optimizer included.

        Args:
            donor: expert that is copied.
            target: expert that is overwritten.
            changes: remembers what was there.
            optimizer: whose state follows; None = there is none.
        """
        for (source, at), (tensor, place) in zip(self.parts(donor), self.parts(target), strict=True):
            changes.write(tensor, place, slice_of(source, at))
            copy_moments(optimizer, source, tensor, at, place, changes)


def slice_of(tensor: Tensor, index: int | None) -> Tensor:
    """``tensor[index]``, or all of it without an index; detached, and no copy."""
    return tensor.detach() if index is None else tensor.detach()[index]


def copy_moments(
    optimizer: Any, source: Tensor, tensor: Tensor, donor: int | None, target: int | None, changes: Changes
) -> None:
    """State of `tensor` in the optimizer as that of `source`: of one row each, or as a whole where rows are None.

    Raises:
        LifecycleError: the optimizer keeps something else than one number per weight.
    """
    state = getattr(optimizer, "state", None)
    if not state or source not in state:
        return
    if tensor is not source and tensor not in state:
        state[tensor] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state[source].items()}
        return
    for name, value in state[source].items():
        if isinstance(value, Tensor) and value.shape == source.shape:
            moments = state[tensor][name]
            changes.write(moments, target, value if donor is None else value[donor])
        elif isinstance(value, Tensor) and value.numel() == 1:
            if tensor is not source:
                changes.write(state[tensor][name], None, value)
        elif isinstance(value, Tensor):
            raise LifecycleError(
                f"the optimizer keeps {name} of shape {list(value.shape)} for a weight of shape {list(source.shape)}, "
                "which cannot be copied from expert to expert; split before the first optimizer step"
            )


def check_optimizer(optimizer: Any, tensors: list[Tensor]) -> None:
    """Raise LifecycleError where :func:`copy_moments` would, before anything is changed."""
    state = getattr(optimizer, "state", None) or {}
    for tensor in tensors:
        for name, value in state.get(tensor, {}).items():
            if isinstance(value, Tensor) and value.shape != tensor.shape and value.numel() != 1:
                raise LifecycleError(
                    f"the optimizer keeps {name} of shape {list(value.shape)} for a weight of shape "
                    f"{list(tensor.shape)}, which cannot be copied from expert to expert; split before the first step"
                )
            if isinstance(value, Tensor) and is_sharded(value):
                raise LifecycleError(f"the optimizer's {name} is sharded over the ranks; split before it is prepared")
