"""What a wrapped model's state consists of and how it comes back: parts to (tensors, meta) and again, bit for bit.

Only added-up state is saved, never the sums of an unfinished step, so a file always stands for a step boundary. This
room gets its parts from the system and knows no system.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.checks import check_layers, check_meta, check_tensors, load_roles, packed
from chronomoe_hf.checkpoint.correction import lacks_biases, load_biases, packed_biases
from chronomoe_hf.checkpoint.in_force import in_force, layers_named
from chronomoe_hf.checkpoint.manifest import WAY_OUT, short
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.errors import ConfigError, StateCorruptError, StateError
from chronomoe_hf.lens.lens import ChronoLens
from chronomoe_hf.lifecycle.evidence.drift import START
from chronomoe_hf.parts import Parts, Position
from chronomoe_hf.step_state import StepState
from chronomoe_hf.wrapping.fold import WARN_ABOVE
from chronomoe_hf.wrapping.layer import Layer

logger = logging.getLogger("chronomoe_hf")

# Stacked tensors whose expert columns start at 0 and that have one row per layer on their second-to-last axis.
_PER_LAYER_AXIS = {"ema_CLE": 1}


def pack(parts: Parts, position: Position) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as CPU tensors by name and a JSON-ready mapping."""
    tensors = {name: value.cpu() for name, value in parts.step_state.state_dict().items()}
    tensors |= packed(parts.step_state.roles) | parts.drift.state_dict() | packed_biases(parts.layers)
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
        "interval": position.interval,
    }
    cut = parts.cut.state_dict()
    if cut is not None:
        meta["cut"] = cut
    return tensors, meta


