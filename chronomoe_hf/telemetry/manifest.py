"""The run manifest: what a reader needs to know about a run before its records."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.telemetry.events import RECORD_SCHEMA

PACKAGES = ("chronomoe_hf", "torch", "transformers", "accelerate")


def versions() -> dict[str, str | None]:
    """Installed version of every package that shapes the numbers, None where absent, and Python's."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def run_manifest(
    *,
    run_id: str,
    config: ChronoConfig | Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    model_class: str,
    model_name: str = "",
    world_size: int = 1,
    attempt: int = 0,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Describe a run.

    Args:
        run_id: the run.
        config: the settings in force.
        layers: one mapping per MoE layer, by layer_id: ``layer_id``, ``name``, ``router_class``, ``n_experts``,
            ``top_k`` and whatever else helps a reader.
        model_class: class name of the model.
        model_name: name or path of the model, for people.
        world_size: processes that train together.
        attempt: 0 for the first start.
        notes: remarks in plain words.

    Returns:
        A JSON-ready dictionary; ``created`` is the time in UTC, ISO 8601.
    """
    return {
        "schema": RECORD_SCHEMA,
        "run_id": run_id,
        "attempt": attempt,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "config": config.to_dict() if isinstance(config, ChronoConfig) else dict(config),
        "model_class": model_class,
        "model_name": model_name,
        "world_size": world_size,
        "layers": [dict(layer) for layer in layers],
        "notes": list(notes),
    }
