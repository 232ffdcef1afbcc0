"""The edits that proposals name, as changes of a live model that give every bit back.

* merge: as a stock checkpoint would hold it. The survivor's weights become the mean of both, weighted by their tokens,
  and the other is masked, so its tokens are routed anew. Neurons are not aligned.
* split and spawn are one act, that of ``plan_split`` without its refit: an idle expert becomes a copy of the busy one
  and shares its tokens.
* balance: the bias alone that brings the layer's shares into the bounds of ``plan_split``; no copies, no training.

Shape suffixes: E experts.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.lifecycle.dry_run.proposals import Proposal
from chronomoe_hf.lifecycle.live.model import Batch, layer_specs, live_layers
from chronomoe_hf.lifecycle.live.weights import Changes, ExpertWeights, slice_of
from chronomoe_hf.lifecycle.pruning.measure import Edit, MaskEffect, checked_batches, measure_edits
from chronomoe_hf.splitting.plan import LayerSplit
from chronomoe_hf.splitting.plan_one import LoadCount, Wanted, in_force, plan_wanted, require_bias, require_splittable
from chronomoe_hf.splitting.router_tap import RouterTap
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.telemetry.reader import EFFECTS
from chronomoe_hf.wrapping.discovery import FoundLayer

Key = tuple[Any, ...]


class ProposalEdits:
    """Edits of a live system that are to be measured; what several proposals name is planned and measured once.

    Args:
        system: of the wrapped model.
        model: what to run: the wrapped model, or what an engine made of it.

    Attributes:
        planned_tokens: read by the main process to plan splits; 0 where none was planned.
    """

    def __init__(self, system: ChronoSystem, model: nn.Module) -> None:
        self.model = model
        self.layers, self.specs = live_layers(model), layer_specs(model)
        self.planned_tokens = 0
        self._wrapped = {layer.name: layer for layer in system.layers}
        self._taps: dict[int, RouterTap] = {}
        self._edits: dict[Key, Edit] = {}
        self._wanted: dict[Wanted, LayerSplit | str] = {}
        self._before: dict[int, LoadCount] = {}
        self._after: dict[Key, LoadCount] = {}
        self._effects: dict[Key, MaskEffect] = {}
        self._loads: dict[Any, Tensor] = {}

    @property
    def plans(self) -> bool:
        """Whether text has to be read for a plan before anything can be measured."""
        return bool(self._wanted)

    def ask(self, name: str, experts: Sequence[int], layer_id: int, shares: Mapping[int, float]) -> Key:
        """Put an edit on the list.

        Args:
            name: ``"merge"``, ``"prune"``, ``"split"``, ``"spawn"`` or ``"balance"``.
            experts: as in a proposal's competing edits.
            layer_id: MoE layer.
            shares: of the experts of a merge, which weigh their mean.

        Returns:
            By which :meth:`outcome` knows it.

        Raises:
            LifecycleError: it cannot be made here, whatever the text; the same on every rank.
        """
        layer, spec = self.layers[layer_id], self.specs[layer_id]
        if name in ("split", "spawn", "balance"):
            tap = self._taps.get(layer_id) or RouterTap(layer, self._wrapped.get(layer.name))
            (require_bias if name == "balance" else require_splittable)(tap, spec)
            self._taps[layer_id] = tap
            both = {"split": (experts[0], None), "spawn": (experts[-1], experts[0]), "balance": (None, None)}[name]
            wanted = Wanted(layer_id, *both)
            self._wanted.setdefault(wanted, "not planned yet")
            return wanted
        if name not in ("merge", "prune"):
            raise LifecycleError(f"{name} is not measured here")
        if spec.num_experts - 1 < spec.top_k:
            raise LifecycleError(f"every token needs {spec.top_k} experts, {spec.num_experts - 1} would be left")
        reason = layer.adapter.refused("beta")
        if reason is not None:
            raise LifecycleError(f"the experts of {layer.name} cannot be masked: {reason}")
        if name == "prune":
            key: Key = ("prune", layer_id, *experts)
            self._edits.setdefault(key, Edit({layer_id: tuple(experts)}))
            return key
        first, second = experts
        total = shares.get(first, 0.0) + shares.get(second, 0.0)
        part = shares.get(first, 0.0) / total if total > 0.0 else 0.5
        ExpertWeights(layer, "merge", trains=False)  # raises before anything runs
        key = ("merge", layer_id, first, second, part)
        self._edits.setdefault(key, Edit({layer_id: (second,)}, functools.partial(merged, layer, first, second, part)))
        return key

    def plan(self, batches: Sequence[Batch], idle: float) -> None:
        """Plan the splits on the list. Collective.

        Args:
            batches: held-out text that will not be measured; none = no split can be planned.
            idle: fair shares below which an expert may be overwritten where none is named.
        """
        reason = "one half of the held-out batches plans a split and the other measures it: two batches are needed"
        if not batches:
            self._wanted = dict.fromkeys(self._wanted, reason)
            return
        self._wanted, self.planned_tokens = plan_wanted(
            self.model, self._taps, self.specs, list(self._wanted), batches, idle
        )
        for split in self._wanted.values():
            if isinstance(split, LayerSplit):
                self._add(split)

    def _add(self, split: LayerSplit) -> None:
        layer_id, key = split.spec.layer_id, _key(split)
        if key in self._edits:
            return
        tap = self._taps[layer_id]
        self._before.setdefault(layer_id, LoadCount(tap.layer))
        load = self._after[key] = LoadCount(tap.layer)

        @contextlib.contextmanager
        def weights() -> Iterator[None]:
            with in_force(tap, split), load.counting():
                yield

        self._edits[key] = Edit({}, weights)

    def run(self, batches: Sequence[Batch]) -> tuple[float, int] | None:
        """Measure everything on the list. Collective.

        Returns:
            Loss of the unchanged model and the predicted tokens; None where nothing is to be measured.

        Raises:
            LifecycleError: as ``measure``.
        """
        if not self._edits:
            return None

        @contextlib.contextmanager
        def full() -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                for load in self._before.values():
                    stack.enter_context(load.counting())
                yield

        loss, tokens, effects = measure_edits(self.model, self.specs, list(self._edits.values()), batches, full=full)
        self._effects = dict(zip(self._edits, effects, strict=True))
        for name, load in [*self._before.items(), *self._after.items()]:
            assert load.count_E is not None
            count_E = distributed.all_reduce_sum_(load.count_E)
            self._loads[name] = (count_E * len(count_E) / count_E.sum()).cpu()
        return loss, tokens

    def outcome(self, key: Key, experts: Sequence[int]) -> dict[str, Any]:
        """What was measured of an edit, or why it was not: fields of a record.

        Args:
            key: of :meth:`ask`.
            experts: whose load is told where a bias alone acts.
        """
        split = self._wanted.get(key) if isinstance(key, Wanted) else None
        if isinstance(split, str):
            return {"measured": False, "reason": split}
        moved: dict[str, Any] = {}
        if split is not None:
            ids = list(experts)
            if split.copies:
                (copy,) = split.copies
                ids = [copy.donor, copy.target]
                moved = {"donor": copy.donor, "target": copy.target}
            before_E, after_E = self._loads[key[0]], self._loads[_key(split)]
            moved |= {
                "fair_shares_before": [float(before_E[expert]) for expert in ids],
                "fair_shares_after": [float(after_E[expert]) for expert in ids],
                "refit": False,
            }
        effect = self._effects[key if split is None else _key(split)]
        return {
            "measured": True,
            "delta_loss": effect.delta_loss,
            "delta_loss_error": effect.delta_loss_error,
            "kl": effect.kl,
            "overlap": effect.overlap,
            **moved,
        }


def _key(split: LayerSplit) -> Key:
    """A split of the same two experts is the same edit, whoever proposes it."""
    return ("split", split.spec.layer_id, *((one.donor, one.target) for one in split.copies))


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


# What a proposal and the edits that compete with it would cost, measured on held-out text. Every bit comes back.

logger = logging.getLogger("chronomoe_hf")
MAX_PROPOSALS = 4  # measured at one evaluation, five forwards each at most


def measure_proposals(system: ChronoSystem, model: nn.Module, batches: Iterable[Batch]) -> list[dict[str, Any]]:
    """Measure the standing merge, split and spawn proposals of a live system, log and record them. Collective.

    A split or a spawn has to be planned first: along which direction its tokens are told apart, or by which bias. That
    is done on the first half of the batches (at most ``lifecycle.revive.batches``), and everything is then
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
        planning = min(len(held_out) // 2, config.revive.batches)
        edits.plan(held_out[:planning], config.revive.idle)
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
