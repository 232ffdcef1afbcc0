"""The wrapped router: its slow state, the laws that move beta, and the forward."""

from chronomoe_hf.router.beta_laws import compute_relevance
from chronomoe_hf.router.forward import ChronoRouter, RouterState, update_beta

__all__ = ["ChronoRouter", "RouterState", "compute_relevance", "update_beta"]
