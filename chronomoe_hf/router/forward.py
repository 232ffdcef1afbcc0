"""The wrapped router: its state, and the forward of ChronoRouter.

Shape suffixes: L layers, E experts, T tokens, K experts per token, D router input width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from chronomoe_hf.coherence import CoherenceState
from chronomoe_hf.metrics import js, overlap_only, top1_flip
from chronomoe_hf.router.beta_laws import coherence_law
from chronomoe_hf.router.beta_laws import compute_relevance as compute_relevance

if TYPE_CHECKING:  # the adapter's room lies to the right of this one; only its type is needed here
    from chronomoe_hf.lens.lens import ChronoLens
    from chronomoe_hf.patches.registry import Adapter

HANDLE = "_chrono_handle"
"""Name of the plain attribute through which a wrapped module finds its layer. Never a registered buffer."""


class Routing(NamedTuple):
    """What a router decided, read from its native output.

    Args:
        logits_TE: clean router logits flattened to two dimensions, native dtype.
        index_TK: int64 expert ids chosen, before capacity dropping.
        kept_TK: bool, False where capacity dropped the assignment; None = nothing can be dropped.
    """

    logits_TE: Tensor
    index_TK: Tensor
    kept_TK: Tensor | None = None


class Recorder(Protocol):
    """What the forward tells its observer; implemented in ``observe``."""

    @property
    def active(self) -> bool:
        """Whether this forward is recorded."""

    @property
    def any_steering(self) -> bool:
        """Whether anything steers in any layer of the system."""

    def routing(
        self,
        routing: Routing,
        distribution: Any,
        disagreement: tuple[Tensor, Tensor, Tensor] | None,
        differs_T: Tensor | None = None,
    ) -> None:
        """Add one router call to the accumulators."""

    def router_input(self, hidden: Tensor) -> None:
        """Add the router's input to the running mean, where a lens will need it."""


@dataclass
class RouterState:
    """Slow state of one router. Tensors are plain (never registered), fp32, updated in place between forwards.

    Args:
        layer_id: position of the layer among the wrapped ones.
        num_experts: E.
        beta_coeff: promotion prior, shape ``(E,)``, in logit standard deviations, zero-centred, within +-k_max.
        k_max: cap on ``|beta_coeff|``.
        logit_std_ema: 0-dim, bias-corrected EMA of the logit standard deviation.
        relevance: 0-dim in [0, 1], the bridge veto; 1 = beta fully applied.
        disagreement_js: 0-dim, nats, of the full (unvetoed) beta over the last step.
        disagreement_flip: 0-dim, top-1 flip rate over the last step.
        overlap_only: 0-dim, probability mass that beta moved over the last step.
        beta_full: shape ``(E,)``, clamp(beta_coeff) * logit_std_ema, in logits.
        beta_applied: shape ``(E,)``, relevance * beta_full: what the forward adds.
        scope: ``"routing"`` or ``"selection"``.
        beta_on: whether the forward applies beta at all (a host-side switch: no step reads the device for it).
    """

    layer_id: int
    num_experts: int
    beta_coeff: Tensor
    k_max: float
    logit_std_ema: Tensor
    relevance: Tensor
    disagreement_js: Tensor
    disagreement_flip: Tensor
    overlap_only: Tensor
    beta_full: Tensor
    beta_applied: Tensor
    scope: Literal["routing", "selection"] = "routing"
    beta_on: bool = False

    @classmethod
    def fresh(cls, layer_id: int, num_experts: int, k_max: float = 0.3) -> RouterState:
        """Neutral state on the CPU: beta 0, relevance 1."""
        zero = torch.zeros(())
        return cls(
            layer_id=layer_id,
            num_experts=num_experts,
            beta_coeff=torch.zeros(num_experts),
            k_max=k_max,
            logit_std_ema=torch.ones(()),
            relevance=torch.ones(()),
            disagreement_js=zero.clone(),
            disagreement_flip=zero.clone(),
            overlap_only=zero.clone(),
            beta_full=torch.zeros(num_experts),
            beta_applied=torch.zeros(num_experts),
        )

    def refresh_(self) -> None:
        """Recompute `beta_full` and `beta_applied` from the other fields, in place."""
        self.beta_full.copy_(self.beta_coeff.clamp(-self.k_max, self.k_max) * self.logit_std_ema)
        self.beta_applied.copy_(self.relevance * self.beta_full)


@dataclass
class RouterHandle:
    """How a router module reaches its slow state; shared with the ChronoSystem, never registered as a submodule."""

    state: RouterState
    recorder: Recorder
    lens: ChronoLens | None = None
    lens_open: bool = False


class ChronoRouter(nn.Module):
    """Mixin placed before a router's own class: ``class ChronoX(ChronoRouter, X)``.

    The native forward always runs first, so its logits stand at the recorded index untouched. While nothing
    steers, its output is returned as it is; otherwise the adapter repeats the choice with the biased logits.
    """

    adapter: ClassVar[Adapter]

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
            clean_TE = z_TE = routing.logits_TE
            beta_E = state.beta_applied.to(z_TE.device)
            if lens_open:
                assert lens is not None
                z_TE = z_TE.float() + lens.logit_shift(_flat(args[0]), adapter.weight(self))
            output = adapter.reroute(self, output, z_TE, beta_E, state.scope, args, kwargs)
            if recording:
                native, routing = routing, adapter.read(self, output)
                differs_T = experts_differ(native.index_TK, routing.index_TK)
                if state.beta_on:
                    disagreement = measure_disagreement(self, clean_TE.detach(), state.beta_full)
        if recording:
            handle.recorder.router_input(args[0])
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


def update_beta(
    router_state: RouterState,
    coherence_snapshot: Mapping[int, CoherenceState],
    eta: float = 0.01,
    tau: float | str = "layer_mean",
    stale_after: int = 1000,
) -> None:
    """Apply the coherence law to one router, in place.

    Args:
        router_state: its `beta_coeff`, `beta_full`, `beta_applied` change; nothing else.
        coherence_snapshot: ``CoherenceBuffer.snapshot(step)``.
        eta: gain per update.
        tau: a number in [-1, 1] or ``"layer_mean"``.
        stale_after: experts not seen for that many steps rest.

    Raises:
        ValueError: the snapshot is of another number of experts.
    """
    num = router_state.num_experts
    if sorted(coherence_snapshot) != list(range(num)):
        raise ValueError(f"the snapshot covers experts {sorted(coherence_snapshot)}, the router has {num}")
    states = [coherence_snapshot[e] for e in range(num)]
    device = router_state.beta_coeff.device
    seen = [s.phi_slow is not None and s.step - s.last_step <= stale_after for s in states]
    beta_E = coherence_law(
        router_state.beta_coeff,
        torch.tensor([s.phi_slow or 0.0 for s in states], dtype=torch.float64, device=device),
        torch.tensor(seen, device=device),
        torch.tensor([s.tokens_seen for s in states], device=device),
        eta=eta,
        tau=tau,
        k_max=router_state.k_max,
    )
    router_state.beta_coeff.copy_(beta_E)
    router_state.beta_on = True
    router_state.refresh_()