def unloadable(step_state: StepState, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str | None:
    """Why what :func:`pack` returned could not be loaded again, or None: such a state must not replace a good one."""
    try:
        check_meta(meta)
        check_tensors(tensors, _stacked(step_state), [row["num_experts"] for row in meta["layers"]])
    except StateCorruptError as error:
        return str(error).removesuffix(f"; {WAY_OUT}")
    return None


def _stacked(step_state: StepState) -> dict[str, Tensor]:
    return {name: getattr(step_state, name) for name in step_state.NAMES}


def unpack(parts: Parts, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Position:
    """Restore what :func:`pack` returned into the parts, as far as the settings in force let it act.

    Everything is checked first; where this raises, nothing has changed. What the settings leave unused, and why, is in
    ``in_force``; one warning names it.

    Returns:
        Where the saved run stood.

    Raises:
        StateMismatchError: it belongs to another model, with a table of the differences.
        StateCorruptError: a field or a tensor is missing, or not what it must be.
    """
    check_meta(meta)
    live = [layer.table_row() for layer in parts.layers]
    pairs = check_layers(meta["layers"], live, parts.config.checkpoint.allow_partial)
    num_experts = [row["num_experts"] for row in meta["layers"]]
    check_tensors(tensors, _stacked(parts.step_state), num_experts, meta.get("schema_minor", 0))
    whole = len(pairs) == len(live) == len(meta["layers"]) and all(old == new for old, new in pairs)
    used = in_force(
        tensors,
        meta,
        pairs,
        [layer.takes_beta for layer in parts.layers],
        [layer.native_bias for layer in parts.layers],
        [layer.handle.lens is not None for layer in parts.layers],
        parts.config,
    )
    lenses = {new: _lens_state(used.tensors, old) for old, new in pairs}
    _check_parts(parts, meta, lenses, whole)
    cut = parts.cut.read(meta.get("cut") if whole else None)
    if cut.plan is not None and parts.config.lifecycle.cut.at is None:
        used.unused.append(f"the cut to {cut.plan.num_kept} experts a layer (lifecycle.cut.at is not set)")
        cut = parts.cut.read(None)
    # Checked: from here on nothing raises.
    window_steps = _load(parts, used.tensors, meta, pairs, whole)
    used.unused.extend(_load_biases(parts.layers, tensors, pairs))
    parts.cut.load(cut)
    for new, saved in lenses.items():
        lens = parts.layers[new].handle.lens
        if lens is not None and saved:
            lens.load_state_dict(saved)
        elif lens is not None:
            lens.set_scale(0.0)
    copies = distributed.batch_copies(parts.layers[0].root)
    load_roles(parts.step_state.roles, used.tensors, pairs, copies, whole)
    if parts.step_state.roles is None and any(name.startswith("role.") for name in tensors):
        used.unused.append("the roles of experts (coherence.roles is False)")
    parts.drift.load(tensors, pairs)
    if not parts.drift.on and any(START.fullmatch(name) for name in tensors):
        used.unused.append("the router rows that drift is measured from (lifecycle.router_drift is False)")
    _warn_of_other_settings(parts.config, meta.get("config"), used.unused, _words_on_k(meta, live, pairs))
    return Position(
        step=int(meta["step"]),
        window_steps=window_steps,
        run_id=str(meta["run_id"]),
        attempt=int(meta.get("attempt", 0)),
        governed=used.governed,
        beta_moved=used.beta_moved,
        interval=meta.get("interval") or _interval_of(meta.get("config")),
    )


def _load_biases(layers: Sequence[Layer], tensors: Mapping[str, Tensor], pairs: Sequence[tuple[int, int]]) -> list[str]:
    """Bring the correction biases back; what was left out, in words."""
    left = load_biases(layers, tensors, pairs)
    lines = [
        f"the correction bias of {layers_named([at for at, each in left.items() if each == why])} ({why})"
        for why in dict.fromkeys(left.values())
    ]
    if lacking := lacks_biases(layers, tensors, pairs):
        lines.append(
            f"nothing for the correction bias of {layers_named(lacking)}, which neither this state of an older "
            "chronomoe_hf nor an adapter holds: it is that of the base model"
        )
    return lines


def _interval_of(config: Any) -> int | None:
    """The interval in the settings of a state that was saved before it was kept apart from them."""
    interval = config.get("interval") if isinstance(config, Mapping) else None
    return interval if isinstance(interval, int) and interval > 0 else None


def _lens_state(tensors: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    prefix = f"lens.{layer}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _check_parts(parts: Parts, meta: Mapping[str, Any], lenses: Mapping[int, dict[str, Tensor]], whole: bool) -> None:
    """Load the host state and the lenses into copies: what goes wrong goes wrong there."""
    for new, saved in lenses.items():
        lens = parts.layers[new].handle.lens
        if lens is not None and saved:
            ChronoLens(lens.d_model, lens.rank, new).load_state_dict(saved)
    if not whole:
        return
    copies: dict[str, Any] = {
        "controller": copy.copy(parts.controller),
        "lifecycle": copy.copy(parts.lifecycle),
        "alerts": parts.alerts.copy(),
    }
    for name, part in copies.items():
        try:
            part.load_state_dict(copy.deepcopy(meta[name]))
        except StateError:
            raise
        except (ConfigError, TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            kind = {"controller": "a controller", "lifecycle": "a lifecycle", "alerts": "an alert history"}[name]
            raise StateCorruptError(
                f"the saved state's {name} must be what {kind} saves ({short(error)}); {WAY_OUT}"
            ) from None


def _load(
    parts: Parts, tensors: dict[str, Tensor], meta: Mapping[str, Any], pairs: list[tuple[int, int]], whole: bool
) -> int:
    """Write the stacked tensors and, for the whole model, the host state; returns the steps of the open window."""
    if not whole:
        _load_matching(parts, tensors, pairs)
        return 0
    window_steps = int(meta["window_steps"])
    live = parts.step_state.window_LR
    if tensors["window_LR"].shape != live.shape:
        logger.warning("the open window of %d steps was recorded with other columns; it starts afresh", window_steps)
        empty = {"window_LR": torch.zeros_like(live, device="cpu"), "loss_N": torch.zeros_like(tensors["loss_N"])}
        tensors = {**tensors, **empty}
        window_steps = 0
    parts.step_state.load_state_dict(tensors)
    parts.step_state.remember_disagreement(meta.get("topk_disagreement") or [])
    parts.controller.load_state_dict(meta["controller"])
    parts.lifecycle.load_state_dict(meta["lifecycle"])
    parts.alerts.load_state_dict(meta["alerts"])
    return window_steps


def _load_matching(parts: Parts, tensors: dict[str, Tensor], pairs: list[tuple[int, int]]) -> None:
    """`allow_partial`: copy the layers that agree; the open window and the control state start fresh."""
    state = parts.step_state
    for name in state.NAMES:
        if name in ("window_LR", "loss_N"):
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
    state.drop_window()
    logger.warning("loaded the state of %d of %d layers; the others start fresh", len(pairs), len(parts.layers))


def _words_on_k(
    meta: Mapping[str, Any], live: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[int, int]]
) -> list[str]:
    """Layers in which a token gets another number of experts than when the state was saved."""
    saved_k = {new: meta["layers"][old]["top_k"] for old, new in pairs}
    other = [(new, before) for new, before in saved_k.items() if before != live[new]["top_k"]]
    if not other:
        return []
    new, before = other[0]
    return [
        f"tokens of {layers_named([at for at, _ in other])} get another number of experts than when the state was "
        f"saved ({before} then, {live[new]['top_k']} now)"
    ]


def _warn_of_other_settings(live: ChronoConfig, saved: Any, unused: Sequence[str], lines: list[str]) -> None:
    try:
        before = None if saved is None else ChronoConfig.from_dict(saved)
    except ConfigError:
        before = None
    if before is not None:
        other = [name for name in live.differences(before) if not name.startswith(("telemetry.", "checkpoint."))]
        if other:
            lines.append(f"resuming with other chronomoe settings than were saved: {', '.join(other)}")
    if unused:
        lines.append(f"of the saved chronomoe state these settings left unused: {'; '.join(unused)}")
    if lines:
        warnings.warn(". ".join(lines), stacklevel=5)


def advise_of_disagreement(shares: Sequence[float | None], layers: Sequence[Layer]) -> bool:
    """Warn if a plain reload of what is saved would route more than 1 % of a layer's tokens otherwise.

    Args:
        shares: per layer, from ``StepState.topk_disagreement``.
        layers: the wrapped layers.

    Returns:
        Whether it warned. The system says it once a run, and writes the shares into every state.
    """
    known = [(share, layer.name) for share, layer in zip(shares, layers, strict=True) if share is not None]
    if not known or max(known)[0] <= WARN_ABOVE:
        return False
    worst, name = max(known)
    logger.warning(
        "outside chronomoe_hf this checkpoint routes %.1f %% of the tokens of %s to other experts than now; keep its "
        "folder chronomoe and load it with wrap(model, state=directory), or unwrap(model, fold=True) before the final "
        "save",
        100.0 * worst,
        name,
    )
    return True
