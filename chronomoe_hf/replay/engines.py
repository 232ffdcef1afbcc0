"""Engines that have to be asked for routes before they are built; nothing of them is imported until then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from chronomoe_hf.errors import ReplayError


@contextlib.contextmanager
def vllm_routes() -> Iterator[None]:
    """Around the construction of a TRL trainer with a colocated vLLM: its engine is asked to return routes.

    TRL builds ``LLM(...)`` inside the trainer's constructor with fixed arguments, where the switch has no place::

        with chronomoe_hf.replay.vllm_routes():
            trainer = GRPOTrainer(..., args=GRPOConfig(use_vllm=True, vllm_mode="colocate"))

    Raises:
        ReplayError: this TRL has no such engine, or vLLM is not installed.
    """
    try:
        from trl.generation import vllm_generation
    except ImportError as error:
        raise ReplayError(f"TRL has no vLLM engine here: {error}; install trl[vllm]") from error
    engine = getattr(vllm_generation, "LLM", None)
    if engine is None:
        raise ReplayError("TRL found no vLLM when it was imported; install trl[vllm] (vLLM 0.22 or newer)")

    def with_routes(*args: Any, **kwargs: Any) -> Any:
        return engine(*args, **{"enable_return_routed_experts": True, **kwargs})

    vllm_generation.LLM = with_routes  # type: ignore[attr-defined]
    try:
        yield
    finally:
        vllm_generation.LLM = engine  # type: ignore[attr-defined]
