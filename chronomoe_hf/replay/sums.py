"""What replay adds up between windows: on the device where it compares choices, on the host where it counts records.

Shape suffixes: L layers, T rows (tokens), P classes of positions in the completion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from chronomoe_hf import distributed

Pair = Literal["rollout_old", "rollout_gradient", "old_gradient"]
PAIRS: tuple[Pair, ...] = ("rollout_old", "rollout_gradient", "old_gradient")
CLASSES = 16
"""Positions in the completion are counted in classes of doubling width: 0, 1, 2-3, 4-7, ..., from 16384 on."""
LN2 = math.log(2.0)


def position_class(position_T: Any) -> Any:
    """The class of positions in the completion (numpy int64, -1 = in the prompt or unknown, which stays -1)."""
    known = np.maximum(position_T, 0)
    classes = np.minimum(
        np.where(known < 1, 0, np.floor(np.log2(np.maximum(known, 1))).astype(np.int64) + 1), CLASSES - 1
    )
    return np.where(position_T < 0, -1, classes)


@dataclass
class LogpSums:
    """Differences of log-probabilities of the same tokens between two passes, on the host.

    Args:
        num: tokens compared.
        total: sum of the absolute differences, nats.
        k3: sum of ``r - 1 - ln r`` with r = exp(later - earlier): an estimate of KL(earlier || later) from its own
            samples (Schulman 2020, http://joschu.net/blog/kl-approx.html).
        above: tokens that differ by more than ln 2.
        largest: absolute difference.
    """

    num: float = 0.0
    total: float = 0.0
    k3: float = 0.0
    above: float = 0.0
    largest: float = 0.0

    def add(self, earlier: Any, later: Any) -> None:
        """Add tokens (numpy fp32 of one shape; NaN = unknown)."""
        d = later.astype(np.float64) - earlier.astype(np.float64)
        d = d[np.isfinite(d)]
        if not d.size:
            return
        self.num += d.size
        self.total += float(np.abs(d).sum())
        self.k3 += float((np.expm1(d) - d).sum())
        self.above += float((np.abs(d) > LN2).sum())
        self.largest = max(self.largest, float(np.abs(d).max()))

    def values(self) -> list[float]:
        """What is summed over ranks."""
        return [self.num, self.total, self.k3, self.above]


class PairSums:
    """Choices compared between two passes: per layer and per position, float64 on the device."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self.flat = torch.zeros(2 * (num_layers + CLASSES), dtype=torch.float64, device=device)
        self.num_layers = num_layers

    def add(self, differs_LT: Tensor, known_LT: Tensor, class_T: Tensor) -> None:
        """Add one forward: where choices differ, where both are known (bool), and the class of every token."""
        num = self.num_layers
        differs_LT = differs_LT & known_LT
        self.flat[:num].add_(differs_LT.sum(1))
        self.flat[num : 2 * num].add_(known_LT.sum(1))
        placed_T = class_T.clamp_min(0)
        counts = (class_T >= 0).double()
        self.flat[2 * num : 2 * num + CLASSES].index_add_(0, placed_T, differs_LT.sum(0).double() * counts)
        self.flat[2 * num + CLASSES :].index_add_(0, placed_T, known_LT.sum(0).double() * counts)


@dataclass
class ReplaySums:
    """Everything since the last window.

    Args:
        num_layers: layers that are compared.
        passes: forwards by kind.
        wanted, covered: tokens of passes that need a record, and those that had one; the last token of a row, which
            no engine routes, is not wanted.
        rows, unknown_rows: rows of those passes; those of which not even the prompt was known.
        repeated: tokens whose choice was repeated (times passes, not times layers).
        masked: (token, layer) whose recorded choice holds an expert that is cut.
    """

    num_layers: int
    passes: dict[str, int] = field(default_factory=dict)
    wanted: float = 0.0
    covered: float = 0.0
    rows: float = 0.0
    unknown_rows: float = 0.0
    repeated: float = 0.0
    masked: dict[int, Tensor] = field(default_factory=dict)
    pairs: dict[Pair, PairSums] = field(default_factory=dict)
    logps: dict[Pair, LogpSums] = field(default_factory=dict)
    recompute_flips: dict[int, Tensor] = field(default_factory=dict)
    recompute_tokens: dict[int, int] = field(default_factory=dict)

    def pair(self, name: Pair, device: torch.device) -> PairSums:
        """The sums of a pair of passes, made when first asked for."""
        if name not in self.pairs:
            self.pairs[name] = PairSums(self.num_layers, device)
        return self.pairs[name]

    def count(self, phase: str) -> None:
        """One more forward of a kind."""
        self.passes[phase] = self.passes.get(phase, 0) + 1

    def reduced(self, all_layers: int, device: torch.device) -> dict[str, Any]:
        """Everything as one record, over all ranks. Collective: one sum, one maximum.

        Args:
            all_layers: layers of the model, for what is counted by layer id.
            device: where the collective runs.
        """
        kinds = ("rollout", "old", "gradient", "recompute")
        host = [self.wanted, self.covered, self.rows, self.unknown_rows, self.repeated]
        host += [float(self.passes.get(kind, 0)) for kind in kinds]
        for name in PAIRS:
            host += self.logps.get(name, LogpSums()).values()
        head = torch.tensor(host, dtype=torch.float64, device=device)
        parts = [head, _by_layer(self.masked, all_layers, device), _by_layer(self.recompute_flips, all_layers, device)]
        parts.append(_by_layer(self.recompute_tokens, all_layers, device))
        blank = torch.zeros(2 * (self.num_layers + CLASSES), dtype=torch.float64, device=device)
        parts += [self.pairs[name].flat.to(device) if name in self.pairs else blank for name in PAIRS]
        largest = torch.tensor([self.logps.get(name, LogpSums()).largest for name in PAIRS], dtype=torch.float64)
        flat = distributed.all_reduce_sum_(torch.cat(parts)).cpu().numpy()
        largest_P = distributed.all_reduce_max_(largest.to(device)).cpu().numpy()
        return _record(flat, largest_P, self.num_layers, all_layers, kinds)


def _by_layer(values: Mapping[int, Any], num_layers: int, device: torch.device) -> Tensor:
    out = torch.zeros(num_layers, dtype=torch.float64, device=device)
    for layer_id, value in values.items():
        out[layer_id] = value
    return out


def _record(flat: Any, largest_P: Any, num: int, all_layers: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    wanted, covered, rows, unknown, repeated, *passes = flat[: 5 + len(kinds)].tolist()
    at = 5 + len(kinds)
    logps = {}
    for name, largest in zip(PAIRS, largest_P.tolist(), strict=True):
        count, total, k3, above = flat[at : at + 4].tolist()
        at += 4
        if count:
            logps[name] = {
                "tokens": int(count),
                "logp_diff_mean": total / count,
                "logp_diff_max": largest,
                "k3": k3 / count,
                "above_ln2": above / count,
            }
    masked_L, flips_L, recomputed_L = (flat[at + i * all_layers : at + (i + 1) * all_layers] for i in range(3))
    at += 3 * all_layers
    pairs = {}
    for name in PAIRS:
        one = flat[at : at + 2 * (num + CLASSES)]
        at += len(one)
        if one[num : 2 * num].sum():
            pairs[name] = {
                "mismatch": _shares(one[:num], one[num : 2 * num]),
                "choices": one[num : 2 * num].astype(np.int64).tolist(),
                "by_position": _shares(one[2 * num : 2 * num + CLASSES], one[2 * num + CLASSES :]),
                "mean": float(one[:num].sum() / one[num : 2 * num].sum()),
            }
    record: dict[str, Any] = {
        "passes": {kind: int(value) for kind, value in zip(kinds, passes, strict=True)},
        "tokens_wanted": int(wanted),
        "coverage": covered / wanted if wanted else None,
        "rows": int(rows),
        "unknown_rows": int(unknown),
        "tokens_repeated": int(repeated),
        "masked": masked_L.astype(np.int64).tolist() if masked_L.any() else None,
        "pairs": pairs,
        "logps": logps,
    }
    if recomputed_L.any():
        record["recompute"] = {
            "flips": _shares(flips_L, recomputed_L),
            "tokens": recomputed_L.astype(np.int64).tolist(),
        }
    return record


def _shares(part: Any, whole: Any) -> list[float | None]:
    return [float(p / w) if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True)]
