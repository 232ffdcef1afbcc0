"""Evidence from a calibration pass: any model, no training, every number exact over the tokens read.

Shape suffixes: E experts, N tokens of one expert, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.errors import EvidenceError, LifecycleError
from chronomoe_hf.lifecycle.evidence.spec import EvidenceSource, LayerSpec
from chronomoe_hf.lifecycle.evidence.table import Evidence, LayerEvidence
from chronomoe_hf.lifecycle.live.model import (
    Batch,
    as_batches,
    forward_arguments,
    layer_specs,
    live_layers,
    quiet,
    uncompiled,
)
from chronomoe_hf.lifecycle.live.projections import expert_outputs, experts_in_memory, require_callable
from chronomoe_hf.lifecycle.live.samples import LayerTap, assignments
from chronomoe_hf.wrapping.discovery import FoundLayer
from chronomoe_hf.wrapping.owner import find_system


class _Sums:
    """Sums of one layer over the tokens read, float64 on the CPU."""

    def __init__(self, num_experts: int) -> None:
        self.count = torch.zeros(num_experts, dtype=torch.int64)
        self.gate, self.norm, self.contribution, self.largest = torch.zeros(4, num_experts, dtype=torch.float64)

    def add(self, layer: FoundLayer, hidden_TD: Tensor, index_TK: Tensor, gate_TK: Tensor) -> None:
        """Read every expert's own tokens."""
        for expert in index_TK.unique().tolist():
            token_N, slot_N = (index_TK == expert).nonzero(as_tuple=True)
            gate_N = gate_TK[token_N, slot_N].double()
            token_N, gate_N = token_N[gate_N != 0], gate_N[gate_N != 0]  # a gate of 0: dropped by the capacity
            if len(token_N) == 0 or expert >= len(self.count):
                continue
            norm_N = expert_outputs(layer, hidden_TD[token_N], expert).float().norm(dim=-1).double()
            if not bool(torch.isfinite(norm_N).all()):
                raise EvidenceError(f"{layer.name}: outputs of expert {expert} are not finite on this text")
            self.count[expert] += len(token_N)
            self.gate[expert] += float(gate_N.sum())
            self.norm[expert] += float(norm_N.sum())
            self.contribution[expert] += float((gate_N * norm_N).sum())
            self.largest[expert] = max(float(self.largest[expert]), float(norm_N.max()))

    def evidence(self, spec: LayerSpec) -> LayerEvidence:
        """The layer's row of the table."""
        count = [int(value) for value in self.count]

        def mean(values: Tensor) -> tuple[float | None, ...]:
            return tuple(float(v) / n if n else None for v, n in zip(values, count, strict=True))

        return LayerEvidence(
            spec=spec,
            counts=tuple(count),
            rows=tuple(map(float, count)),
            contribution=tuple(map(float, self.contribution)),
            saliency=mean(self.contribution),
            mean_norm=mean(self.norm),
            gate_sum=tuple(map(float, self.gate)),
            max_norm=tuple(float(v) if n else None for v, n in zip(self.largest, count, strict=True)),
        )


@dataclass
class _Reader:
    """Reads a layer's experts as soon as they have run, so that the inputs of one layer are held at a time."""

    tap: LayerTap
    sums: _Sums
    calls: int = 0
    num_tokens: int = 0

    def attach(self) -> None:
        """Put the hooks on; those of the tap come first."""
        self.tap.attach()
        assert self.tap.layer.experts is not None
        self.tap.handles.append(self.tap.layer.experts.register_forward_hook(self._read))

    def _read(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        layer = self.tap.layer
        hidden_TD, index_TK, gate_TK = self.tap.take()
        with experts_in_memory(layer):
            self.sums.add(layer, hidden_TD, index_TK, gate_TK)
        self.calls, self.num_tokens = self.calls + 1, hidden_TD.shape[0]

    def require_calls(self, forwards: int) -> None:
        """Raise LifecycleError unless the experts were called once in every forward."""
        if self.calls != forwards:
            called = self.calls - forwards + 1
            raise LifecycleError(f"{self.tap.layer.name}: its experts were called {called} times in one forward")


def calibrate(model: nn.Module, batches: Iterable[Batch]) -> Evidence:
    """Read every token of some batches and return what is known about the experts then.

    The model runs in evaluation mode without gradients; nothing in it changes and nothing is recorded. Beside what a
    run knows, it gives the largest output norms (protection of super-experts).

    Args:
        model: wrapped or plain, in one process.
        batches: dictionaries with ``input_ids`` (and ``attention_mask``; padding is left out).

    Raises:
        EvidenceError: several processes, or outputs that are not finite.
        LifecycleError: the family's experts cannot be called one by one or are offloaded beyond reach, or there are
            no batches.
    """
    if distributed.active():
        raise EvidenceError("calibrate runs in one process; call it before training, or on the saved model")
    model = uncompiled(model)
    read = as_batches(batches, "calibrate")
    layers, specs = live_layers(model), layer_specs(model)
    for layer in layers:
        require_callable(layer)
    taps, sums = [LayerTap(layer, None) for layer in layers], [_Sums(spec.num_experts) for spec in specs]
    tokens = 0
    readers = [_Reader(tap, total) for tap, total in zip(taps, sums, strict=True)]
    try:
        for reader in readers:
            reader.attach()
        with quiet(model):
            for number, batch in enumerate(read, start=1):
                model(**forward_arguments(model, batch, logits=False))
                for reader in readers:
                    reader.require_calls(number)
                tokens += readers[-1].num_tokens
    finally:
        for reader in readers:
            reader.tap.detach()
    made = tuple(total.evidence(spec) for total, spec in zip(sums, specs, strict=True))
    system = find_system(model)
    source = EvidenceSource(
        kind="calibration",
        model_class=type(model).__name__,
        mode="INFER",
        tokens=tokens,
        rows_read=sum(sum(layer.counts) for layer in made),
        beta_law="none" if system is None else system.config.beta.law,
    )
    return Evidence(source=source, layers=made)


# Fisher scores in training: the squared gradient of the loss by every routing weight, times the weight, squared.
#
# The mixture is ``m = sum_e g_e y_e``, so ``g_e dL/dg_e = <dL/dm, g_e y_e>``: what the loss would move by, to first
# order, if the expert's part went. The sum of its squares over tokens ranks experts about as well as their
# contribution does (benchmarks/results/prune_quality.md), and needs no expert output. It costs one hook per layer and
# micro-batch, and is opt-in.
#
# Shape suffixes: E experts, T tokens, K experts per token.


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
            if layer.experts is None or not layer.adapter.calls.takes_weights:
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
