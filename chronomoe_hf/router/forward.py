"""The forward of a wrapped router.

Shape suffixes: E experts, T tokens, K experts per token, D router input width.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from chronomoe_hf.errors import WrapError
from chronomoe_hf.router.state import (
    HANDLE,
    MASKS,
    RouterCall,
    RouterHandle,
    RouterMask,
    RouterRule,
    RouterState,
    input_of,
)


class ChronoRouter(nn.Module):
    """Mixin placed before a router's own class: ``class ChronoX(ChronoRouter, X)``.

    The native forward always runs first, so its logits stand at the recorded index untouched. While nothing
    steers, its output is returned as it is; otherwise the adapter repeats the choice with the biased logits. Where
    experts are masked, the choice is repeated among the others, whose logits alone stay finite: what is recorded, and
    what a loss on the router's logits sees, is the router without them.
    """

    adapter: ClassVar[RouterRule]
    input_name: ClassVar[str]
    """Name of the first parameter of the native forward: some blocks pass the hidden states by name."""

    @property
    def router_state(self) -> RouterState:
        """Slow state of this router."""
        handle: RouterHandle = self.__dict__[HANDLE]
        return handle.state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The native router's inputs and outputs; see the class docstring."""
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        handle: RouterHandle = self.__dict__[HANDLE]
        mask: RouterMask | None = self.__dict__.get(MASKS) or handle.mask
        if torch.compiler.is_compiling() or mask is not None or handle.state.beta_on or handle.lens_open:
            return self._governed(handle, mask, output, args, kwargs)
        try:
            self._watched(handle, output, input_of(args, kwargs, self.input_name))
        except Exception as error:  # the model's own part is done: what fails here is ours, and changes nothing
            handle.recorder.fail(error)
        return output

    def _watched(self, handle: RouterHandle, output: Any, hidden: Tensor) -> None:
        """Nothing acts: have the state where the router runs, and remember what it decided."""
        handle.follow(hidden)
        if handle.recorder.active:
            handle.recorder.router_input(hidden)
            handle.recorder.routing(self, self.adapter.read(self, output), None, None)
        elif self.training:
            handle.recorder.not_active()

    def _governed(
        self, handle: RouterHandle, mask: RouterMask | None, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output with what acts, recorded; in a compiled graph also where nothing does."""
        state, lens, adapter = handle.state, handle.lens, self.adapter
        hidden = input_of(args, kwargs, self.input_name)
        if not torch.compiler.is_compiling():
            handle.follow(hidden)
        recording = handle.recorder.active
        # Lenses open layer by layer, and a graph for every pattern of open ones would soon reach the compiler's limit:
        # in a compiled graph they open together, those at scale 0 shifting by exactly 0.
        together = torch.compiler.is_compiling() and lens is not None and handle.recorder.any_steering
        lens_open = together or handle.lens_open
        steers = state.beta_on or lens_open
        if self.training and not (recording or torch.compiler.is_compiling()):
            handle.recorder.not_active()
        if not (recording or steers or mask is not None):
            return output
        routing = adapter.read(self, output)
        native_TK = None
        if steers or mask is not None:
            self._check_width(routing.logits_TE.shape[-1], state.num_experts)
            shift_TE = None
            if lens_open:
                assert lens is not None
                shift_TE = lens.logit_shift(_flat(hidden), adapter.weight(self)).float()
            beta_E = state.beta_applied if steers else torch.zeros_like(state.beta_applied)
            clean = RouterCall(output, routing.logits_TE, beta_E, state.scope, args, kwargs)
            if mask is None:
                output, steered = adapter.steer(self, clean._replace(shift_TE=shift_TE), recording)
                if steered is not None:
                    native_TK, routing = routing.index_TK.detach(), steered
            else:
                output = mask.reroute(self, clean._replace(shift_TE=shift_TE))
                if recording:
                    native_TK = self._unsteered(mask, clean) if steers else None
                    masked_E = mask.dropped_on(self, clean.logits_TE.device)
                    routing = adapter.read(self, output)._replace(logits_TE=clean.logits_TE, masked_E=masked_E)
        if recording:
            handle.recorder.router_input(hidden)
            handle.recorder.routing(self, routing, native_TK, state.beta_full if state.beta_on else None)
        return output

    def _check_width(self, width: int, num_experts: int) -> None:
        if width != num_experts:
            raise WrapError(
                f"{type(self).__name__} has {width} experts now and had {num_experts} when it was wrapped, and what "
                "acts on it is made for these; call chronomoe_hf.unwrap(model), then chronomoe_hf.wrap(model) again"
            )

    def _unsteered(self, mask: RouterMask, call: RouterCall) -> Tensor:
        """What the router would choose of the experts that are left, if nothing steered."""
        plain = mask.reroute(self, call._replace(beta_E=torch.zeros_like(call.beta_E)))
        return self.adapter.read(self, plain).index_TK.detach()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """``model.to(device)`` and the like: the state goes where the weight goes."""
        super()._apply(fn, recurse)
        weight_ED = self.adapter.weight(self)
        if not weight_ED.is_meta:
            self.__dict__[HANDLE].follow(weight_ED)
        return self


def _flat(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])
