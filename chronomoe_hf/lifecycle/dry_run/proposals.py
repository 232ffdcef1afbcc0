"""Merge, split and spawn: what roles speak for, as dry-run records. Nothing here touches a model.

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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chronomoe_hf.config import LifecycleConfig
from chronomoe_hf.lifecycle.dry_run.role_numbers import RoutingHistory
from chronomoe_hf.lifecycle.seen_roles import (
    KINDS,
    Key,
    Kind,
    SeenRoles,
    competing_edits,
    evidence_for,
    holding,
    role_record,
    unknown,
)
from chronomoe_hf.metrics import expert_name
from chronomoe_hf.recording.role_sums import RoleReading
from chronomoe_hf.telemetry.snapshots import SystemSnapshot

logger = logging.getLogger("chronomoe_hf")

UNREAD = "no roles: no expert output was read for them (compiled graphs are not)"


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


class RoleObserver:
    """Reads the roles of a window and keeps the proposals that follow. Writes nothing but its own memory.

    Args:
        config: thresholds.

    Attributes:
        standing: the last word on every proposal that was not withdrawn, by (layer, kind, experts).
    """

    def __init__(self, config: LifecycleConfig) -> None:
        self.config = config
        self.standing: dict[tuple[int, str, tuple[int, ...]], Proposal] = {}
        self._layers: dict[int, _LayerMemory] = {}

    def evaluate(self, snapshot: SystemSnapshot, readings: Mapping[int, RoleReading]) -> list[Proposal]:
        """Read the roles of every layer, put them into the snapshot's layers, and propose.

        Args:
            snapshot: of the closed window; ``roles`` of its layers is filled in.
            readings: of the same window, by layer id.

        Returns:
            Changes only: of proposals, and of basins.
        """
        out: list[Proposal] = []
        for layer in snapshot.layers:
            reading = readings.get(layer.layer_id)
            if layer.shares is None:
                continue
            if reading is None:
                layer.notes.append(UNREAD)
                continue
            memory = self._layers.setdefault(layer.layer_id, _LayerMemory())
            seen = SeenRoles.of(layer, layer.shares, reading, self.config)
            basin = self._visit(memory, seen, snapshot)
            layer.roles = role_record(seen, basin[0])
            out += basin[1]
            if self.config.enabled and layer.sufficient:
                out += self._propose(memory, seen, snapshot)
        for proposal in out:
            logger.info("%s", proposal)
        return out

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
            for state, streak in _advance(memory.streaks, (kind, experts), holds, self.config.confirmations):
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


def _advance(streaks: dict[Key, int], key: Key, holds: bool | None, needed: int) -> list[tuple[str, int]]:
    """Move one proposal; the states that it newly entered, with the streak."""
    if holds is None:
        return []
    if not holds:
        return [("withdrawn", 0)] if streaks.pop(key, 0) else []
    streak = streaks[key] = streaks.get(key, 0) + 1
    entered = [("candidate", 1)] if streak == 1 else []
    return [*entered, ("confirmed", streak)] if streak == needed else entered
