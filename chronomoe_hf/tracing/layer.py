"""One layer's routing of every token.

Shape suffixes: T tokens of all texts, K experts per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from chronomoe_hf.pictures.charts import KINDS

Array = np.ndarray[Any, Any]
NOWHERE = -1
"""Stands for an expert where a layer does not route a token (the other half of an encoder-decoder)."""


@dataclass(frozen=True, kw_only=True)
class TracedLayer:
    """One layer's routing of every token.

    Attributes:
        layer_id, name: of the layer.
        num_experts, top_k: E and k.
        index_TK: int32 ``(T, K)``: the experts, in the router's order; NOWHERE where the layer does not see the token.
        weight_TK: float32 ``(T, K)``: what the router hands to the experts; NaN where its output does not hold them.
        kept_TK: bool ``(T, K)``: False where a capacity dropped the assignment.
        score_TK: float32 ``(T, K)``: the family's score of each, over all experts, without any bias.
        margin_T: float32 ``(T,)``: the smallest chosen score less the largest of the others; NaN where all are chosen.
        next_T: int32 ``(T,)``: that other expert, NOWHERE if none.
        phi: phase coherence of every expert on these texts, length E; None without evidence.
    """

    layer_id: int
    name: str
    num_experts: int
    top_k: int
    index_TK: Array
    weight_TK: Array
    kept_TK: Array
    score_TK: Array
    margin_T: Array
    next_T: Array
    phi: list[float | None]

    @property
    def first_T(self) -> Array:
        """int32 ``(T,)``: of the experts of a token, the one with the largest weight (or score, without weights)."""
        value_TK = np.where(np.isnan(self.weight_TK), self.score_TK, self.weight_TK)
        best_T = np.nan_to_num(value_TK, nan=-np.inf).argmax(axis=1)
        first_T: Array = np.take_along_axis(self.index_TK, best_T[:, None], axis=1)[:, 0]
        return first_T

    def to_record(self) -> dict[str, Any]:
        """Strict-JSON dictionary."""
        return {
            "layer_id": self.layer_id,
            "name": self.name,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "experts": self.index_TK.tolist(),
            "weights": _finite(self.weight_TK),
            "kept": self.kept_TK.tolist(),
            "scores": _finite(self.score_TK),
            "margin": _finite(self.margin_T),
            "next": self.next_T.tolist(),
            "phi": self.phi,
        }


def leaders(*first: Array) -> list[int]:
    """The eight experts that are first for the most tokens, most first; over several models together."""
    both = np.concatenate(first)
    experts, counts = np.unique(both[both != NOWHERE], return_counts=True)
    order = np.lexsort((experts, -counts))
    return [int(expert) for expert in experts[order][: len(KINDS)]]


def _finite(value: Array) -> Any:
    out = value.astype(object)
    out[~np.isfinite(value)] = None
    return out.tolist()
