"""What one window shows of one layer's roles: which proposals hold, on what evidence, and what competes with them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from chronomoe_hf.config import LifecycleConfig
from chronomoe_hf.lifecycle.dry_run.role_numbers import (
    DUPLICATES,
    SIZE,
    TWO_ROLES,
    FreeEnergy,
    Pair,
    Pairs,
    TwoRoles,
    free_energy,
    two_roles_of,
)
from chronomoe_hf.lifecycle.layer_evidence import layer_coherence
from chronomoe_hf.metrics import nearly_dead_limit
from chronomoe_hf.recording.role_sums import RoleReading
from chronomoe_hf.telemetry.layers import LayerSnapshot

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
        duplicates = pairs.above(config.merge_above)
        two = sum(each.score is not None and each.score > config.split_above for each in bimodal)
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
        if each.score is not None and each.score > config.split_above and each.expert in loaded:
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
