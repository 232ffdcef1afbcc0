"""What a layer's experts read on calibration text, with the routing of the full model and of a masked one.

One forward of the full model serves all layers: when a block has run, its forward is repeated under the mask (or what
else alters the choice) up to the call of the experts, so that the altered routing is the family's own, whatever the
block does to it.

Shape suffixes: T tokens, K experts per token, E experts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.lifecycle.live.masking import mask_experts
from chronomoe_hf.lifecycle.live.model import Batch, RealTokens, forward_arguments, real_rows
from chronomoe_hf.wrapping.discovery import FoundLayer


@dataclass(frozen=True)
class LayerSamples:
    """Inputs of one layer's experts, and two routings of them.

    Args:
        hidden_TD: what the experts read, dtype of the model; the first `num_fit` tokens are to be fitted.
        num_fit: tokens to fit; the rest is held out.
        before_index_TK, before_gate_TK: int64 ids and fp32 weights of the routing whose output is the target.
        after_index_TK, after_gate_TK: the same of the routing to be fitted.
    """

    hidden_TD: Tensor
    num_fit: int
    before_index_TK: Tensor
    before_gate_TK: Tensor
    after_index_TK: Tensor
    after_gate_TK: Tensor

    def gates(self, expert: int) -> tuple[Tensor, Tensor]:
        """fp32 ``(T,)`` twice: the expert's weight for every token before and after, 0 where it is not chosen."""
        before_T = torch.where(self.before_index_TK == expert, self.before_gate_TK, 0.0).sum(-1)
        after_T = torch.where(self.after_index_TK == expert, self.after_gate_TK, 0.0).sum(-1)
        return before_T, after_T


def sample_bytes(layer: FoundLayer, tokens: int) -> int:
    """Memory of one layer's samples."""
    weight = next(layer.router.parameters())
    return tokens * (weight.shape[-1] * weight.element_size() + 24 * layer.adapter.top_k(layer.router))


class StopForward(Exception):
    """A hook has read what it wanted; nothing behind it has to run."""


@dataclass
class LayerTap:
    """Listens to one layer while the model runs; with `altered` its block's choice is repeated within that context."""

    layer: FoundLayer
    altered: Callable[[], AbstractContextManager[Any]] | None
    real: RealTokens = field(default_factory=RealTokens)
    repeating: bool = False
    calls: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    repeats: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)

    def attach(self) -> None:
        """Put the hooks on."""
        layer = self.layer
        assert layer.experts is not None
        self.handles = [
            self.real.listen(layer.owner),
            layer.experts.register_forward_pre_hook(self._experts, with_kwargs=True),
        ]
        if self.altered is not None:
            self.handles.append(layer.parent.register_forward_hook(self._parent, with_kwargs=True))

    def detach(self) -> None:
        """Take them off."""
        for handle in self.handles:
            handle.remove()

    def _experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, index, gate = [*args, *kwargs.values()][:3]
        hidden_TD = hidden.detach().reshape(-1, hidden.shape[-1])
        index_TK, gate_TK = assignments(self.layer, index, gate)
        if self.repeating:
            self.repeats.append((index_TK, gate_TK))
            raise StopForward
        self.calls.append((hidden_TD, index_TK, gate_TK))

    def _parent(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.repeating:
            return
        assert self.altered is not None
        self.repeating = True
        try:
            with self.altered():
                module.forward(*args, **kwargs)
        except StopForward:
            return
        except (RuntimeError, ValueError, TypeError) as error:
            raise LifecycleError(
                f"{self.layer.name}: the forward of its block cannot be repeated, so it cannot be refitted ({error})"
            ) from error
        finally:
            self.repeating = False
        raise LifecycleError(f"{self.layer.name}: its block did not call its experts; the layer cannot be sampled")

    def take(self) -> tuple[Tensor, ...]:
        """Rows of real tokens since the last take: hidden, index, gate; index and gate of the altered choice, too."""
        twice = self.altered is not None
        if len(self.calls) != 1 or len(self.repeats) != twice:
            raise LifecycleError(f"{self.layer.name}: its experts were called {len(self.calls)} times in one forward")
        rows: tuple[Tensor, ...] = (*self.calls.pop(), *(self.repeats.pop() if twice else ()))
        return tuple(real_rows(value, self.real.mask_T) for value in rows)


def assignments(layer: FoundLayer, index: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Ids int64 and weights fp32 ``(T, K)`` of a call of the experts."""
    if layer.adapter.calls.by_module:
        mask_TE = index.reshape(-1, index.shape[-1])
        chosen_T1 = mask_TE.argmax(-1, keepdim=True)
        kept_T1 = mask_TE.sum(-1, keepdim=True) > 0
        return chosen_T1, torch.where(kept_T1, gate.detach().reshape(-1, 1).float(), 0.0)
    return index.detach().reshape(-1, index.shape[-1]), gate.detach().reshape(-1, gate.shape[-1]).float()


def under_mask(layer: FoundLayer, dropped: tuple[int, ...]) -> Callable[[], AbstractContextManager[Any]]:
    """What alters the choice of a layer whose experts `dropped` are masked."""
    return lambda: mask_experts([layer], [dropped])


def collect_samples(
    model: nn.Module,
    layers: Sequence[FoundLayer],
    altered: Sequence[Callable[[], AbstractContextManager[Any]]],
    fit: Sequence[Batch],
    check: Sequence[Batch],
) -> list[LayerSamples]:
    """Run the full model over the batches and keep what the layers' experts read.

    Args:
        model: in evaluation mode, without gradients.
        layers: to sample.
        altered: context of the second routing, per layer.
        fit: batches whose tokens come first.
        check: batches held out.

    Raises:
        LifecycleError: a block calls its experts in a way that cannot be sampled.
    """
    taps = [LayerTap(layer, how) for layer, how in zip(layers, altered, strict=True)]
    rows: list[list[tuple[Tensor, ...]]] = [[] for _ in taps]
    counts = [0] * len(taps)
    try:
        for tap in taps:
            tap.attach()
        for number, batch in enumerate([*fit, *check]):
            model(**forward_arguments(model, batch, logits=False))
            for index, tap in enumerate(taps):
                rows[index].append(tap.take())
                if number < len(fit):
                    counts[index] += rows[index][-1][0].shape[0]
    finally:
        for tap in taps:
            tap.detach()
    out = []
    for parts, count in zip(rows, counts, strict=True):
        hidden_TD, *routing = (torch.cat(column) for column in zip(*parts, strict=True))
        out.append(LayerSamples(hidden_TD, count, *routing))
    return out
