"""Planning the splits that proposals name, on held-out text that is not measured. The same plan on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from chronomoe_hf import distributed
from chronomoe_hf.errors import ChronoError, LifecycleError
from chronomoe_hf.lifecycle.evidence.spec import LayerSpec
from chronomoe_hf.lifecycle.live.model import Batch, quiet, uncompiled
from chronomoe_hf.splitting.plan import LayerSplit
from chronomoe_hf.splitting.plan_one import plan_bias, plan_one
from chronomoe_hf.splitting.router_tap import RouterTap, read_calls


class Wanted(NamedTuple):
    """A split to be planned.

    Args:
        layer_id: MoE layer.
        donor: expert to be split; None = no expert is copied, a bias alone evens the layer's load.
        target: expert to be overwritten; None = the idlest.
    """

    layer_id: int
    donor: int | None = None
    target: int | None = None


def plan_wanted(
    model: nn.Module,
    taps: Mapping[int, RouterTap],
    specs: Sequence[LayerSpec],
    wanted: Sequence[Wanted],
    batches: Sequence[Batch],
    idle: float,
) -> tuple[dict[Wanted, LayerSplit | str], int]:
    """Plan on the main process's batches. Collective: every rank runs as many forwards, and gets the same plan.

    Args:
        model: what to run; it is not changed.
        taps: by layer_id, of every layer that is named.
        specs: the model's layer table.
        wanted: the splits; each is planned as if it were the only one.
        batches: what to read.
        idle: fair shares below which an expert may be overwritten where none is named.

    Returns:
        Per split its plan, or why there is none; and the tokens that the main process read.
    """
    found: dict[Wanted, LayerSplit | str] = {}
    tokens = 0
    try:
        with quiet(model):
            read_calls(uncompiled(model), list(taps.values()), batches)
            if distributed.is_main():
                tokens = max(len(tap.choose()) for tap in taps.values())
                found = {one: _planned(taps[one.layer_id], specs[one.layer_id], one, idle) for one in wanted}
    except LifecycleError as error:  # of reading: it holds for every split
        found = {one: str(error) for one in wanted}
    finally:
        for tap in taps.values():
            tap.calls.clear()
    if distributed.active():
        found, tokens = distributed.broadcast_object((found, tokens))  # type: ignore[misc]
    return found, tokens


def _planned(tap: RouterTap, spec: LayerSpec, one: Wanted, idle: float) -> LayerSplit | str:
    """The plan with its vectors on the CPU, as it travels to other ranks; or the reason why there is none."""
    try:
        split = plan_bias(tap, spec) if one.donor is None else plan_one(tap, spec, one.donor, one.target, idle)
    except ChronoError as error:
        return str(error)
    except Exception as error:  # whatever it is, the other ranks must not wait for a plan
        if not distributed.active():
            raise
        return f"{type(error).__name__}: {error}"
    shift_E = None if split.shift_E is None else split.shift_E.cpu()
    return replace(split, rows={expert: row_D.cpu() for expert, row_D in split.rows.items()}, shift_E=shift_E)
