"""All weights of one expert: found, copied onto another expert, and given back bit for bit.

Shape suffixes: E experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf.distributed import is_sharded
from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.wrapping.discovery import FoundLayer

_REFUSED = {
    "dbrx": "the experts of dbrx share one flattened weight",
    "longcat": "some experts of longcat_flash are identities without weights",
    "none": "its experts cannot be reached",
}
_NUMBERED = re.compile(r"(?:|.*[._])(\d+)")


@dataclass
class Changes:
    """Parts of tensors that were overwritten, with the bits that were there."""

    parts: list[tuple[Tensor, int | None, Tensor]] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @torch.no_grad()
    def write(self, tensor: Tensor, index: int | None, value: Tensor) -> None:
        """Overwrite ``tensor[index]`` (the whole tensor without an index) and remember what was there."""
        place = tensor.detach() if index is None else tensor.detach()[index]
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
            (tensor.detach() if index is None else tensor.detach()[index]).copy_(before)
        self.parts, self.versions = [], []


class ExpertWeights:
    """The parameters of every expert of one layer: slices of fused tensors, or modules of their own.

    Args:
        layer: a live layer.

    Raises:
        LifecycleError: an expert cannot be copied: the family keeps no tensors of one expert apart, the weights are
            sharded, quantised, offloaded or frozen, or carry an adapter.
    """

    def __init__(self, layer: FoundLayer) -> None:
        self.layer = layer
        reason = _REFUSED.get(layer.adapter.experts_call)
        if reason is not None or layer.experts is None:
            raise LifecycleError(f"{layer.name}: its experts cannot be copied: {reason or 'no experts'}")
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
        weight = layer.adapter.weight(layer.router)
        _check(layer, [*self.fused, *(t for parts in self.own.values() for t in parts.values()), weight])

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
                "cannot be copied"
            )

    def tensors(self, layer: FoundLayer) -> list[Tensor]:
        """All parameters that a split writes to."""
        apart = [tensor for parts in self.own.values() for tensor in parts.values()]
        return [*self.fused, *apart, layer.adapter.weight(layer.router)]

    def copy(self, donor: int, target: int, changes: Changes, optimizer: Any = None) -> None:
        """Make `target` a copy of `donor`, moments in the optimizer included.

        Args:
            donor: expert that is copied.
            target: expert that is overwritten.
            changes: remembers what was there.
            optimizer: whose state follows; None = there is none.
        """
        for tensor in self.fused:
            changes.write(tensor, target, tensor.detach()[donor])
            copy_moments(optimizer, tensor, tensor, donor, target, changes)
        for name, tensor in self.own.get(target, {}).items():
            source = self.own[donor][name]
            changes.write(tensor, None, source.detach())
            copy_moments(optimizer, source, tensor, None, None, changes)


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


def _check(layer: FoundLayer, weights: list[Tensor]) -> None:
    adapted = [name for name, module in layer.parent.named_modules() if "base_layer" in module._modules]
    if adapted:
        raise LifecycleError(
            f"{layer.name}: {adapted[0]} carries an adapter; an expert that is rewritten would not be saved with it. "
            "Split the base model first, or fine-tune in full"
        )
    for weight in weights:
        if is_sharded(weight):
            raise LifecycleError(
                f"{layer.name}: its weights are sharded over the ranks (FSDP, DeepSpeed ZeRO-3 or tensor parallel); "
                "split the model in one process with lifecycle.apply, save it, and train from that checkpoint"
            )
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise LifecycleError(f"{layer.name}: its weights are stored as {weight.dtype}; split before quantising")
        if weight.device.type == "meta":
            raise LifecycleError(f"{layer.name}: its weights are offloaded; load the model so that they are in memory")
        if isinstance(weight, nn.Parameter) and not weight.requires_grad:
            raise LifecycleError(
                f"{layer.name}: its weights are frozen (requires_grad=False), so a copy would stay one; unfreeze the "
                "experts and routers, or do not split"
            )
