"""What a ChronoSystem saves and how it comes back: state to (tensors, meta) and again, bit for bit.

Only folded state is saved, never the accumulators of an unfinished step, so a file always stands for a step boundary.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.fingerprint import check_layers, fingerprint
from chronomoe_hf.checkpoint.state_file import has_state, read_state, write_state
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.errors import ConfigError, StateCorruptError, StateError, StateMissingError
from chronomoe_hf.wrapping.fold import WARN_ABOVE

if TYPE_CHECKING:  # system imports this room
    from chronomoe_hf.system import ChronoSystem

logger = logging.getLogger("chronomoe_hf")

# Bank tensors whose expert columns start at 0 and that have one row per layer on their second-to-last axis.
_PER_LAYER_AXIS = {"ema_CLE": 1}


def pack(system: ChronoSystem) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The system's state as CPU tensors by name and a JSON-ready mapping."""
    tensors = {name: value.cpu() for name, value in system.step_state.state_dict().items()}
    for layer_id, lens in system.lenses.items():
        tensors |= {f"lens.{layer_id}.{name}": value.cpu() for name, value in lens.state_dict().items()}
    meta = {
        "step": system.global_step,
        "window_steps": system.window_steps,
        "run_id": system.run_id,
        "attempt": system.attempt,
        "governed": system.governed,
        "steering": [layer.handle.state.beta_on for layer in system.layers],
        "layers": [layer.table_row() for layer in system.layers],
        "config": system.config.to_dict(),
        "controller": system.controller.state_dict(),
        "lifecycle": system.lifecycle.state_dict(),
        "alerts": system.alerts.state_dict(),
        "world_size": distributed.world_size(),
    }
    return tensors, meta


