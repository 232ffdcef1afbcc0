"""What a proposal and the edits that compete with it would cost, measured on held-out text. Every bit comes back."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.in_run.proposals import Key, ProposalEdits
from chronomoe_hf.lifecycle.dry_run.proposals import Proposal
from chronomoe_hf.lifecycle.live.model import Batch
from chronomoe_hf.lifecycle.pruning.measure import checked_batches
from chronomoe_hf.telemetry.reader import EFFECTS

logger = logging.getLogger("chronomoe_hf")
MAX_PROPOSALS = 4  # measured at one evaluation, five forwards each at most


def measure_proposals(system: Any, model: nn.Module, batches: Iterable[Batch]) -> list[dict[str, Any]]:
    """Measure the standing merge, split and spawn proposals of a live system, log and record them. Collective.

    A split or a spawn has to be planned first: along which direction its tokens are told apart, or by which bias. That
    is done on the first half of the batches (at most ``LifecycleConfig.split_batches``), and everything is then
    measured on the rest, so that no loss is of the text that an edit was made from. Where nothing has to be planned,
    all batches are measured.

    Args:
        system: of the wrapped model; nothing is measured without ``coherence.roles``.
        model: what to run: the wrapped model, or what an engine made of it.
        batches: held-out batches with labels.

    Returns:
        One record per proposal: ``edits`` lists the proposal and what competes with it, each with its rise of the loss,
        or with the reason why it was not measured. Of a split also the experts' loads before and after, in fair shares
        of the measured tokens.

    Raises:
        LifecycleError: as ``measure``.
    """
    roles = system.lifecycle.roles
    if roles is None or not roles.standing:
        return []
    standing = sorted(
        roles.standing.values(), key=lambda each: (each.state != "confirmed", each.layer_id, each.experts)
    )
    held_out, edits = checked_batches(model, batches), ProposalEdits(system, model)
    asked = [
        (proposal, [_ask(edits, proposal, each) for each in proposal.competing])
        for proposal in standing[:MAX_PROPOSALS]
    ]
    if edits.plans:
        config = system.config.lifecycle
        planning = min(len(held_out) // 2, config.split_batches)
        edits.plan(held_out[:planning], config.split_idle)
        held_out = held_out[planning:]
    full = edits.run(held_out)
    records = []
    for proposal, keys in asked:
        record = _record(system.global_step, proposal, keys, edits)
        if full is not None:
            record.update(loss=full[0], tokens=full[1], planned_on_tokens=edits.planned_tokens)
        logger.info("%s", _line(record))
        if system.records.writer is not None:
            system.records.writer.write(EFFECTS, record)
        records.append(record)
    return records


def _ask(edits: ProposalEdits, proposal: Proposal, each: dict[str, Any]) -> Key | str:
    """The key of a competing edit, or why it cannot be measured."""
    known = dict(zip(proposal.experts, proposal.evidence.get("share", ()), strict=False))
    shares = known | dict(zip(each["experts"], each.get("share", ()), strict=False))
    try:
        return edits.ask(each["edit"], each["experts"], proposal.layer_id, shares)
    except LifecycleError as error:
        return str(error)


def _record(step: int, proposal: Proposal, keys: list[Key | str], edits: ProposalEdits) -> dict[str, Any]:
    listed = []
    for each, key in zip(proposal.competing, keys, strict=True):
        found = {"measured": False, "reason": key} if isinstance(key, str) else edits.outcome(key, each["experts"])
        listed.append({**each, **found})
    return {
        "step": step,
        "dry_run": True,
        "proposal": proposal.kind,
        "layer_id": proposal.layer_id,
        "experts": list(proposal.experts),
        "state": proposal.state,
        "edits": listed,
    }


def _line(record: dict[str, Any]) -> str:
    return (
        f"[DRY-RUN] step {record['step']} layer {record['layer_id']} {record['proposal']}: loss "
        f"{', '.join(map(_shown, record['edits']))} (- = not measured)"
    )


def _shown(edit: dict[str, Any]) -> str:
    name = f"{edit['edit']} {' '.join(map(str, edit['experts']))}"
    if not edit["measured"]:
        return f"{name} -"
    text = f"{name} {edit['delta_loss']:+.5f}"
    if "target" not in edit:
        return text
    before, after = (", ".join(f"{v:.2f}" for v in edit[f"fair_shares_{when}"]) for when in ("before", "after"))
    return f"{text} (load of {edit['donor']}, {edit['target']}: {before} -> {after})"
