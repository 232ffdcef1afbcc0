"""Evidence from a calibration pass: any model, no training, every number exact over the tokens read.

Shape suffixes: E experts, N tokens of one expert, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.errors import EvidenceError
from chronomoe_hf.lifecycle.evidence.spec import EvidenceSource, LayerSpec
from chronomoe_hf.lifecycle.evidence.table import Evidence
from chronomoe_hf.lifecycle.evidence_layer import LayerEvidence
from chronomoe_hf.lifecycle.live.model import (
    Batch,
    as_batches,
    forward_arguments,
    layer_specs,
    live_layers,
    quiet,
    uncompiled,
)
from chronomoe_hf.lifecycle.live.projections import expert_outputs, require_callable
from chronomoe_hf.lifecycle.live.samples import LayerTap
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


def calibrate(model: nn.Module, batches: Iterable[Batch]) -> Evidence:
    """Read every token of some batches and return what is known about the experts then.

    The model runs in evaluation mode without gradients; nothing in it changes and nothing is recorded. Beside what a
    run knows, it gives the largest output norms (protection of super-experts).

    Args:
        model: wrapped or plain, in one process.
        batches: dictionaries with ``input_ids`` (and ``attention_mask``; padding is left out).

    Raises:
        EvidenceError: several processes, or outputs that are not finite.
        LifecycleError: the family's experts cannot be called one by one, or there are no batches.
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
    try:
        for tap in taps:
            tap.attach()
        with quiet(model):
            for batch in read:
                model(**forward_arguments(model, batch, logits=False))
                for layer, tap, total in zip(layers, taps, sums, strict=True):
                    hidden_TD, index_TK, gate_TK = tap.take()
                    total.add(layer, hidden_TD, index_TK, gate_TK)
                tokens += hidden_TD.shape[0]
    finally:
        for tap in taps:
            tap.detach()
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