def unpack(system: ChronoSystem, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Restore a state written by :func:`pack`.

    Raises:
        StateMismatchError: it belongs to another model, with a table of the differences.
        StateCorruptError: a part is missing.
    """
    live = [layer.table_row() for layer in system.layers]
    pairs = check_layers(meta["layers"], live, system.config.checkpoint.allow_partial)
    if "beta_LE" in tensors:  # gain_LE was added in schema 1.1; without it the gains start afresh
        tensors = {"gain_LE": torch.zeros_like(tensors["beta_LE"]), **tensors}
    missing = [name for name in system.step_state.NAMES if name not in tensors]
    if missing:
        raise StateCorruptError(f"the saved state lacks {', '.join(missing)}; resume from another checkpoint")
    _warn_of_other_settings(system.config, meta.get("config"))
    if len(pairs) == len(live) == len(meta["layers"]) and all(old == new for old, new in pairs):
        system.step_state.load_state_dict(tensors)
        system.controller.load_state_dict(meta["controller"])
        system.lifecycle.load_state_dict(meta["lifecycle"])
        system.alerts.load_state_dict(meta["alerts"])
        system.window_steps = int(meta["window_steps"])
    else:
        _load_matching(system, tensors, pairs)
    for old, new in pairs:
        layer = system.layers[new]
        layer.handle.state.beta_on = bool(meta["steering"][old])
        lens = layer.handle.lens
        prefix = f"lens.{old}."
        saved = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if lens is not None and saved:
            lens.load_state_dict(saved)
            layer.handle.lens_open = lens.scale > 0.0
    system.governed = bool(meta["governed"])
    system.global_step = int(meta["step"])
    system.run_id = str(meta["run_id"])
    system.resumed()


def _load_matching(system: ChronoSystem, tensors: dict[str, Tensor], pairs: list[tuple[int, int]]) -> None:
    """`allow_partial`: copy the layers that agree; the open window and the control state start fresh."""
    for name in system.step_state.NAMES:
        if name == "window_LR":
            continue
        axis = _PER_LAYER_AXIS.get(name, 0)
        live = getattr(system.step_state, name)
        for old, new in pairs:
            source, target = tensors[name].select(axis, old), live.select(axis, new)
            if target.dim() == 0:
                target.copy_(source)
            else:
                num = system.layers[new].num_experts
                target[..., :num].copy_(source[..., :num])
    system.step_state.window_LR.zero_()
    system.window_steps = 0
    logger.warning("loaded the state of %d of %d layers; the others start fresh", len(pairs), len(system.layers))


def _warn_of_other_settings(live: ChronoConfig, saved: Any) -> None:
    if not isinstance(saved, dict):
        return
    try:
        before = ChronoConfig.from_dict(saved).to_dict()
    except ConfigError:
        return
    now = live.to_dict()
    changed = sorted(name for name in now if now[name] != before[name] and name not in ("telemetry", "checkpoint"))
    if changed:
        warnings.warn(f"resuming with other chronomoe settings than were saved: {', '.join(changed)}", stacklevel=4)


def live_fingerprint(system: ChronoSystem) -> dict[str, str]:
    """Fingerprint of every router parameter and of a slice of every expert tensor; see ``fingerprint``."""
    whole: list[tuple[str, Tensor]] = []
    sampled: list[tuple[str, Tensor]] = []
    for layer in system.layers:
        for name, value in layer.router.named_parameters():
            whole.append((f"{layer.name}.{name}", value))
        experts = layer.adapter.experts
        if experts is not None and experts in layer.parent._modules:
            for name, value in layer.parent.get_submodule(experts).named_parameters():
                target = whole if value.dim() == 3 else sampled
                target.append((f"{layer.name}.{experts}.{name}", value))
    return fingerprint(whole, sampled)


def save(system: ChronoSystem, directory: str | Path) -> bool:
    """Write the state into `directory` from the main process; see ``checkpoint.write_state``.

    Returns:
        Whether it was written (always True on the other ranks).
    """
    if not distributed.is_main():
        return True
    tensors, meta = pack(system)
    meta["fingerprint"] = live_fingerprint(system)
    meta["topk_disagreement"] = _report_disagreement(system)
    strict = system.config.checkpoint.strict_save
    # Raising on one rank only would leave the others waiting in their next collective: with several ranks the
    # failure travels with the next step's reduction and is raised by all of them there.
    written = write_state(directory, tensors, meta, strict=strict and not distributed.active())
    if strict and not written:
        system.failed_save = str(directory)
    return written


def _report_disagreement(system: ChronoSystem) -> list[float | None]:
    """Per layer, the share of tokens that a plain reload of this checkpoint would route otherwise; warns above 1 %."""
    shares = system.step_state.topk_disagreement()
    known = [(share, layer.name) for share, layer in zip(shares, system.layers, strict=True) if share is not None]
    if known and max(known)[0] > WARN_ABOVE:
        worst, name = max(known)
        logger.warning(
            "outside chronomoe_hf this checkpoint routes %.1f %% of the tokens of %s to other experts than now; "
            "keep chronomoe.json beside it, or unwrap(model, fold=True) before the final save",
            100.0 * worst,
            name,
        )
    return shares


def load(system: ChronoSystem, directory: str | Path) -> dict[str, Any] | None:
    """Read the state in `directory` on the main process, give it to every rank, restore it. Collective.

    Returns:
        The manifest (step, fingerprint, ...), or None where there is no state and `on_missing` allows a fresh start.

    Raises:
        StateMissingError: nothing there, and `on_missing` is ``"raise"``.
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
    if found is None:
        _missing(system, directory)
        return None
    tensors, meta = found
    unpack(system, tensors, meta)
    return dict(meta)


def _missing(system: ChronoSystem, directory: str | Path) -> None:
    acted = _acted_before(system)
    if system.config.checkpoint.on_missing == "raise" or (system.config.checkpoint.on_missing == "auto" and acted):
        raise StateMissingError(
            f"no chronomoe state in {directory}{', although this run has been governed' if acted else ''}; routing "
            "would change silently. Resume from a checkpoint that has chronomoe.json, or set "
            "CheckpointConfig(on_missing='fresh') to start with beta = 0"
        )
    warnings.warn(f"no chronomoe state in {directory}: starting with fresh statistics and beta = 0", stacklevel=4)


def _acted_before(system: ChronoSystem) -> bool:
    return system.governed or bool(torch.count_nonzero(system.step_state.beta_LE))
