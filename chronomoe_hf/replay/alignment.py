"""Records that do not fit: which shift would make them fit.

Shape suffixes: L layers, T rows of a router (tokens), K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chronomoe_hf.replay.recompute import same_sets
from chronomoe_hf.replay.store import Array


def _share(target_LTK: Tensor, own_LTK: Tensor) -> float | None:
    known_LT = target_LTK[..., 0] >= 0
    known = int(known_LT.sum())
    return None if known == 0 else int((~same_sets(target_LTK, own_LTK) & known_LT).sum()) / known


def shifted_mismatches(
    target_LTK: Tensor, own_LTK: Tensor, rows: Sequence[Array], repeated: bool = False
) -> dict[str, float]:
    """Mismatch of records against the live choice if they were moved by one token, one layer or one row.

    Args:
        target_LTK: recorded ids, -1 = unknown.
        own_LTK: the live choice.
        rows: places in T of the real tokens of every row.
        repeated: the records were repeated in this forward, so only the first layer has seen its own inputs; then it
            alone is looked at (for a shift by one layer, the first two).
    """
    both = target_LTK[:2] if repeated else target_LTK, own_LTK[:2] if repeated else own_LTK
    if repeated:
        target_LTK, own_LTK = target_LTK[:1], own_LTK[:1]
    found: dict[str, float | None] = {}
    index = [torch.from_numpy(places).to(own_LTK.device) for places in rows]
    own = [own_LTK[:, at] for at in index]
    target = [target_LTK[:, at] for at in index]
    for name, early in (("one token late", True), ("one token early", False)):
        pairs = [(t[:, 1:], o[:, :-1]) if early else (t[:, :-1], o[:, 1:]) for t, o in zip(target, own, strict=True)]
        found[name] = _share(torch.cat([p[0] for p in pairs], 1), torch.cat([p[1] for p in pairs], 1))
    if both[0].shape[0] > 1:
        found["one layer late"] = _share(both[0][1:], both[1][:-1])
        found["one layer early"] = _share(both[0][:-1], both[1][1:])
    for step, name in ((1, "those of the next row"), (-1, "those of the row before")):
        pairs = []
        for at in range(len(rows)):
            other = at + step
            if 0 <= other < len(rows):
                num = min(target[at].shape[1], own[other].shape[1])
                pairs.append((target[at][:, :num], own[other][:, :num]))
        if pairs:
            found[name] = _share(torch.cat([p[0] for p in pairs], 1), torch.cat([p[1] for p in pairs], 1))
    return {name: share for name, share in found.items() if share is not None}


def misaligned(
    target_LTK: Tensor, own_LTK: Tensor, rows: Sequence[Array], share: float, limit: float, repeated: bool = False
) -> str:
    """Why records are refused, with the shift that would fit."""
    shifts = shifted_mismatches(target_LTK, own_LTK, rows, repeated)
    numbers = ", ".join(f"{name} {value:.2f}" for name, value in sorted(shifts.items(), key=lambda item: item[1]))
    best = min(shifts, key=lambda name: shifts[name], default=None)
    hint = (
        "no shift by one fits, so they are of other weights (an engine that was not synced since, another "
        "checkpoint), layers or tokens"
    )
    if best is not None and shifts[best] < share / 2:
        hint = f"they are {best}"
    return (
        f"{share:.0%} of the (token, layer) choices of the rollout are unlike those of this model "
        f"(replay.max_mismatch {limit:.0%}): these routes belong to other tokens, layers or weights; {hint}. Mismatch "
        f"if they were shifted: {numbers}. All-zero routes of an engine come from kernels that do not report them "
        "(vLLM issue 54730: --moe-backend triton)"
    )
