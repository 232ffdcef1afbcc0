"""Which experts could go: the dry run."""

from chronomoe_hf.lifecycle.coordinator import LifecycleCoordinator, PruneDecision

__all__ = ["LifecycleCoordinator", "PruneDecision"]
