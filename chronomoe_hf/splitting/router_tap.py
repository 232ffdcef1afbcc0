"""Repeating a layer's choice on tokens that were read once, with other router rows or with a shift of its logits.

The router itself chooses again, on the inputs that it got in a forward of the whole model: groups, native biases,
capacity and whatever else a family does are its own.

Shape suffixes: T tokens, K experts per token, E experts, D router input width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.lifecycle.live.model import Batch, RealTokens, forward_arguments, real_rows
from chronomoe_hf.recording.scope import forward_parameters
from chronomoe_hf.router.state import HANDLE, RouterHandle, input_of
from chronomoe_hf.wrapping.discovery import FoundLayer
from chronomoe_hf.wrapping.layer import Layer

_LINEAR_TOLERANCE = 0.02  # of the logits' standard deviation, for routers that compute in bf16


@dataclass
class RouterTap:
    """The calls of one router while the model runs, and its choice repeated on them.

    Args:
        layer: a live layer.
        wrapped: the same layer of the wrapped model, or None.
    """

    layer: FoundLayer
    wrapped: Layer | None
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor | None]] = field(default_factory=list)
    real: RealTokens = field(default_factory=RealTokens)

    def listen(self) -> list[Any]:
        """Put the hooks on and return their handles."""
        return [
            self.real.listen(self.layer.owner),
            self.layer.router.register_forward_pre_hook(self._router, with_kwargs=True),
        ]

    def _router(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append((_copied(args), _copied(kwargs), self.real.mask_T))

    def choose(self) -> Tensor:
        """The experts of every real token, by the router as it is now: int64 ``(T, K)``, before capacity drops."""
        return torch.cat([index_TK for index_TK, _ in self._again()])

    def logits(self) -> Tensor:
        """Clean logits of every real token, fp32 ``(T, E)``."""
        return torch.cat([logits_TE for _, logits_TE in self._again()])

    def hidden(self) -> Tensor:
        """What the router read, fp32 ``(T, D)``."""
        parts = []
        for args, kwargs, real_T in self.calls:
            hidden = input_of(args, kwargs, _input_name(self.layer.router))
            rows_TD = hidden.detach().reshape(-1, hidden.shape[-1])
            parts.append(real_rows(rows_TD, real_T).float())
        return torch.cat(parts)

    def _again(self) -> Iterator[tuple[Tensor, Tensor]]:
        adapter, router = self.layer.adapter, self.layer.router
        for args, kwargs, real_T in self.calls:
            routing = adapter.read(router, router.forward(*_copied(args), **_copied(kwargs)))
            yield real_rows(routing.index_TK, real_T), real_rows(routing.logits_TE, real_T).float()

    @contextlib.contextmanager
    def rows(self, rows: dict[int, Tensor]) -> Iterator[None]:
        """Other rows of the router's weight, by expert; every bit comes back."""
        weight_ED = self.layer.adapter.weight(self.layer.router)
        held = weight_ED.detach().clone()
        try:
            for expert, row_D in rows.items():
                weight_ED.detach()[expert] = row_D.to(weight_ED)
            yield
        finally:
            weight_ED.detach().copy_(held)

    @contextlib.contextmanager
    def shifted(self, shift_E: Tensor) -> Iterator[None]:
        """`shift_E` (logits) on top of what steers now: in the model's own correction bias or in beta."""
        assert self.wrapped is not None
        if self.wrapped.native_bias:
            bias_E = self.layer.adapter.native_bias(self.layer.router, self.layer.parent)
            assert bias_E is not None
            bias_E, held = bias_E.detach(), bias_E.detach().clone()
            slope = self.layer.adapter.rule.bias_slope(self.wrapped.num_experts)
            try:
                bias_E.add_((shift_E * slope).to(bias_E))
                yield
            finally:
                bias_E.copy_(held)
            return
        handle: RouterHandle = self.layer.router.__dict__[HANDLE]
        state = handle.state
        held, was_on = state.beta_applied.clone(), state.beta_on
        try:
            if not was_on:
                state.beta_applied.zero_()
            state.beta_applied.add_(shift_E.to(state.beta_applied))
            state.beta_on = True
            yield
        finally:
            state.beta_applied.copy_(held)
            state.beta_on = was_on

    def require_linear(self) -> None:
        """Check on the tokens read that the router's logits are its rows times its input, plus a constant.

        Raises:
            LifecycleError: they are not; then a row cannot be split along a direction of the inputs.
        """
        logits_TE, weight_ED = self.logits(), self.layer.adapter.weight(self.layer.router).detach().float()
        built_TE = self.hidden() @ weight_ED.T
        off_TE = logits_TE - built_TE
        off_TE = off_TE - off_TE.mean(0)
        size = float((logits_TE - logits_TE.mean(0)).std().clamp_min(1e-12))
        if not float(off_TE.std()) <= _LINEAR_TOLERANCE * size:
            raise LifecycleError(
                f"{self.layer.name}: the logits of {type(self.layer.router).__name__} are not its rows times its input "
                f"(off by {float(off_TE.std()) / size:.2g} of their spread), so its rows cannot be split"
            )


def read_calls(model: nn.Module, taps: Sequence[RouterTap], batches: Sequence[Batch]) -> None:
    """Run the model over the batches and keep the calls of its routers.

    Raises:
        LifecycleError: a router ran not exactly once in a forward.
    """
    handles = [handle for tap in taps for handle in tap.listen()]
    try:
        for number, batch in enumerate(batches, start=1):
            model(**forward_arguments(model, batch, logits=False))
            for tap in taps:
                if len(tap.calls) != number:
                    raise LifecycleError(
                        f"{tap.layer.name}: its router ran {len(tap.calls) - number + 1} times in one forward, so its "
                        "choice cannot be repeated"
                    )
    finally:
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    """Copies of every tensor in arguments: some routers write into their input."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), value)


def _input_name(router: nn.Module) -> str:
    return getattr(type(router), "input_name", None) or forward_parameters(router)[0]
