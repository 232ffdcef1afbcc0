"""The laws of beta and of the veto as the original documents write them, on one layer and plain values."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from chronomoe_hf.coherence import CoherenceState
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.router.laws import coherence_law, relevance_of
from chronomoe_hf.router.state import RouterState


def compute_relevance(router_state: RouterState, threshold: float = 0.2) -> float:
    """Relevance of one router's beta, by the divergence of clean and biased routing. Waits for the device.

    Args:
        router_state: its `disagreement_js` is read.
        threshold: nats; relevance is 1 below it and 0 from three times it on.

    Raises:
        ConfigError: the threshold is not positive.
    """
    # The original's loops assign a plain number to this field.
    js = torch.as_tensor(router_state.disagreement_js, dtype=torch.float64)
    return float(relevance_of(js, threshold))


def update_beta(
    router_state: RouterState,
    coherence_snapshot: Mapping[int, CoherenceState],
    eta: float = 0.01,
    tau: float | str = "layer_mean",
    centred: bool = True,
) -> None:
    """Apply the coherence law to one router, in place.

    Args:
        router_state: its `beta_coeff`, `beta_full`, `beta_applied` change, and `beta_on` becomes True; nothing else.
        coherence_snapshot: ``CoherenceBuffer.snapshot(step)``; experts that are not being observed rest.
        eta: gain per update.
        tau: a number in [-1, 1] or ``"layer_mean"``.
        centred: zero-centre beta over the layer; False only clamps, as the original.

    Raises:
        ConfigError: the snapshot is of another number of experts, or tau is another word.
    """
    num = router_state.num_experts
    if sorted(coherence_snapshot) != list(range(num)):
        raise ConfigError(f"the snapshot covers experts {sorted(coherence_snapshot)}, the router has {num}")
    states = [coherence_snapshot[e] for e in range(num)]
    device = router_state.beta_coeff.device
    beta_E = coherence_law(
        router_state.beta_coeff,
        torch.tensor([s.phi_slow or 0.0 for s in states], dtype=torch.float64, device=device),
        torch.tensor([s.is_being_observed and s.phi_slow is not None for s in states], device=device),
        torch.tensor([s.total_tokens_seen for s in states], device=device),
        eta=eta,
        tau=tau,
        k_max=router_state.k_max,
        centred=centred,
    )
    router_state.beta_coeff.copy_(beta_E)
    router_state.beta_on = True
    router_state.refresh_()
