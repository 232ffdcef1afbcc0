"""chronomoe_hf: observable, governable and honest expert routing for Hugging Face mixture-of-experts fine-tuning.

Names are imported when they are first used, so that reading a run's records does not load torch.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chronomoe_hf.api import system_of, unwrap, wrap
    from chronomoe_hf.coherence import CoherenceBuffer, CoherenceState
    from chronomoe_hf.config import ChronoConfig
    from chronomoe_hf.lens.lens import ChronoLens, IdentityLens
    from chronomoe_hf.lifecycle.dry_run.coordinator import LifecycleCoordinator, PruneDecision
    from chronomoe_hf.profiling import profile
    from chronomoe_hf.router.forward import ChronoRouter
    from chronomoe_hf.router.state import RouterState
    from chronomoe_hf.system import ChronoSystem
    from chronomoe_hf.telemetry import LayerSnapshot, RoutingEvent, SystemSnapshot, TelemetryWriter
    from chronomoe_hf.trainer.attach import attach, detach
    from chronomoe_hf.trainer.callback import ChronoCallback

__version__ = "0.2.0"

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
    "profile",
    "system_of",
    "unwrap",
    "wrap",
]

# Where each public name lives; tests/test_lazy.py compares it with __all__ and the imports above.
_HOMES = {
    "chronomoe_hf.api": ("system_of", "unwrap", "wrap"),
    "chronomoe_hf.coherence": ("CoherenceBuffer", "CoherenceState"),
    "chronomoe_hf.config": ("ChronoConfig",),
    "chronomoe_hf.lens.lens": ("ChronoLens", "IdentityLens"),
    "chronomoe_hf.lifecycle.dry_run.coordinator": ("LifecycleCoordinator", "PruneDecision"),
    "chronomoe_hf.profiling": ("profile",),
    "chronomoe_hf.router.forward": ("ChronoRouter",),
    "chronomoe_hf.router.state": ("RouterState",),
    "chronomoe_hf.system": ("ChronoSystem",),
    "chronomoe_hf.telemetry": ("LayerSnapshot", "RoutingEvent", "SystemSnapshot", "TelemetryWriter"),
    "chronomoe_hf.trainer.attach": ("attach", "detach"),
    "chronomoe_hf.trainer.callback": ("ChronoCallback",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:  # a room, as in `import chronomoe_hf; chronomoe_hf.telemetry`
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if os.environ.get("CHRONOMOE"):  # attach to every Trainer of this process: see integrations/launch.py
    importlib.import_module("chronomoe_hf.integrations.launch").start()
