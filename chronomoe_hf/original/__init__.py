"""The loop of the original documents on plain tensors: one layer, one process; tests hold the stacked state against it.

Nothing here runs in a wrapped model. What the originals call by the same names and a wrapped model does use lies where
it is used: ``CoherenceBuffer``, ``RouterState``, ``Controller``, ``LifecycleCoordinator``.
"""

from chronomoe_hf.original.beta import compute_relevance, update_beta

__all__ = ["compute_relevance", "update_beta"]
