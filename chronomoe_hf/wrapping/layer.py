"""One wrapped MoE layer: its modules, the facts found at wrap time, and the correction bias that it may ship with."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from chronomoe_hf.patches import Adapter
from chronomoe_hf.recording.recorder import LayerRecorder
from chronomoe_hf.router.state import RouterHandle
from chronomoe_hf.wrapping.discovery import Modules, running_modules


@dataclass
class Layer:
    """One wrapped MoE layer.

    Its modules are looked up by name whenever they are asked for: PEFT may put copies in their place and switch
    between them.

    Args:
        layer_id: position, 0-based, in module order.
        name: module path of the router, without wrapper prefixes.
        adapter: the family's facts.
        root: the model that owns the system, in which the name is looked up.
        wrapped: the modules that ran when the model was wrapped.
        num_experts, top_k: E and k.
        handle: what the router points to.
        recorder: the layer's row of the sums.
        reads_experts: expert outputs are read.
        native_bias: the model's own correction bias, when the balance law updates that instead of beta.
        bias_is_parameter: that bias is a parameter (which FSDP2 and ZeRO-3 shard) and not a buffer.
        native_dtype: dtype of that bias before it was kept in fp32, where that differs.
        can_steer: beta may act here; False for a layer that can only be observed.
        known: what is not supported on this layer, in plain words.
    """

    layer_id: int
    name: str
    adapter: Adapter
    root: nn.Module
    wrapped: Modules
    num_experts: int
    top_k: int
    handle: RouterHandle
    recorder: LayerRecorder
    reads_experts: bool = True
    native_bias: bool = False
    bias_is_parameter: bool = False
    native_dtype: torch.dtype | None = None
    can_steer: bool = True
    known: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share()

    def _share(self) -> None:
        self.handle.root = self.recorder.scope.root = weakref.ref(self.root)

    @property
    def modules(self) -> Modules:
        """Router, block and experts that a forward goes through now."""
        return running_modules(self.root, self.name, self.adapter) or self.wrapped

    @property
    def router(self) -> nn.Module:
        """The router that runs now."""
        return self.modules.router

    @property
    def parent(self) -> nn.Module:
        """The block that holds it; it owns the native bias where the router does not."""
        return self.modules.parent

    @property
    def experts(self) -> nn.Module | None:
        """The experts that run now, or None where their outputs are not read."""
        return self.modules.experts if self.reads_experts else None

    @property
    def notes(self) -> list[str]:
        """What is not supported on this layer, and what could not be told of the batches seen, in plain words."""
        seen = self.recorder.scope.note
        return [*self.known, *([] if seen is None else [seen])]

    @property
    def cut(self) -> tuple[int, ...]:
        """Ids of the experts that were cut during the run, ascending."""
        return () if self.handle.mask is None else self.handle.mask.dropped

    @property
    def takes_beta(self) -> bool:
        """Whether a law on beta acts on this layer: it can, and no native bias does the work."""
        return self.can_steer and not self.native_bias

    def table_row(self) -> dict[str, Any]:
        """Name, router class, E, k and expert groups, for manifests."""
        num_groups, groups_kept = self.adapter.groups(self.router)
        return {
            "layer_id": self.layer_id,
            "name": self.name,
            "family": self.adapter.family,
            "router_class": self.adapter.router_class,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "num_groups": num_groups,
            "groups_kept": groups_kept,
        }
