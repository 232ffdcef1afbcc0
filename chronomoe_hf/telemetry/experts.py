"""ExpertState: one expert's row of a RoutingEvent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExpertState:
    """One expert over one window.

    Attributes:
        expert_id: ``"L3_E7"``: expert 7 of MoE layer 3.
        layer_id: MoE layer.
        token_count: assignments dispatched to the expert, after capacity dropping.
        share: of the layer's assignments; None for a window without any.
        dead: share exactly 0 (strict); None without assignments.
        nearly_dead: share in (0, min(0.01, 0.1/E)); None without assignments.
        phi_fast, phi_mid, phi_slow: phase coherence of the three clocks, in [-1, 1]; None without evidence.
    """

    expert_id: str
    layer_id: int
    token_count: int
    share: float | None
    dead: bool | None
    nearly_dead: bool | None
    phi_fast: float | None = None
    phi_mid: float | None = None
    phi_slow: float | None = None
