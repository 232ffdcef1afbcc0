"""chronomoe_hf: observable, governable and honest expert routing for Hugging Face mixture-of-experts fine-tuning."""

from chronomoe_hf.api import system_of, unwrap, wrap
from chronomoe_hf.callback import ChronoCallback, attach
from chronomoe_hf.coherence import CoherenceBuffer, CoherenceState
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.lens import ChronoLens, IdentityLens
from chronomoe_hf.lifecycle import LifecycleCoordinator, PruneDecision
from chronomoe_hf.router import ChronoRouter, RouterState
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.telemetry import LayerSnapshot, RoutingEvent, SystemSnapshot, TelemetryWriter

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
    "system_of",
    "unwrap",
    "wrap",
]
