"""The wrapped router: its slow state, the laws that move beta, and the forward."""

from chronomoe_hf.router.forward import ChronoRouter
from chronomoe_hf.router.original import compute_relevance, update_beta
from chronomoe_hf.router.state import RouterState

__all__ = ["ChronoRouter", "RouterState", "compute_relevance", "update_beta"]
