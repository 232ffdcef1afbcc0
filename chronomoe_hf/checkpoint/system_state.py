"""What a wrapped model's state consists of and how it comes back: parts to (tensors, meta) and again, bit for bit.

Only added-up state is saved, never the sums of an unfinished step, so a file always stands for a step boundary. This
room gets its parts from the system and knows no system.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.fingerprint import check_layers, fingerprint
from chronomoe_hf.checkpoint.state_file import has_state, read_state
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.controller import Controller
from chronomoe_hf.errors import ConfigError, StateCorruptError, StateError, StateMissingError
from chronomoe_hf.lifecycle import LifecycleCoordinator
from chronomoe_hf.step_state import StepState
from chronomoe_hf.telemetry import AlertHistory
from chronomoe_hf.wrapping.fold import WARN_ABOVE
from chronomoe_hf.wrapping.layer import Layer

logger = logging.getLogger("chronomoe_hf")

# Stacked tensors whose expert columns start at 0 and that have one row per layer on their second-to-last axis.
_PER_LAYER_AXIS = {"ema_CLE": 1}


@dataclass(frozen=True)
class Parts:
    """The stateful parts of a wrapped model; loading writes into them.

    Args:
        step_state: stacked device state.
        layers: the wrapped layers, with their lenses.
        controller, lifecycle, alerts: host state.
        config: settings in force.
    """

    step_state: StepState
    layers: Sequence[Layer]
    controller: Controller
    lifecycle: LifecycleCoordinator
    alerts: AlertHistory
    config: ChronoConfig


@dataclass(frozen=True)
class Position:
    """Where a run stands: what is saved besides tensors and the parts' own state.

    Args:
        step: optimizer steps done.
        window_steps: of these, in the open window.
        run_id: of the run.
        attempt: start or resume of the run.
        governed: something has acted on routing.
        beta_moved: a law has moved beta.
    """

    step: int
    window_steps: int
    run_id: str
    attempt: int
    governed: bool
    beta_moved: bool


def pack(parts: Parts, position: Position) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as CPU tensors by name and a JSON-ready mapping."""
    tensors = {name: value.cpu() for name, value in parts.step_state.state_dict().items()}
    for layer in parts.layers:
        if layer.handle.lens is not None:
            saved = layer.handle.lens.state_dict()
            tensors |= {f"lens.{layer.layer_id}.{name}": value.cpu() for name, value in saved.items()}
    meta = {
        "step": position.step,
        "window_steps": position.window_steps,
        "run_id": position.run_id,
        "attempt": position.attempt,
        "governed": position.governed,
        "steering": [layer.handle.state.beta_on for layer in parts.layers],
        "layers": [layer.table_row() for layer in parts.layers],
        "config": parts.config.to_dict(),
        "controller": parts.controller.state_dict(),
        "lifecycle": parts.lifecycle.state_dict(),
        "alerts": parts.alerts.state_dict(),
        "world_size": distributed.world_size(),
    }
    return tensors, meta


