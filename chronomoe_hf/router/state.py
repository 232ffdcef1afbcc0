"""What a wrapped router points to: its slow state, its lens, its recorder; and what the forward asks of others.

Shape suffixes: L layers, E experts, T tokens, K experts per token, D router input width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from chronomoe_hf.lens.lens import ChronoLens

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


class RouterRule(Protocol):
    """What the forward must know of a family: how its router's output is read and how it chooses (``patches``)."""

    def weight(self, router: nn.Module) -> Tensor:
        """The router's own weight ``(E, D)``."""

    def read(self, router: nn.Module, output: Any) -> Routing:
        """Clean logits, chosen ids and capacity drops of a native output."""

    def distribution(self, router: nn.Module, logits_TE: Tensor) -> Tensor:
        """The family's scores of logits as a distribution, fp32 ``(T, E)``."""

    def reroute(
        self,
        router: nn.Module,
        output: Any,
        z_TE: Tensor,
        beta_E: Tensor,
        scope: Literal["routing", "selection"],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Choose again with ``z + beta``; the native structure."""


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

    @property
    def lens_open(self) -> bool:
        """Whether a lens acts in this layer."""
        return self.lens is not None and self.lens.is_open
