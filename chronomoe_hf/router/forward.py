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
    Routing,
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
        acts = mask is not None or handle.state.beta_on or handle.lens_open or handle.replays
        if torch.compiler.is_compiling() or acts:
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
        replays = handle.replays
        if not (recording or steers or mask is not None or replays):
            return output
        routing, native_TK = adapter.read(self, output), None
        if steers or mask is not None or replays:
            self._check_width(routing.logits_TE.shape[-1], state.num_experts)
            shift_TE = None
            if lens_open:
                assert lens is not None
                shift_TE = lens.logit_shift(_flat(hidden), adapter.weight(self)).float()
            beta_E = state.beta_applied if steers else torch.zeros_like(state.beta_applied)
            call = RouterCall(output, routing.logits_TE, beta_E, state.scope, args, kwargs, shift_TE)
            if steers or mask is not None:
                output, own, native_TK = self._steered(mask, call, routing, steers, recording or replays)
                routing = routing if own is None else own
            if replays:
                output, routing = self._replayed(handle, mask, call, output, routing, recording)
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

    def _steered(
        self, mask: RouterMask | None, call: RouterCall, routing: Routing, steers: bool, recorded: bool
    ) -> tuple[Any, Routing | None, Tensor | None]:
        """The choice with what steers among the experts that are left; what it was, and what it is without steering."""
        if mask is None:
            output, steered = self.adapter.steer(self, call, recorded)
            return output, steered, None if steered is None else routing.index_TK.detach()
        output = mask.reroute(self, call)
        if not recorded:
            return output, None, None
        return output, self._read_masked(mask, call, output), self._unsteered(mask, call) if steers else None

    def _read_masked(self, mask: RouterMask, call: RouterCall, output: Any) -> Routing:
        masked_E = mask.dropped_on(self, call.logits_TE.device)
        return self.adapter.read(self, output)._replace(logits_TE=call.logits_TE, masked_E=masked_E)

    def _replayed(
        self,
        handle: RouterHandle,
        mask: RouterMask | None,
        call: RouterCall,
        output: Any,
        own: Routing,
        recording: bool,
    ) -> tuple[Any, Routing]:
        """The choice that another pass has made of the same tokens, where there is one; what is to be recorded."""
        assert handle.replay is not None
        given_TK = handle.replay.given(handle.state.layer_id, own.index_TK.detach(), own.masked_E)
        if given_TK is None:
            return output, own
        call = call._replace(index_TK=given_TK)
        if mask is None:
            output, routing = self.adapter.steer(self, call, recording)
        else:
            output = mask.reroute(self, call)
            routing = self._read_masked(mask, call, output) if recording else None
        return output, own if routing is None or handle.replay.counts_own else routing

    def _unsteered(self, mask: RouterMask, call: RouterCall) -> Tensor:
        """What the router would choose of the experts that are left, if nothing steered."""
        plain = mask.reroute(self, call._replace(beta_E=torch.zeros_like(call.beta_E), shift_TE=None))
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
