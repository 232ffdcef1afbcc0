"""Merge, split and spawn: proposals that follow from roles, as dry-run records. Nothing here touches a model.

Once per window, per layer:

* ``merge``: two experts are near-duplicates (score above `merge_above`);
* ``split``: an expert has two roles (score above `split_above`) and takes at least OVERLOADED times its fair share;
* ``spawn``: an expert is overloaded while another is idle: the idle one could take a copy of it.

A proposal is a *candidate* when it first holds, *confirmed* after `confirmations` windows in a row, *withdrawn* when it
stops holding; only these changes are logged. A window with too little evidence changes nothing. Beside every proposal
stand the edits that compete with it, and what each would change in the layer's free energy.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from chronomoe_hf.config import LifecycleConfig
from chronomoe_hf.lifecycle.dry_run.cases import advance, layer_coherence
from chronomoe_hf.lifecycle.dry_run.role_numbers import (
    DUPLICATES,
    SIZE,
    TWO_ROLES,
    FreeEnergy,
    Pair,
    Pairs,
    RoutingHistory,
    TwoRoles,
    free_energy,
    two_roles_of,
)
from chronomoe_hf.metrics import expert_name, nearly_dead_limit
from chronomoe_hf.recording.role_sums import RoleReading
from chronomoe_hf.telemetry.layers import LayerSnapshot
from chronomoe_hf.telemetry.snapshots import SystemSnapshot

# What one window shows of one layer's roles: which proposals hold, on what evidence, and what competes with them.

Kind = Literal["merge", "split", "spawn", "basin"]
Key = tuple[Kind, tuple[int, ...]]
KINDS = ("merge", "split", "spawn")
OVERLOADED = 1.5
"""Multiple of its fair share from which an expert counts as overloaded."""
TOP = 5  # pairs and experts of a layer that a snapshot record names


@dataclass(frozen=True)
class SeenRoles:
    """What one window shows of one layer."""

    layer: LayerSnapshot
    shares: Sequence[float]
    pairs: Pairs
    duplicates: list[Pair]
    bimodal: list[TwoRoles]
    energy: FreeEnergy

    @property
    def idle(self) -> list[int]:
        """Experts that are dead or nearly so in this window; those that were cut are not."""
        limit = nearly_dead_limit(self.layer.num_choices)
        return [e for e, share in enumerate(self.shares) if share < limit and e not in self.layer.cut]

    @property
    def overloaded(self) -> list[int]:
        """Experts with at least OVERLOADED times their fair share, the most loaded first."""
        limit = OVERLOADED / self.layer.num_choices
        found = [expert for expert, share in enumerate(self.shares) if share >= limit]
        return sorted(found, key=lambda expert: (-self.shares[expert], expert))

    @classmethod
    def of(
        cls, layer: LayerSnapshot, shares: Sequence[float], reading: RoleReading, config: LifecycleConfig
    ) -> SeenRoles:
        """Judge a layer of a closed window.

        Args:
            layer: of its snapshot.
            shares: per expert.
            reading: of the same window.
            config: thresholds.
        """
        pairs, bimodal = Pairs(reading), two_roles_of(reading)
        duplicates = pairs.above(config.dry_run.merge_above)
        two = sum(each.score is not None and each.score > config.dry_run.split_above for each in bimodal)
        psi = layer_coherence(layer.phi_slow, layer.total_tokens_seen)
        energy = free_energy(psi, sum(share > 0.0 for share in shares), len(duplicates), two)
        return cls(layer, shares, pairs, duplicates, bimodal, energy)


def holding(seen: SeenRoles, config: LifecycleConfig, open_keys: Container[Key]) -> list[Key]:
    """What holds in this window. An expert is in one merge at most: one that is open already, else the closest.

    A merge's key is in order of ids, since who has more tokens may change.
    """
    merges: list[Key] = [("merge", tuple(sorted((pair.first, pair.second)))) for pair in seen.duplicates]
    found: list[Key] = []
    taken: set[int] = set()
    for kind, experts in sorted(merges, key=lambda key: key not in open_keys):
        if taken.isdisjoint(experts):
            found.append((kind, experts))
            taken.update(experts)
    loaded = seen.overloaded
    for each in seen.bimodal:
        if each.score is not None and each.score > config.dry_run.split_above and each.expert in loaded:
            found.append(("split", (each.expert,)))
    return [*found, *(("spawn", (idle, donor)) for idle, donor in zip(seen.idle, loaded, strict=False))]


def unknown(kind: Kind, experts: tuple[int, ...], seen: SeenRoles) -> bool:
    """Whether this window has too little evidence to say that a proposal no longer holds."""
    if kind == "merge":
        return seen.pairs.get(*experts).score is None
    if kind == "split":
        return next(each for each in seen.bimodal if each.expert == experts[0]).score is None
    return False


def evidence_for(kind: Kind, experts: tuple[int, ...], seen: SeenRoles) -> dict[str, Any]:
    """What a proposal rests on in this window."""
    known = {
        "share": [seen.shares[expert] for expert in experts],
        "n_experts": seen.layer.n_experts,
        "idle_experts": len(seen.idle),
        "free_energy": seen.energy._asdict(),
    }
    if kind == "merge":
        return {**seen.pairs.get(*experts)._asdict(), **known}
    if kind == "split":
        own = next(each for each in seen.bimodal if each.expert == experts[0])
        return {**own._asdict(), **known}
    return known


def competing_edits(kind: Kind, experts: tuple[int, ...], seen: SeenRoles) -> list[dict[str, Any]]:
    """The proposal and what else could be done about it."""

    def edit(name: str, ids: Sequence[int], delta: float | None) -> dict[str, Any]:
        shares = [seen.shares[expert] for expert in ids]
        return {"edit": name, "experts": list(ids), "share": shares, "delta_free_energy": delta}

    def merge(pair: Pair) -> dict[str, Any]:
        return edit("merge", (pair.first, pair.second), _without(pair.second, seen))

    if kind == "merge":
        pair = seen.pairs.get(*experts)
        prunes = [edit("prune", (expert,), _without(expert, seen)) for expert in (pair.second, pair.first)]
        return [merge(pair), *prunes]
    # Merging two near-duplicates is the other way to use a slot better; one that is overloaded would get still more.
    merges = [merge(pair) for pair in seen.duplicates if experts[-1] not in (pair.first, pair.second)][:1]
    if kind == "split":
        idle = seen.idle[:1]
        others = [edit("spawn", (expert, experts[0]), SIZE) for expert in idle]
        others += [edit("prune", (expert,), _without(expert, seen)) for expert in idle]
        return [edit("split", experts, SIZE - TWO_ROLES), *others, *merges, edit("balance", experts, None)]
    unused = experts[0]
    return [
        edit("spawn", experts, SIZE if seen.shares[unused] == 0.0 else 0.0),
        edit("prune", (unused,), _without(unused, seen)),
        *merges,
        edit("balance", (unused,), None),
    ]


def _without(expert: int, seen: SeenRoles) -> float:
    """Change of F when an expert goes, with Psi held as it is."""
    pairs = sum(expert in (pair.first, pair.second) for pair in seen.duplicates)
    counted = round(seen.energy.two_roles / TWO_ROLES)
    two = expert in [each.expert for each in seen.bimodal[:counted]]
    return -SIZE * (seen.shares[expert] > 0.0) - DUPLICATES * pairs - TWO_ROLES * two


def role_record(seen: SeenRoles, history: dict[str, Any]) -> dict[str, Any]:
    """The roles of a layer in a snapshot record."""
    return {
        "pairs": [pair._asdict() for pair in seen.pairs.top(TOP)],
        "two_roles": [each._asdict() for each in seen.bimodal[:TOP] if each.score is not None],
        "free_energy": seen.energy._asdict(),
        "history": history,
    }


logger = logging.getLogger("chronomoe_hf")


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A change in what speaks for an edit of one layer, or a change of basin. Always a dry run.

    Attributes:
        kind: ``"merge"``, ``"split"``, ``"spawn"``, or ``"basin"`` (an event: routing moved to another basin).
        layer_id: MoE layer.
        experts: merge: the survivor and the other; split: the expert; spawn: the idle one and the one that it would
            copy; basin: empty.
        step: optimizer step of the window.
        state: ``"candidate"``, ``"confirmed"`` or ``"withdrawn"``; ``"entered"`` of a basin.
        streak: windows in a row; 0 when withdrawn.
        evidence: what it rests on.
        competing: ``{"edit", "experts", "share", "delta_free_energy"}``, the proposal itself first. The difference is
            exact by the definition of F with Psi held as it is; what an edit does to Psi, and to the loss, it does not
            say.
        run_id: of the run.
    """

    kind: Kind
    layer_id: int
    experts: tuple[int, ...]
    step: int
    state: str
    streak: int
    evidence: dict[str, Any] = field(default_factory=dict)
    competing: tuple[dict[str, Any], ...] = ()
    run_id: str = ""

    def to_record(self) -> dict[str, Any]:
        """JSON-ready dictionary, a line of ``lifecycle_decisions.jsonl``."""
        return {
            "run_id": self.run_id,
            "step": self.step,
            ("event" if self.kind == "basin" else "proposal"): self.kind,
            "layer_id": self.layer_id,
            "experts": list(self.experts),
            "expert_ids": [expert_name(self.layer_id, expert) for expert in self.experts],
            "state": self.state,
            "streak": self.streak,
            "evidence": dict(self.evidence),
            "competing": [dict(each) for each in self.competing],
            "dry_run": True,
        }

    def __str__(self) -> str:
        names = " ".join(expert_name(self.layer_id, expert) for expert in self.experts) or f"layer {self.layer_id}"
        shown = ", ".join(f"{name} {value:.3g}" for name, value in self.evidence.items() if isinstance(value, float))
        return f"[DRY-RUN] step {self.step} {self.kind} {names}: {self.state} ({shown})"


