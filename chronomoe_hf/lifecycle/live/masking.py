"""Masking experts of a live model: what a checkpoint without them would compute, before one is written.

A mask at the router equals the sliced model: the logits of dropped experts are -inf before the score function, and so
is a native selection bias, so that survivors' weights are those of a router that never had the others. Nothing is
written into the model: a wrapped router repeats its choice itself, a plain one by a forward hook that goes when the
context ends.

Shape suffixes: E experts, T tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.patches import Adapter, find
from chronomoe_hf.router.forward import ChronoRouter
from chronomoe_hf.router.state import HANDLE, MASKS, RouterCall, RouterHandle
from chronomoe_hf.wrapping.discovery import FoundLayer

Model = TypeVar("Model", bound=nn.Module)


@dataclass(eq=False)
class ExpertMask:
    """One mask in force on one router.

    Args:
        dropped_E: bool, the experts that no token may choose.
        calls: forwards of the router that it acted on; those of a compiled graph are not counted.
    """

    dropped_E: Tensor
    calls: int = 0


class CutMask:
    """The mask of a layer whose experts were cut during a run; a router handle holds it.

    Args:
        adapter: of the layer's router.
        dropped: ids of the experts that were cut, ascending.
        num_experts: E.
    """

    def __init__(self, adapter: Adapter, dropped: Sequence[int], num_experts: int) -> None:
        self.adapter, self.dropped, self.num_experts = adapter, tuple(dropped), num_experts
        self.dropped_E = torch.zeros(num_experts, dtype=torch.bool)
        self.dropped_E[list(dropped)] = True
        self._masked = _masked_adapter(adapter, self.dropped_E)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.adapter, self.dropped, self.num_experts)  # the masked adapter's class has no name

    def dropped_on(self, router: nn.Module, device: torch.device) -> Tensor:
        """See ``router.state.RouterMask``."""
        if self.dropped_E.device != device:
            self.dropped_E = self.dropped_E.to(device)
            self._masked = _masked_adapter(self.adapter, self.dropped_E)
        return self.dropped_E

    def reroute(self, router: nn.Module, call: RouterCall) -> Any:
        """See ``router.state.RouterMask``."""
        dropped_E = self.dropped_on(router, call.logits_TE.device)
        return _choose(router, call, self._masked, dropped_E)


class _Stack(list[ExpertMask]):
    """The masks that contexts have put on one router, innermost last, and the hook that obeys them on a plain one."""

    handle: Any = None

    def dropped_on(self, router: nn.Module, device: torch.device) -> Tensor:
        """See ``router.state.RouterMask``."""
        return _union(router, torch.zeros_like(self[0].dropped_E)).to(device)

    def reroute(self, router: nn.Module, call: RouterCall) -> Any:
        """See ``router.state.RouterMask``."""
        if not torch.compiler.is_compiling():
            for mask in self:
                mask.calls += 1
        dropped_E = self.dropped_on(router, call.logits_TE.device)
        return _choose(router, call, _masked_adapter(find(router), dropped_E), dropped_E)


@contextlib.contextmanager
def mask_experts(layers: Sequence[FoundLayer], dropped: Sequence[Collection[int]]) -> Iterator[list[ExpertMask]]:
    """Mask experts layer by layer; layers that drop nothing are left alone.

    Args:
        layers: live layers.
        dropped: ids per layer.

    Yields:
        One mask per layer, which counts the calls that it acted on.

    Raises:
        LifecycleError: a router cannot be masked, or too few experts would be left for a token.
    """
    masks = []
    for layer, ids in zip(layers, dropped, strict=True):
        dropped_E = torch.zeros(layer.adapter.num_experts(layer.router), dtype=torch.bool)
        dropped_E[list(ids)] = True
        masks.append(ExpertMask(dropped_E))
        if ids:
            _check(layer, dropped_E)
    put: list[tuple[nn.Module, ExpertMask]] = []
    try:
        for layer, mask, ids in zip(layers, masks, dropped, strict=True):
            if ids:
                _put(layer.router, mask)
                put.append((layer.router, mask))
        yield masks
    finally:
        for router, mask in put:
            _take_off(router, mask)


def _check(layer: FoundLayer, dropped_E: Tensor) -> None:
    reason = layer.adapter.refused("beta")
    if reason is not None:
        raise LifecycleError(f"the experts of {layer.name} cannot be masked: {reason}")
    top_k, left = layer.adapter.top_k(layer.router), int((~_union(layer.router, dropped_E)).sum())
    if left < top_k:
        raise LifecycleError(
            f"{layer.name}: {left} experts would be left, every token needs {top_k}; plans that are in force together "
            "must leave at least that many"
        )


def _union(router: nn.Module, dropped_E: Tensor) -> Tensor:
    handle: RouterHandle | None = router.__dict__.get(HANDLE)
    cut = [handle.mask] if handle is not None and isinstance(handle.mask, CutMask) else []
    for mask in (*router.__dict__.get(MASKS, ()), *cut):
        dropped_E = dropped_E | mask.dropped_E.to(dropped_E.device)
    return dropped_E


def _put(router: nn.Module, mask: ExpertMask) -> None:
    """Add a mask; the hook comes with the first one."""
    stack: _Stack | None = router.__dict__.get(MASKS)
    if stack is None:
        stack = router.__dict__[MASKS] = _Stack()
        stack.handle = router.register_forward_hook(_choose_again, with_kwargs=True)
    stack.append(mask)


def _take_off(router: nn.Module, mask: ExpertMask) -> None:
    stack: _Stack = router.__dict__[MASKS]
    stack.remove(mask)
    if not stack:
        stack.handle.remove()
        del router.__dict__[MASKS]


def _choose_again(router: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    """Forward hook of a plain router: its choice among the experts that are left. A wrapped one does that itself."""
    stack: _Stack | None = router.__dict__.get(MASKS)
    if not stack or isinstance(router, ChronoRouter):
        return output
    z_TE = find(router).read(router, output).logits_TE
    beta_E = torch.zeros(z_TE.shape[-1], device=z_TE.device)
    return stack.reroute(router, RouterCall(output, z_TE, beta_E, "routing", args, kwargs))


def _choose(router: nn.Module, call: RouterCall, masked_adapter: Adapter, dropped_E: Tensor) -> Any:
    """The choice of `call` without the dropped experts: their logits are -inf, also in what is handed on."""
    native, low = masked_adapter.masked(call.output, dropped_E)
    z_TE = call.logits_TE.masked_fill(dropped_E, -math.inf)
    again = list(masked_adapter.reroute(router, call._replace(output=native, logits_TE=z_TE)))
    index = masked_adapter.logits_index
    if index is not None:
        again[index] = native[index].masked_fill(dropped_E, low)
    return type(native)(again) if isinstance(native, list) else tuple(again)


class _MaskedBias:
    """Mixin of an adapter whose native bias is -inf where a mask drops experts."""

    def _bias_of_call(self, router: nn.Module, call: RouterCall) -> Tensor | None:
        bias_E: Tensor | None = super()._bias_of_call(router, call)  # type: ignore[misc]
        if bias_E is None:
            return None
        dropped_E: Tensor = self.__dict__["dropped_E"]
        return bias_E.masked_fill(dropped_E.view(bias_E.shape), float("-inf"))


_MASKED_CLASSES: dict[type, type[Adapter]] = {}


def _masked_adapter(adapter: Adapter, dropped_E: Tensor) -> Adapter:
    """The same adapter, whose native bias is -inf for dropped experts."""
    kind = type(adapter)
    if kind not in _MASKED_CLASSES:
        _MASKED_CLASSES[kind] = type(f"Masked{kind.__name__}", (_MaskedBias, kind), {})
    out = _MASKED_CLASSES[kind](**{name: getattr(adapter, name) for name in adapter.__dataclass_fields__})
    out.__dict__["dropped_E"] = dropped_E
    return out
