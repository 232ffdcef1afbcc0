"""What a proposal and the edits that compete with it would cost, measured on held-out text. Every bit comes back.

Merging is measured as a stock checkpoint would hold it: the survivor's weights become the mean of both, weighted by
their tokens, and the other is masked, so its tokens are routed anew. Neurons are not aligned.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.lifecycle.expert_weights import Changes, ExpertWeights, slice_of
from chronomoe_hf.lifecycle.live import Batch, layer_specs, live_layers
from chronomoe_hf.lifecycle.measure import Edit, measure_edits
from chronomoe_hf.lifecycle.proposals import Proposal
from chronomoe_hf.telemetry.reader import EFFECTS
from chronomoe_hf.wrapping.discovery import FoundLayer

logger = logging.getLogger("chronomoe_hf")
MAX_PROPOSALS = 4  # measured at one evaluation, three forwards each at most


def measure_proposals(system: Any, model: nn.Module, batches: Iterable[Batch]) -> list[dict[str, Any]]:
    """Measure the standing merge, split and spawn proposals of a live system, log and record them. Collective.

    Args:
        system: of the wrapped model; nothing is measured without ``coherence.roles``.
        model: what to run: the wrapped model, or what an engine made of it.
        batches: held-out batches with labels.

    Returns:
        One record per proposal: ``edits`` lists the proposal and what competes with it, each with its rise of the loss,
        or with the reason why it was not measured.

    Raises:
        LifecycleError: as ``measure``.
    """
    roles = system.lifecycle.roles
    if roles is None or not roles.standing:
        return []
    standing = sorted(
        roles.standing.values(), key=lambda each: (each.state != "confirmed", each.layer_id, each.experts)
    )
    proposals, layers = standing[:MAX_PROPOSALS], live_layers(model)
    edits: list[Edit] = []
    records = [_record(system.global_step, proposal, layers, edits) for proposal in proposals]
    if edits:
        loss, tokens, effects = measure_edits(model, layer_specs(model), edits, batches)
        for record in records:
            record.update(loss=loss, tokens=tokens)
            for each in record["edits"]:
                at = each.pop("index", None)
                if at is not None:
                    effect = effects[at]
                    each.update(
                        delta_loss=effect.delta_loss,
                        delta_loss_error=effect.delta_loss_error,
                        kl=effect.kl,
                        overlap=effect.overlap,
                    )
    for record in records:
        logger.info("%s", _line(record))
        if system.records.writer is not None:
            system.records.writer.write(EFFECTS, record)
    return records


def _record(step: int, proposal: Proposal, layers: Sequence[FoundLayer], edits: list[Edit]) -> dict[str, Any]:
    """The record of a proposal, its measurable edits appended to `edits`."""
    layer = layers[proposal.layer_id]
    shares = dict(zip(proposal.experts, proposal.evidence.get("share", ()), strict=False))
    listed = []
    for each in proposal.competing:
        try:
            edit = _edit(each["edit"], tuple(each["experts"]), proposal.layer_id, layer, shares)
        except LifecycleError as error:
            listed.append({**each, "measured": False, "reason": str(error)})
            continue
        listed.append({**each, "measured": True, "index": len(edits)})
        edits.append(edit)
    return {
        "step": step,
        "dry_run": True,
        "proposal": proposal.kind,
        "layer_id": proposal.layer_id,
        "experts": list(proposal.experts),
        "state": proposal.state,
        "edits": listed,
    }


def _edit(name: str, experts: tuple[int, ...], layer_id: int, layer: FoundLayer, shares: dict[int, float]) -> Edit:
    top_k, num = layer.adapter.top_k(layer.router), layer.adapter.num_experts(layer.router)
    if name not in ("merge", "prune"):
        raise LifecycleError(f"{name} is not measured here: it needs training to show what it does")
    if num - 1 < top_k:
        raise LifecycleError(f"every token needs {top_k} experts, {num - 1} would be left")
    reason = layer.adapter.refused("beta")
    if reason is not None:
        raise LifecycleError(f"the experts of {layer.name} cannot be masked: {reason}")
    if name == "prune":
        return Edit({layer_id: experts})
    first, second = experts
    total = shares[first] + shares[second]
    part = shares[first] / total if total > 0.0 else 0.5
    ExpertWeights(layer, "merge", trains=False)  # raises before anything runs
    return Edit({layer_id: (second,)}, functools.partial(merged, layer, first, second, part))


@contextlib.contextmanager
def merged(layer: FoundLayer, survivor: int, other: int, part: float) -> Iterator[None]:
    """The survivor's weights are ``part`` of its own and the rest of the other's; afterwards they are what they were.

    Args:
        layer: a live layer.
        survivor: expert id.
        other: expert id.
        part: in [0, 1], of the survivor.

    Raises:
        LifecycleError: the experts' weights cannot be told apart or changed here.
    """
    weights, changes = ExpertWeights(layer, "merge", trains=False), Changes()
    try:
        with torch.no_grad():
            for (own, at), (its, its_at) in zip(weights.parts(survivor), weights.parts(other), strict=True):
                changes.write(own, at, torch.lerp(slice_of(its, its_at).float(), slice_of(own, at).float(), part))
        yield
    finally:
        changes.undo()


def _line(record: dict[str, Any]) -> str:
    shown = []
    for each in record["edits"]:
        ids = " ".join(map(str, each["experts"]))
        shown.append(
            f"{each['edit']} {ids} {each['delta_loss']:+.5f}" if each["measured"] else f"{each['edit']} {ids} -"
        )
    return (
        f"[DRY-RUN] step {record['step']} layer {record['layer_id']} {record['proposal']}: loss "
        f"{', '.join(shown)} (- = not measured)"
    )
