"""Masking experts of a live model: what a checkpoint without them would compute, before one is written.

A mask at the router equals the sliced model: the logits of dropped experts are -inf before the score function, and so
is a native selection bias, so that survivors' weights are those of a router that never had the others. Nothing is
written into the model: a forward hook repeats the router's choice, and goes when the context ends.

Shape suffixes: E experts, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.lifecycle.live import match_layers
from chronomoe_hf.lifecycle.plan import PrunePlan
from chronomoe_hf.patches import Adapter, find
from chronomoe_hf.patches.singletons import GemmaAdapter
from chronomoe_hf.router.call import RouterCall, input_of
from chronomoe_hf.router.forward import ChronoRouter
from chronomoe_hf.router.state import HANDLE, RouterHandle
from chronomoe_hf.wrapping.discovery import FoundLayer

MASKS = "_chrono_masks"
"""Plain attribute of a masked router: the masks in force, innermost last."""

Model = TypeVar("Model", bound=nn.Module)


@dataclass(eq=False)
class ExpertMask:
    """One mask in force on one router.

    Args:
        dropped_E: bool, the experts that no token may choose.
        calls: forwards of the router that it acted on.
    """

    dropped_E: Tensor
    calls: int = 0


class _Stack(list[ExpertMask]):
    """The masks of one router, and the hook that obeys them."""

    handle: Any = None


@contextlib.contextmanager
def masked(model: Model, plan: PrunePlan) -> Iterator[Model]:
    """Run `model` as if the dropped experts of `plan` were gone; afterwards it is what it was, bit for bit.

    Works on wrapped and on plain models, in training (gradients flow to the survivors) and in evaluation. Contexts may
    be nested: then the experts that either plan drops are masked.

    Args:
        model: the model that the plan was made for.
        plan: what stays.

    Yields:
        `model`.

    Raises:
        PlanMismatchError: the plan is for another model.
        LifecycleError: a router cannot be masked, or nested plans leave too few experts.
    """
    layers = match_layers(model, plan.specs)
    with mask_experts(layers, [layer.dropped for layer in plan.layers]):
        yield model


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
    for mask in router.__dict__.get(MASKS, ()):
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
    """Forward hook: the router's choice among the experts that are left."""
    stack: list[ExpertMask] = router.__dict__.get(MASKS, [])
    if not stack:
        return output
    for mask in stack:
        mask.calls += 1
    adapter = find(router)
    z_TE, shift_TE = adapter.read(router, output).logits_TE, None
    dropped_E = _union(router, torch.zeros(z_TE.shape[-1], dtype=torch.bool)).to(z_TE.device)
    beta_E = torch.zeros(z_TE.shape[-1], device=z_TE.device)
    scope: Any = "routing"
    handle: RouterHandle | None = router.__dict__.get(HANDLE)
    if handle is not None:
        if handle.state.beta_on:
            beta_E, scope = handle.state.beta_applied.to(z_TE.device), handle.state.scope
        if handle.lens_open and handle.lens is not None:
            assert isinstance(router, ChronoRouter)
            hidden = input_of(args, kwargs, router.input_name)
            shift_TE = handle.lens.logit_shift(hidden.reshape(-1, hidden.shape[-1]), adapter.weight(router)).float()
    with_mask = _masked_adapter(adapter, dropped_E)
    z_TE = z_TE.masked_fill(dropped_E, float("-inf"))
    native = output
    if isinstance(adapter, GemmaAdapter):
        # The family hands on probabilities: those of the survivors, which its renormalisation brings back to sum 1.
        output = (output[0].masked_fill(dropped_E, 0.0), *output[1:])
    again = list(with_mask.reroute(router, RouterCall(output, z_TE, beta_E, scope, args, kwargs, shift_TE)))
    if adapter.logits_index is not None:
        again[adapter.logits_index] = native[adapter.logits_index]
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
