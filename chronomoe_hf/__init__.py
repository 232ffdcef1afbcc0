"""chronomoe_hf: observable, governable and honest expert routing for Hugging Face mixture-of-experts fine-tuning."""

from chronomoe_hf.api import system_of, unwrap, wrap
from chronomoe_hf.coherence import CoherenceBuffer, CoherenceState
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.lens.lens import ChronoLens, IdentityLens
from chronomoe_hf.lifecycle.coordinator import LifecycleCoordinator, PruneDecision
from chronomoe_hf.router.forward import ChronoRouter
from chronomoe_hf.router.state import RouterState
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.telemetry import LayerSnapshot, RoutingEvent, SystemSnapshot, TelemetryWriter
from chronomoe_hf.trainer.attach import attach, detach
from chronomoe_hf.trainer.callback import ChronoCallback

__version__ = "0.1.0"

__all__ = [
    "ChronoCallback",
    "ChronoConfig",
    "ChronoLens",
    "ChronoRouter",
    "ChronoSystem",
    "CoherenceBuffer",
    "CoherenceState",
    "IdentityLens",
    "LayerSnapshot",
    "LifecycleCoordinator",
    "PruneDecision",
    "RouterState",
    "RoutingEvent",
    "SystemSnapshot",
    "TelemetryWriter",
    "attach",
    "detach",
    "system_of",
    "unwrap",
    "wrap",
]