def unpack(parts: Parts, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Position:
    """Restore what :func:`pack` returned into the parts.

    Returns:
        Where the saved run stood.

    Raises:
        StateMismatchError: it belongs to another model, with a table of the differences.
        StateCorruptError: a part is missing.
    """
    live = [layer.table_row() for layer in parts.layers]
    pairs = check_layers(meta["layers"], live, parts.config.checkpoint.allow_partial)
    if "beta_LE" in tensors:  # gain_LE was added in schema 1.1; without it the gains start afresh
        tensors = {"gain_LE": torch.zeros_like(tensors["beta_LE"]), **tensors}
    missing = [name for name in parts.step_state.NAMES if name not in tensors]
    if missing:
        raise StateCorruptError(f"the saved state lacks {', '.join(missing)}; resume from another checkpoint")
    _warn_of_other_settings(parts.config, meta.get("config"))
    window_steps = 0
    if len(pairs) == len(live) == len(meta["layers"]) and all(old == new for old, new in pairs):
        parts.step_state.load_state_dict(tensors)
        parts.controller.load_state_dict(meta["controller"])
        parts.lifecycle.load_state_dict(meta["lifecycle"])
        parts.alerts.load_state_dict(meta["alerts"])
        window_steps = int(meta["window_steps"])
    else:
        _load_matching(parts, tensors, pairs)
    for old, new in pairs:
        lens = parts.layers[new].handle.lens
        prefix = f"lens.{old}."
        saved = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if lens is not None and saved:
            lens.load_state_dict(saved)
    return Position(
        step=int(meta["step"]),
        window_steps=window_steps,
        run_id=str(meta["run_id"]),
        attempt=int(meta.get("attempt", 0)),
        governed=bool(meta["governed"]),
        beta_moved=any(meta["steering"][old] for old, _ in pairs),
    )


def _load_matching(parts: Parts, tensors: dict[str, Tensor], pairs: list[tuple[int, int]]) -> None:
    """`allow_partial`: copy the layers that agree; the open window and the control state start fresh."""
    state = parts.step_state
    for name in state.NAMES:
        if name == "window_LR":
            continue
        axis = _PER_LAYER_AXIS.get(name, 0)
        live = getattr(state, name)
        for old, new in pairs:
            source, target = tensors[name].select(axis, old), live.select(axis, new)
            if target.dim() == 0:
                target.copy_(source)
            else:
                num = parts.layers[new].num_experts
                target[..., :num].copy_(source[..., :num])
    state.window_LR.zero_()
    logger.warning("loaded the state of %d of %d layers; the others start fresh", len(pairs), len(parts.layers))


def _warn_of_other_settings(live: ChronoConfig, saved: Any) -> None:
    if not isinstance(saved, dict):
        return
    try:
        before = ChronoConfig.from_dict(saved)
    except ConfigError:
        return
    changed = [name for name in live.differences(before) if not name.startswith(("telemetry.", "checkpoint."))]
    if changed:
        warnings.warn(f"resuming with other chronomoe settings than were saved: {', '.join(changed)}", stacklevel=5)


def live_fingerprint(layers: Sequence[Layer]) -> dict[str, str]:
    """Fingerprint of every router parameter and of a slice of every expert tensor; see ``fingerprint``."""
    whole: list[tuple[str, Tensor]] = []
    sampled: list[tuple[str, Tensor]] = []
    for layer in layers:
        for name, value in layer.router.named_parameters():
            whole.append((f"{layer.name}.{name}", value))
        experts = layer.adapter.experts
        if experts is not None and experts in layer.parent._modules:
            for name, value in layer.parent.get_submodule(experts).named_parameters():
                target = whole if value.dim() == 3 else sampled
                target.append((f"{layer.name}.{experts}.{name}", value))
    return fingerprint(whole, sampled)


def report_disagreement(step_state: StepState, layers: Sequence[Layer]) -> list[float | None]:
    """Per layer, the share of tokens that a plain reload of this checkpoint would route otherwise; warns above 1 %."""
    shares = step_state.topk_disagreement()
    known = [(share, layer.name) for share, layer in zip(shares, layers, strict=True) if share is not None]
    if known and max(known)[0] > WARN_ABOVE:
        worst, name = max(known)
        logger.warning(
            "outside chronomoe_hf this checkpoint routes %.1f %% of the tokens of %s to other experts than now; "
            "keep its folder chronomoe, or unwrap(model, fold=True) before the final save",
            100.0 * worst,
            name,
        )
    return shares


def read_for_all(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The state in `directory`, read by the main process and given to every rank; None where there is none. Collective.

    Raises:
        StateError: torn, foreign, or of another schema; the message names the file and the way out.
    """
    found: Any = None
    if distributed.is_main():
        try:
            found = read_state(directory) if has_state(directory) else None
        except StateError as error:
            found = error
    found = distributed.broadcast_object(found)
    if isinstance(found, StateError):
        raise found
    return None if found is None else (found[0], found[1])


def missing(config: ChronoConfig, directory: str | Path, acted: bool) -> None:
    """There is no state in `directory`: warn, or raise by ``CheckpointConfig.on_missing``.

    Args:
        config: settings in force.
        directory: where the state was looked for.
        acted: the live run has been governed.

    Raises:
        StateMissingError: ``on_missing`` is ``"raise"``, or ``"auto"`` and the run has been governed.
    """
    if config.checkpoint.on_missing == "raise" or (config.checkpoint.on_missing == "auto" and acted):
        raise StateMissingError(
            f"no chronomoe state in {directory}{', although this run has been governed' if acted else ''}; routing "
            "would change silently. Resume from a checkpoint that has chronomoe/state.json, or set "
            "CheckpointConfig(on_missing='fresh') to start with beta = 0"
        )
    warnings.warn(f"no chronomoe state in {directory}: starting with fresh statistics and beta = 0", stacklevel=4)