@dataclass
class _LayerMemory:
    streaks: dict[Key, int] = field(default_factory=dict)
    history: RoutingHistory = field(default_factory=RoutingHistory)


class FoundRoles(NamedTuple):
    """What the roles of one window say.

    Args:
        records: layer id -> near-duplicate pairs, experts with two roles, basin and free energy.
        unread: ids of the layers that took tokens, but whose expert outputs were not read.
        proposals: changes only: of proposals, and of basins.
    """

    records: dict[int, dict[str, Any]]
    unread: list[int]
    proposals: list[Proposal]


class RoleObserver:
    """Reads the roles of a window and keeps the proposals that follow. Writes nothing but its own memory.

    Args:
        config: thresholds.

    Attributes:
        standing: the latest state of every proposal that was not withdrawn, by (layer, kind, experts).
    """

    def __init__(self, config: LifecycleConfig) -> None:
        self.config = config
        self.standing: dict[tuple[int, str, tuple[int, ...]], Proposal] = {}
        self._layers: dict[int, _LayerMemory] = {}

    def evaluate(self, snapshot: SystemSnapshot, readings: Mapping[int, RoleReading]) -> FoundRoles:
        """Read the roles of every layer, and propose.

        Args:
            snapshot: of the closed window; it is read only.
            readings: of the same window, by layer id.
        """
        found = FoundRoles({}, [], [])
        out = found.proposals
        for layer in snapshot.layers:
            reading = readings.get(layer.layer_id)
            if layer.shares is None:
                continue
            if reading is None:
                found.unread.append(layer.layer_id)
                continue
            memory = self._layers.setdefault(layer.layer_id, _LayerMemory())
            seen = SeenRoles.of(layer, layer.shares, reading, self.config)
            basin, entered = self._visit(memory, seen, snapshot)
            found.records[layer.layer_id] = role_record(seen, basin)
            out += entered
            if self.config.dry_run.enabled and layer.sufficient:
                out += self._propose(memory, seen, snapshot)
        for proposal in out:
            logger.info("%s", proposal)
        return found

    def _visit(
        self, memory: _LayerMemory, seen: SeenRoles, snapshot: SystemSnapshot
    ) -> tuple[dict[str, Any], list[Proposal]]:
        basin, left = memory.history.visit(snapshot.step, seen.shares, float(seen.layer.token_count))
        record = {"basin": basin.basin_id, "windows": basin.windows, "left": left, "known": len(memory.history.basins)}
        if left is None:
            return record, []
        event = Proposal(
            kind="basin",
            layer_id=seen.layer.layer_id,
            experts=(),
            step=snapshot.step,
            state="entered",
            streak=1,
            evidence=record,
            run_id=snapshot.run_id,
        )
        return record, [event]

    def _propose(self, memory: _LayerMemory, seen: SeenRoles, snapshot: SystemSnapshot) -> list[Proposal]:
        """Move every proposal of the layer that holds now, or held before."""
        holds_now = holding(seen, self.config, memory.streaks)
        out = []
        for kind, experts in [*holds_now, *(key for key in memory.streaks if key not in holds_now)]:
            holds: bool | None = (kind, experts) in holds_now
            if not holds and unknown(kind, experts, seen):
                holds = None
            for state, streak in advance(memory.streaks, (kind, experts), holds, self.config.dry_run.confirmations):
                proposal = Proposal(
                    kind=kind,
                    layer_id=seen.layer.layer_id,
                    experts=experts,
                    step=snapshot.step,
                    state=state,
                    streak=streak,
                    evidence=evidence_for(kind, experts, seen),
                    competing=tuple(competing_edits(kind, experts, seen)),
                    run_id=snapshot.run_id,
                )
                key = (seen.layer.layer_id, kind, experts)
                self.standing.pop(key, None)
                if state != "withdrawn":
                    self.standing[key] = proposal
                out.append(proposal)
        return out

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: per layer the open proposals ``[kind, experts, streak]`` and the routing history."""
        return {
            "layers": {
                str(layer_id): {
                    "streaks": [[kind, list(experts), streak] for (kind, experts), streak in memory.streaks.items()],
                    "history": memory.history.state_dict(),
                }
                for layer_id, memory in self._layers.items()
            },
            "standing": [proposal.to_record() for proposal in self.standing.values()],
        }

    @classmethod
    def from_state(cls, config: LifecycleConfig, state: Mapping[str, Any]) -> RoleObserver:
        """Inverse of :meth:`state_dict`; raises TypeError, KeyError, ValueError or AttributeError where malformed."""
        out = cls(config)
        for layer_id, entry in state["layers"].items():
            streaks = {(_kind(kind), _ids(experts)): int(streak) for kind, experts, streak in entry["streaks"]}
            out._layers[int(layer_id)] = _LayerMemory(streaks, RoutingHistory.from_state(entry["history"]))
        for record in state["standing"]:
            proposal = Proposal(
                kind=_kind(record["proposal"]),
                layer_id=int(record["layer_id"]),
                experts=_ids(record["experts"]),
                step=int(record["step"]),
                state=str(record["state"]),
                streak=int(record["streak"]),
                evidence=dict(record["evidence"]),
                competing=tuple(dict(each) for each in record["competing"]),
                run_id=str(record["run_id"]),
            )
            out.standing[proposal.layer_id, proposal.kind, proposal.experts] = proposal
        return out


def _kind(value: Any) -> Any:
    if value not in KINDS:
        raise ValueError(f"unknown proposal {value!r}")
    return value


def _ids(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
