"""Fisher scores in training: the squared gradient of the loss by every routing weight, times the weight, squared.

The mixture is ``m = sum_e g_e y_e``, so ``g_e dL/dg_e = <dL/dm, g_e y_e>``: what the loss would move by, to first
order, if the expert's part went. The sum of its squares over tokens ranks experts about as well as their contribution
does (benchmarks/results/prune_quality.md), and needs no expert output. It costs one hook per layer and micro-batch, and
is opt-in.

Shape suffixes: E experts, T tokens, K experts per token.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.errors import EvidenceError
from chronomoe_hf.lifecycle.live.model import live_layers
from chronomoe_hf.lifecycle.live.samples import assignments


class FisherSums:
    """Accumulates Fisher scores while the context is open.

    Args:
        model: wrapped or plain; before or inside training.

    Raises:
        EvidenceError: a layer's experts do not take routing weights.

    Example::

        with FisherSums(model) as sums:
            trainer.train()
        evidence = Evidence.from_directory(output_dir).with_vectors(fisher=sums.scores())
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = live_layers(model)
        for layer in self.layers:
            if layer.experts is None or layer.adapter.experts_call in ("llama4", "dbrx", "none"):
                raise EvidenceError(f"{layer.name}: its experts take no routing weights, so there is no Fisher score")
        self.sums = [torch.zeros(layer.adapter.num_experts(layer.router), dtype=torch.float64) for layer in self.layers]
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for index, layer in enumerate(self.layers):
            assert layer.experts is not None

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
                _, chosen, gate = [*args, *kwargs.values()][:3]
                if gate.requires_grad:
                    index_TK, gate_TK = assignments(self.layers[index], chosen, gate)
                    gate.register_hook(lambda grad: self._add(index, index_TK, gate_TK, grad))

            self._handles.append(layer.experts.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _add(self, layer: int, index_TK: Tensor, gate_TK: Tensor, grad: Tensor) -> None:
        part_TK = (gate_TK * grad.reshape(gate_TK.shape).float()).square().double()
        total_E = self.sums[layer]
        if total_E.device != part_TK.device:
            total_E = self.sums[layer] = total_E.to(part_TK.device)
        finite_TK = torch.where(torch.isfinite(part_TK), part_TK, 0.0)
        total_E.index_add_(0, index_TK.clamp(max=total_E.shape[0] - 1).flatten(), finite_TK.flatten())

    def scores(self) -> list[list[float]]:
        """One row per layer, summed over ranks. Collective."""
        return [distributed.all_reduce_sum_(total_E.clone()).tolist() for total_E in self.sums]
