"""What a proposal and the edits that compete with it would cost, measured on held-out text. Every bit comes back.

Merging is measured as a stock checkpoint would hold it: the survivor's weights become the mean of both, weighted by
their tokens, and the other is masked, so its tokens are routed anew. Neurons are not aligned.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf.distributed import is_sharded
from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.lifecycle.live import Batch, layer_specs, live_layers
from chronomoe_hf.lifecycle.measure import Edit, measure_edits
from chronomoe_hf.lifecycle.proposals import Proposal
from chronomoe_hf.wrapping.discovery import FoundLayer

logger = logging.getLogger("chronomoe_hf")
EFFECTS = "lifecycle_effects"
MAX_PROPOSALS = 4  # measured at one evaluation, three forwards each at most
_NUMBERED = re.compile(r"(?:expert_)?(\d+)")


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
    own_expert_tensors(layer)  # raises before anything runs
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
    tensors = own_expert_tensors(layer)
    before = [value.detach().clone() for value in tensors[survivor]]
    try:
        with torch.no_grad():
            for own, its in zip(tensors[survivor], tensors[other], strict=True):
                own.copy_(torch.lerp(its.float(), own.float(), part))
        yield
    finally:
        with torch.no_grad():
            for own, value in zip(tensors[survivor], before, strict=True):
                own.copy_(value)


def own_expert_tensors(layer: FoundLayer) -> list[list[Tensor]]:
    """The weights of every expert, as views, in the same order for each.

    Raises:
        LifecycleError: they are sharded, quantised or offloaded, carry an adapter that is not merged, or are neither
            fused along their first dimension nor in one module an expert.
    """
    experts, num = layer.experts, layer.adapter.num_experts(layer.router)
    if experts is None:
        raise LifecycleError(f"{layer.name}: its experts cannot be reached")
    if any("base_layer" in module._modules for module in experts.modules()):
        raise LifecycleError(f"{layer.name}: an adapter on its experts is not merged")
    named = {int(match[1]): child for name, child in experts.named_children() if (match := _NUMBERED.fullmatch(name))}
    every = list(experts.parameters())
    for value in every:
        if (
            is_sharded(value)
            or value.device.type == "meta"
            or not value.is_floating_point()
            or value.element_size() < 2
        ):
            raise LifecycleError(f"{layer.name}: its experts are sharded, offloaded or quantised")
    if sorted(named) == list(range(num)):
        found = [list(named[expert].parameters()) for expert in range(num)]
        if sum(map(len, found)) == len(every) and len({tuple(v.shape for v in own) for own in found}) == 1:
            return [[value.data for value in own] for own in found]
    elif every and all(value.dim() > 1 and value.shape[0] == num for value in every):
        return [[value.data[expert] for value in every] for expert in range(num)]
    raise LifecycleError(
        f"{layer.name}: the weights of single experts cannot be told apart in {type(experts).__name__}"
    )


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
