"""Which expert of a layer hands its tokens to which expert of the next.

Shape suffixes: E experts of a layer, F experts of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from chronomoe_hf.pictures.charts import Node, flow
from chronomoe_hf.pictures.drawing import Drawing
from chronomoe_hf.pictures.picture import Picture, View

Array = np.ndarray[Any, Any]
MOST_NODES = 10  # experts of a layer that are shown by themselves
MOST_LAYERS = 5  # of one view
MOST_VIEWS = 30  # with those of single domains; where they would be more there are none of these
LEAST_SHARE = 0.004  # of all that leaves a layer: a thinner band is left out
LEAST_EXPECTED = 50.0  # tokens that chance would give a pair before its lift is named


def flow_picture(
    labels: Sequence[str],
    flows: Sequence[Array | None],
    domains: Mapping[str, Sequence[Array | None]] | None = None,
) -> Picture | None:
    """The flow between all neighbouring layers, a few layers a view; None where nothing was counted.

    Args:
        labels: of the layers, length L.
        flows: ``flows[l]`` int64 ``(E, F)``: tokens for which layer l chose e and layer l + 1 chose f; length L - 1,
            None where two layers are not neighbours in a forward.
        domains: the same of each domain alone, by name; shown beside the whole where the views stay few.
    """
    runs: list[list[int]] = []
    for at, pair in enumerate(flows):
        if pair is None or not pair.any():
            continue
        if not (runs and runs[-1][-1] == at and len(runs[-1]) < MOST_LAYERS):
            runs.append([at])
        runs[-1].append(at + 1)
    if not runs:
        return None
    views = [View(_span(labels, run), _view(labels, flows, flows, run)) for run in runs]
    if domains and 1 < len(domains) and (1 + len(domains)) * len(runs) <= MOST_VIEWS:
        views += [
            View(f"{name}, {_span(labels, run)}", _view(labels, own, flows, run))
            for name, own in sorted(domains.items())
            for run in runs
            if all((part := own[at]) is not None and part.any() for at in run[:-1])
        ]
    note = f"A band is the share of what leaves a layer; the {MOST_NODES} busiest experts are shown by themselves, the "
    note += f"others together; bands below {100 * LEAST_SHARE:g} % are left out. Times chance: over what the loads of "
    note += "both experts alone would give."
    return Picture("flow", "What hands to what", _sentence(labels, flows), views, note)


def _span(labels: Sequence[str], run: Sequence[int]) -> str:
    return f"layers {labels[run[0]]} to {labels[run[-1]]}"


def _view(
    labels: Sequence[str], flows: Sequence[Array | None], whole: Sequence[Array | None], run: Sequence[int]
) -> Callable[[float], Drawing]:
    """A few layers of `flows`; the experts shown by themselves are the busiest of the `whole`: so views compare."""
    tables, loads = _tables(flows, run)
    groups = [_groups(load) for load in _tables(whole, run)[1]]
    columns = [_nodes(load, chosen) for load, chosen in zip(loads, groups, strict=True)]
    links = [_links(table, *groups[at : at + 2]) for at, table in enumerate(tables)]
    names = [labels[at] for at in run]
    return lambda width: flow(columns, links, names, width)


def _tables(flows: Sequence[Array | None], run: Sequence[int]) -> tuple[list[Array], list[Array]]:
    parts = [flows[at] for at in run[:-1]]
    tables = [part.astype(np.float64) for part in parts if part is not None]
    return tables, [table.sum(axis=1) for table in tables] + [tables[-1].sum(axis=0)]


def _groups(load_E: Array) -> list[list[int]]:
    """The busiest experts alone, the others in one group at the end."""
    order = np.argsort(-load_E, kind="stable").tolist()
    if len(order) <= MOST_NODES + 1:
        return [[expert] for expert in order]
    return [*([expert] for expert in order[:MOST_NODES]), order[MOST_NODES:]]


def _nodes(load_E: Array, groups: list[list[int]]) -> list[Node]:
    total = float(load_E.sum()) or 1.0
    return [Node(str(g[0]) if len(g) == 1 else "other", float(load_E[g].sum()) / total) for g in groups]


def _links(pair_EF: Array, one: list[list[int]], other: list[list[int]]) -> list[tuple[int, int, float, float]]:
    total = float(pair_EF.sum()) or 1.0
    leave_E, enter_F = pair_EF.sum(axis=1), pair_EF.sum(axis=0)
    out = []
    for i, left in enumerate(one):
        for j, right in enumerate(other):
            share = float(pair_EF[np.ix_(left, right)].sum()) / total
            chance = float(leave_E[left].sum() * enter_F[right].sum()) / total**2
            if share >= LEAST_SHARE:
                out.append((i, j, share, share / chance if chance > 0 else 0.0))
    return out


def strongest(flows: Sequence[Array | None]) -> tuple[int, int, int, float] | None:
    """``(layer, expert, expert of the next, lift)`` of the pair most above chance, among those that are no rarity."""
    best: tuple[int, int, int, float] | None = None
    for layer, pair_EF in enumerate(flows):
        if pair_EF is None or not pair_EF.any():
            continue
        total = float(pair_EF.sum())
        chance_EF = np.outer(pair_EF.sum(axis=1), pair_EF.sum(axis=0)) / total
        lift_EF = np.where(chance_EF >= LEAST_EXPECTED, pair_EF / np.maximum(chance_EF, 1e-9), 0.0)
        e, f = np.unravel_index(int(lift_EF.argmax()), lift_EF.shape)
        if best is None or lift_EF[e, f] > best[3]:
            best = (layer, int(e), int(f), float(lift_EF[e, f]))
    return best if best is not None and best[3] > 0 else None


def _sentence(labels: Sequence[str], flows: Sequence[Array | None]) -> str:
    found = strongest(flows)
    if found is None:
        return "No pair of experts is frequent enough to say more than that."
    layer, one, other, lift = found
    return (
        f"What expert {one} of layer {labels[layer]} handles goes to expert {other} of layer {labels[layer + 1]} "
        f"{lift:.1f} times as often as by chance."
    )
