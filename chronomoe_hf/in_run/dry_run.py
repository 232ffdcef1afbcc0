"""The dry run inside training: what the plan of the moment would cost, measured at an evaluation. Changes nothing.

With ``lifecycle__measuring__enabled=True`` every evaluation of a Trainer ends in one more pass over some of its
batches: the plan that the evidence supports now, random plans of the same size, the worst plan, and the confirmed cases
alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.in_run.proposals import measure_proposals
from chronomoe_hf.lifecycle.live.model import Batch, first_batches, untouched_randomness
from chronomoe_hf.lifecycle.pruning.measure import Effect, measure
from chronomoe_hf.lifecycle.pruning.plan_prune import plan_prune
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.telemetry.reader import EFFECTS

logger = logging.getLogger("chronomoe_hf")
MAX_CASES = 8  # confirmed cases measured alone, one forward each


def measure_dry_run(system: ChronoSystem, model: nn.Module, batches: Iterable[Batch]) -> Effect | None:
    """Measure the plan that a live system's evidence supports now, log it and record it. Collective.

    Args:
        system: of the wrapped model; its ``config.lifecycle`` says how much is kept and read.
        model: what to run: the wrapped model, or what an engine made of it.
        batches: held-out batches with labels; the first `measuring.batches` are read.

    Returns:
        The effect; None where there is no evidence, or no such plan, yet (logged), and once the run was cut.
    """
    config = system.config.lifecycle
    if system.cut.plan is not None:
        return None  # decided: the evaluation itself is of the model that was cut
    try:
        known = system.evidence()
        plan = plan_prune(
            known,
            keep=config.cut.keep,
            rank=config.cut.rank,
            multiple_of=config.cut.multiple_of,
            candidates=system.prune_decisions,
        )
        with untouched_randomness():
            held_out = first_batches(batches, config.measuring.batches)
            effect = measure(
                model,
                plan,
                held_out,
                controls=config.measuring.controls,
                leave_one_out=_confirmed(system.prune_decisions)[:MAX_CASES],
            )
            measure_proposals(system, model, held_out)
    except LifecycleError as error:
        logger.warning("[DRY-RUN] step %d: no plan was measured: %s", system.global_step, error)
        return None
    logger.info("[DRY-RUN] step %d: %s", system.global_step, effect)
    for (layer_id, expert), alone in effect.leave_one_out.items():
        logger.info(
            "[DRY-RUN] step %d layer %d expert %d alone: loss %+.5f",
            system.global_step,
            layer_id,
            expert,
            alone.delta_loss,
        )
    if system.records.writer is not None:
        kept = [list(layer.kept) for layer in plan.layers]
        record = {"step": system.global_step, "dry_run": True, **effect.to_record(), "kept": kept}
        system.records.writer.write(EFFECTS, record)
    return effect


def _confirmed(decisions: Iterable[Any]) -> list[tuple[int, int]]:
    """Experts with a confirmed case that was not withdrawn since, in order."""
    states = {(item.layer_id, item.expert, item.reason): item.state for item in decisions}
    return sorted({(layer, expert) for (layer, expert, _), state in states.items() if state == "confirmed"})
