"""chronomoe_hf: observable, governable and honest expert routing for Hugging Face mixture-of-experts fine-tuning.

Names are imported when they are first used, so that reading a run's records does not load torch.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chronomoe_hf import config as config
    from chronomoe_hf import controller as controller
    from chronomoe_hf import errors as errors
    from chronomoe_hf import lifecycle as lifecycle
    from chronomoe_hf import metrics as metrics
    from chronomoe_hf import original as original
    from chronomoe_hf import report as report
    from chronomoe_hf import router as router
    from chronomoe_hf import telemetry as telemetry
    from chronomoe_hf import trainer as trainer
    from chronomoe_hf.api import system_of as system_of
    from chronomoe_hf.api import unwrap as unwrap
    from chronomoe_hf.api import wrap as wrap
    from chronomoe_hf.coherence import CoherenceBuffer as CoherenceBuffer
    from chronomoe_hf.coherence import CoherenceState as CoherenceState
    from chronomoe_hf.config import ChronoConfig as ChronoConfig
    from chronomoe_hf.lens.lens import ChronoLens as ChronoLens
    from chronomoe_hf.lens.lens import IdentityLens as IdentityLens
    from chronomoe_hf.lifecycle.dry_run.coordinator import LifecycleCoordinator as LifecycleCoordinator
    from chronomoe_hf.lifecycle.dry_run.coordinator import PruneDecision as PruneDecision
    from chronomoe_hf.profiling import profile as profile
    from chronomoe_hf.router.forward import ChronoRouter as ChronoRouter
    from chronomoe_hf.router.state import RouterState as RouterState
    from chronomoe_hf.system import ChronoSystem as ChronoSystem
    from chronomoe_hf.telemetry import LayerSnapshot as LayerSnapshot
    from chronomoe_hf.telemetry import RoutingEvent as RoutingEvent
    from chronomoe_hf.telemetry import SystemSnapshot as SystemSnapshot
    from chronomoe_hf.telemetry import TelemetryWriter as TelemetryWriter
    from chronomoe_hf.tracing import trace as trace
    from chronomoe_hf.trainer.attach import attach as attach
    from chronomoe_hf.trainer.attach import detach as detach
    from chronomoe_hf.trainer.callback import ChronoCallback as ChronoCallback

__version__ = "0.2.0"

# What people start with; every other name below stays importable from here too.
__all__ = [
    "ChronoCallback",
    "ChronoConfig",
    "ChronoSystem",
    "attach",
    "detach",
    "profile",
    "system_of",
    "trace",
    "unwrap",
    "wrap",
]

# Where each public name lives, and the rooms that are offered as attributes; tests/test_lazy.py compares both with
# the imports above.
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
    "chronomoe_hf.tracing": ("trace",),
    "chronomoe_hf.trainer.attach": ("attach", "detach"),
    "chronomoe_hf.trainer.callback": ("ChronoCallback",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_ROOMS = (
    "config",
    "controller",
    "errors",
    "lifecycle",
    "metrics",
    "original",
    "report",
    "router",
    "telemetry",
    "trainer",
)

# A type checker reads the imports above; it would take any name for granted if it saw this function.
if not TYPE_CHECKING:

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
    return sorted({*globals(), *_HOME_OF, *_ROOMS})


if os.environ.get("CHRONOMOE"):  # attach to every Trainer of this process: see integrations/launch.py
    importlib.import_module("chronomoe_hf.integrations.launch").start()
