"""One wrapped MoE layer: its modules, the facts found at wrap time, and the correction bias that it may ship with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf.config import BetaConfig
from chronomoe_hf.patches import Adapter
from chronomoe_hf.recording.sums import LayerRecorder
from chronomoe_hf.router.state import RouterHandle


@dataclass
class Layer:
    """One wrapped MoE layer.

    Args:
        layer_id: position, 0-based, in module order.
        name: module path of the router, without wrapper prefixes.
        adapter: the family's facts.
        router: the wrapped router module.
        experts: the wrapped experts module, or None.
        parent: the module that owns the native bias where the router does not.
        num_experts, top_k: E and k.
        handle: what the router points to.
        recorder: the layer's accumulators.
        native_bias: the model's own correction bias, when the balance law updates that instead of beta.
        bias_is_parameter: that bias is a parameter (which FSDP2 and ZeRO-3 shard) and not a buffer.
        can_steer: beta may act here; False for a layer that can only be observed.
        notes: what is not supported on this layer, in plain words.
    """

    layer_id: int
    name: str
    adapter: Adapter
    router: nn.Module
    experts: nn.Module | None
    parent: nn.Module
    num_experts: int
    top_k: int
    handle: RouterHandle
    recorder: LayerRecorder
    native_bias: bool = False
    bias_is_parameter: bool = False
    can_steer: bool = True
    notes: list[str] = field(default_factory=list)

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

    def update_native_bias(self, step_E: Tensor, beta: BetaConfig) -> None:
        """The balance law on the model's own correction bias, in its score units; only the change is centred.

        Args:
            step_E: step of the law in units of the rate, from ``StepState.apply_balance``.
            beta: the rate.
        """
        bias_E = self.adapter.native_bias(self.router, self.parent)
        assert bias_E is not None
        if beta.native_rate is not None:
            step_E = step_E * beta.native_rate
        else:
            slope = self.adapter.rule.bias_slope(self.num_experts)
            step_E = step_E * (beta.rate * slope * self.handle.state.logit_std_ema.double())
        with torch.no_grad():
            bias_E.add_((step_E - step_E.mean()).to(device=bias_E.device, dtype=bias_E.dtype))


def is_parameter(bias_E: Tensor, router: nn.Module, parent: nn.Module) -> bool:
    """Whether a native correction bias is a parameter of the router or its parent, and not a buffer."""
    parameters = (*router.parameters(), *parent.parameters(recurse=False))
    return bias_E.numel() == 0 or any(value.data_ptr() == bias_E.data_ptr() for value in parameters)
