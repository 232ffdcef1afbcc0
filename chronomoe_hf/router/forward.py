"""The forward of a wrapped router.

Shape suffixes: E experts, T tokens, K experts per token, D router input width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from chronomoe_hf.metrics import js, overlap_only, top1_flip
from chronomoe_hf.router.call import RouterCall, input_of
from chronomoe_hf.router.state import HANDLE, RouterHandle, RouterRule, RouterState


class ChronoRouter(nn.Module):
    """Mixin placed before a router's own class: ``class ChronoX(ChronoRouter, X)``.

    The native forward always runs first, so its logits stand at the recorded index untouched. While nothing
    steers, its output is returned as it is; otherwise the adapter repeats the choice with the biased logits.
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
        state, lens, adapter = handle.state, handle.lens, self.adapter
        recording = handle.recorder.active
        # Lenses open layer by layer, and a graph for every pattern of open ones would soon reach the compiler's limit:
        # in a compiled graph they open together, those at scale 0 shifting by exactly 0.
        together = torch.compiler.is_compiling() and lens is not None and handle.recorder.any_steering
        lens_open = together or handle.lens_open
        if not (recording or state.beta_on or lens_open):
            return output
        routing = adapter.read(self, output)
        disagreement = differs_T = None
        if state.beta_on or lens_open:
            clean_TE, shift_TE = routing.logits_TE, None
            if lens_open:
                assert lens is not None
                hidden = input_of(args, kwargs, self.input_name)
                shift_TE = lens.logit_shift(_flat(hidden), adapter.weight(self)).float()
            beta_E = state.beta_applied.to(clean_TE.device)
            output = adapter.reroute(self, RouterCall(output, clean_TE, beta_E, state.scope, args, kwargs, shift_TE))
            if recording:
                native, routing = routing, adapter.read(self, output)
                differs_T = experts_differ(native.index_TK, routing.index_TK)
                if state.beta_on:
                    disagreement = measure_disagreement(self, clean_TE.detach(), state.beta_full)
        if recording:
            handle.recorder.router_input(input_of(args, kwargs, self.input_name))
            handle.recorder.routing(routing, self._distribution, disagreement, differs_T)
        return output

    def _distribution(self, logits_TE: Tensor) -> Tensor:
        return self.adapter.distribution(self, logits_TE)


def _flat(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def experts_differ(native_TK: Tensor, steered_TK: Tensor) -> Tensor:
    """Bool ``(T,)``: the two choices are different sets of experts (their order does not matter)."""
    return (native_TK.sort(-1).values != steered_TK.sort(-1).values).any(-1)


def measure_disagreement(router: ChronoRouter, clean_TE: Tensor, beta_full_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: JS divergence (nats), top-1 flip (0/1) and moved mass between clean and fully biased routing.

    Args:
        router: supplies the family's score distribution.
        clean_TE: clean logits, detached.
        beta_full_E: the full, unvetoed bias in logits.

    Returns:
        Three fp32 tensors of shape ``(T,)``.
    """
    with torch.no_grad(), torch.autocast(clean_TE.device.type, enabled=False):
        z_TE = clean_TE.float()
        biased_TE = z_TE + beta_full_E.to(z_TE.device)
        p_TE = router.adapter.distribution(router, z_TE)
        q_TE = router.adapter.distribution(router, biased_TE)
        return js(q_TE, p_TE), top1_flip(q_TE, p_TE).float(), overlap_only(q_TE, p_TE)
