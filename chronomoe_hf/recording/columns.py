"""The columns of a layer's sums: known here and nowhere else, used by the forward, the step and the records.

Shape suffixes: L layers, E experts (padded to the widest layer), R numbers of one row.
"""

from __future__ import annotations

from typing import Any

from chronomoe_hf.expert_numbers import OUTPUT_SUMS, ROUTING_SUMS

META = ("tokens", "dropped", "nonfinite", "calls")
PER_EXPERT = (*ROUTING_SUMS, *OUTPUT_SUMS)
PER_LAYER = ("logit_var", "js", "flip", "overlap", "compared", "topk_differs", "steered_tokens")


class Row:
    """Names the columns of a flat row ``[..., R]`` (counts, META, PER_EXPERT, PER_LAYER); float64, tensor or numpy.

    Counts are whole numbers, which float64 holds exactly up to 2^53.

    Args:
        width: experts of the widest layer.

    Attributes:
        size: R.
        head: counts, META and ROUTING_SUMS: what every router call adds to.
        outputs: what a reading of expert outputs adds to.
        tail: PER_LAYER.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.size = width + len(META) + len(PER_EXPERT) * width + len(PER_LAYER)
        self.head = slice(0, width + len(META) + len(ROUTING_SUMS) * width)
        self.outputs = slice(self.head.stop, self.size - len(PER_LAYER))
        self.tail = slice(self.outputs.stop, self.size)

    def count(self, row: Any) -> Any:
        """Assignments per expert."""
        return row[..., : self.width]

    def meta(self, row: Any, name: str) -> Any:
        """One of META."""
        return row[..., self.width + META.index(name)]

    def expert(self, row: Any, name: str) -> Any:
        """One of PER_EXPERT."""
        start = self.width + len(META) + PER_EXPERT.index(name) * self.width
        return row[..., start : start + self.width]

    def layer(self, row: Any, name: str) -> Any:
        """One of PER_LAYER."""
        return row[..., self.tail.start + PER_LAYER.index(name)]

    def disagreement(self, row: Any) -> Any:
        """The three sums js, flip and overlap, ``[..., 3]``."""
        start = self.tail.start + PER_LAYER.index("js")
        return row[..., start : start + 3]
