"""How the tensors of a model become those of a model with fewer experts: a table of names, axes and ids.

The table is read off two shapes of the same architecture, with the old and the new count in the config. What the
library itself builds with fewer experts is thus the only source of what depends on their number: router rows, native
biases wherever they live, fused and per-expert weights, scales. Nothing is told by a name.

Shape suffixes: E experts before, N experts after.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from chronomoe_hf.errors import ExportError
from chronomoe_hf.lifecycle.pruning.plan import PlannedLayer, PrunePlan

Shapes = Mapping[str, tuple[int, ...]]
_NUMBERED = re.compile(r"(.*?)(\d+)")


@dataclass(frozen=True)
class Piece:
    """Where a tensor of the smaller model comes from.

    Args:
        source: name in the larger model.
        axis: along which `ids` are taken; None copies the whole tensor.
        ids: kept experts, ascending; empty for a whole copy.
    """

    source: str
    axis: int | None = None
    ids: tuple[int, ...] = ()


def cut_table(old: Shapes, new: Shapes, owners: Mapping[str, int], plan: PrunePlan) -> dict[str, Piece]:
    """The piece of every tensor of the smaller model.

    Args:
        old: shapes by name with E experts.
        new: shapes by name of the same architecture with N experts.
        owners: layer_id of the names (of `old` and of `new`) that lie in a planned layer's block.
        plan: what stays.

    Raises:
        ExportError: a tensor depends on the number of experts in another way than by one row or one name an expert,
            or outside the planned layers.
    """
    table: dict[str, Piece] = {}
    used: set[str] = set()
    groups: dict[int | None, tuple[list[str], list[str]]] = {}
    for side, names in enumerate((old, new)):
        for name in names:
            groups.setdefault(owners.get(name), ([], []))[side].append(name)
    for layer_id, (before, after) in groups.items():
        if layer_id is None:
            pieces = _outside(before, after, old, new)
        else:
            pieces = _inside(before, after, old, new, plan.layers[layer_id])
        table |= pieces
        used |= {piece.source for piece in pieces.values()}
    return {name: table[name] for name in new}


def _outside(before: list[str], after: list[str], old: Shapes, new: Shapes) -> dict[str, Piece]:
    changed = sorted(set(before) ^ set(after)) + [n for n in after if n in old and old[n] != new[n]]
    if changed:
        raise ExportError(
            f"{len(changed)} tensors outside the planned layers depend on the number of experts (first: {changed[0]}); "
            "such a model cannot be cut by a plan of these layers"
        )
    return {name: Piece(name) for name in after}


def _inside(before: list[str], after: list[str], old: Shapes, new: Shapes, layer: PlannedLayer) -> dict[str, Piece]:
    templates = _templates(set(before) - set(after), set(before), layer)
    table = {}
    for name in after:
        found = next((t for part in range(name.count(".") + 1) if (t := _template(name, part))[0] in templates), None)
        if found is not None:
            template, number = found
            source = template.format(layer.kept[number])
            if old[source] != new[name]:
                raise _odd(layer, name, old[source], new[name])
            table[name] = Piece(source)
        elif name not in old:
            raise ExportError(f"{name} is in the smaller model only; {_cannot(layer)}")
        elif old[name] == new[name]:
            table[name] = Piece(name)
        else:
            table[name] = Piece(name, _axis(layer, name, old[name], new[name]), layer.kept)
    return table


def _template(name: str, part: int) -> tuple[str, int]:
    """`name` with the number at the end of its `part`-th component replaced by ``{}``, and the number; ("", 0) else."""
    parts = name.split(".")
    match = _NUMBERED.fullmatch(parts[part])
    if match is None:
        return "", 0
    parts[part] = match[1] + "{}"
    return ".".join(parts), int(match[2])


def _templates(gone: Iterable[str], before: set[str], layer: PlannedLayer) -> set[str]:
    """Names with one number per expert, found from the names that the smaller model lacks."""
    found = set()
    for name in gone:
        options = [_template(name, part) for part in range(name.count(".") + 1)]
        good = [
            template
            for template, number in options
            if template
            and len(layer.kept) <= number < layer.spec.num_experts
            and all(template.format(expert) in before for expert in range(layer.spec.num_experts))
        ]
        if len(good) != 1:
            raise ExportError(f"{name} is in the larger model only and is no tensor of one expert; {_cannot(layer)}")
        found.add(good[0])
    return found


def _axis(layer: PlannedLayer, name: str, old: tuple[int, ...], new: tuple[int, ...]) -> int:
    axes = [at for at, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
    if len(old) != len(new) or len(axes) != 1:
        raise _odd(layer, name, old, new)
    if (old[axes[0]], new[axes[0]]) != (layer.spec.num_experts, len(layer.kept)):
        raise _odd(layer, name, old, new)
    return axes[0]


def _odd(layer: PlannedLayer, name: str, old: tuple[int, ...], new: tuple[int, ...]) -> ExportError:
    return ExportError(
        f"{name} has shape {list(old)}, and {list(new)} with {len(layer.kept)} experts: not one row for each of its "
        f"{layer.spec.num_experts} experts; {_cannot(layer)}"
    )


def _cannot(layer: PlannedLayer) -> str:
    return f"the family {layer.spec.family} cannot be cut"
