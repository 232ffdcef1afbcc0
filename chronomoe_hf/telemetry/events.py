"""RoutingEvent: what one layer did in one window, as numbers on the host.

Shape suffixes: E experts of the layer.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from chronomoe_hf import metrics
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.expert_numbers import PER_EXPERT
from chronomoe_hf.metrics import Load, load_metrics
from chronomoe_hf.telemetry.values import finite, finite_list, known, plain_counts, plain_list, plain_number

# ExpertState: one expert's row of a RoutingEvent.


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


RECORD_SCHEMA = 2
Mode = Literal["TRAIN", "INFER", "EVAL"]
Vector = list[float | None]

COUNTS = "expert_token_counts"  # the one per-expert field that every event has
# Per-expert fields, length E where present; an entry of None means "no evidence for this expert".
VECTORS = tuple(PER_EXPERT)
INTEGERS = (COUNTS, *(name for name, number in PER_EXPERT.items() if number.whole))
# One number per layer and window; None means "not measured".
NUMBERS = (
    "tokens",
    "dropped",
    "nonfinite_tokens",
    "calls",
    "logit_std",
    "disagreement_js",
    "disagreement_flip",
    "overlap_only",
    "relevance",
    "lens_scale",
    "lens_spread",
    "topk_disagreement",
)


@dataclass(frozen=True, kw_only=True)
class RoutingEvent:
    """Routing of one layer over one window (a window of one step is fine).

    Attributes:
        run_id: the run the numbers belong to.
        step: optimizer step at which the window ended.
        mode: ``"TRAIN"``, ``"INFER"`` or ``"EVAL"``.
        layer_id: index among the MoE layers, from 0.
        n_experts: E.
        top_k: experts per token.
        expert_token_counts: assignments dispatched per expert, int, length E: padding excluded, after capacity
            dropping, summed over micro-batches and ranks.
        attempt: 0 for the first start of a run, one more per resume.
        layer_name: module path of the router.
        window_steps: optimizer steps in the window.
        tokens: real tokens routed.
        dropped: assignments refused by capacity.
        nonfinite_tokens: tokens excluded because their router logits held NaN or infinities.
        calls: recorded calls of the router; 0 means the layer was not observed; None means not counted.
        first_choices: tokens at which the expert was the first choice, before capacity dropping, over the window.
        prob_mean: mean router probability per expert; 0 for one that was cut, and over the others then.
        phi_fast, phi_mid, phi_slow: phase coherence of the three clocks, in [-1, 1]; None without evidence.
        phi_rows: expert outputs read per expert for phi in this window.
        contribution: sum of gate * |expert output| over the window, estimated over all tokens.
        saliency: mean of gate * |expert output| over an expert's tokens (REAP, arXiv 2510.13999).
        gate_sum: sum of an expert's gates over the window, estimated over all tokens.
        mean_norm: mean of |expert output| over an expert's tokens.
        total_tokens_seen: assignments per expert since the run began.
        logit_std: EMA of the standard deviation of the clean router logits.
        disagreement_js: mean Jensen-Shannon divergence of biased and clean routing, nats.
        disagreement_flip: fraction of tokens whose top-1 expert the bias changed.
        overlap_only: mean probability mass moved by the bias, in [0, 1].
        relevance: the bridge veto's factor r, in [0, 1].
        beta: bias coefficients per expert, in logit standard deviations.
        router_drift: ``|W_e - W_e(start)| / |W_e(start)|`` of its row of the router's weight
            (``lifecycle__router_drift=True``).
        lens_scale: scale of the lens.
        lens_spread: standard deviation over mean of what the lens reads in the tokens of the window's last step.
        topk_disagreement: share of the tokens whose experts are not those of the plain router, of those that were
            routed while beta or a lens steered; None where nothing did.
        cut: ids of the experts that were cut during the run and get no token; they are neither dead nor idle, and every
            metric of balance is over the others. In records only where there are some.
        notes: remarks in plain words.
    """

    run_id: str
    step: int
    mode: Mode
    layer_id: int
    n_experts: int
    top_k: int
    expert_token_counts: list[int]
    attempt: int = 0
    layer_name: str = ""
    window_steps: int = 1
    tokens: int | None = None
    dropped: int | None = None
    nonfinite_tokens: int = 0
    calls: int | None = None
    prob_mean: Vector | None = None
    first_choices: Vector | None = None
    phi_fast: Vector | None = None
    phi_mid: Vector | None = None
    phi_slow: Vector | None = None
    phi_rows: Vector | None = None
    contribution: Vector | None = None
    saliency: Vector | None = None
    gate_sum: Vector | None = None
    mean_norm: Vector | None = None
    total_tokens_seen: Vector | None = None
    logit_std: float | None = None
    disagreement_js: float | None = None
    disagreement_flip: float | None = None
    overlap_only: float | None = None
    relevance: float | None = None
    beta: Vector | None = None
    router_drift: Vector | None = None
    lens_scale: float | None = None
    lens_spread: float | None = None
    topk_disagreement: float | None = None
    cut: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        if self.layer_id < 0:
            raise ConfigError(f"layer_id counts the MoE layers from 0, got {self.layer_id}")
        metrics.max_violation_ceiling(self.n_experts, self.top_k)  # raises unless 1 <= k <= E
        if len(self.expert_token_counts) != self.n_experts:
            raise ConfigError(
                f"expert_token_counts must hold {self.n_experts} values, one per expert, "
                f"got {len(self.expert_token_counts)}"
            )
        if any(not 0 <= expert < self.n_experts for expert in self.cut):
            raise ConfigError(f"cut must hold ids of experts in 0..{self.n_experts - 1}, got {self.cut}")

    @classmethod
    def from_router_output(
        cls,
        *,
        run_id: str,
        step: int,
        mode: Mode,
        layer_id: int,
        used_capacity: Any,
        n_experts: int,
        top_k: int,
        **fields: Any,
    ) -> RoutingEvent:
        """Build an event from what a router dispatched.

        Args:
            run_id: the run the numbers belong to.
            step: optimizer step.
            mode: ``"TRAIN"``, ``"INFER"`` or ``"EVAL"``.
            layer_id: index among the MoE layers, from 0.
            used_capacity: assignments dispatched per expert, shape ``(E,)``: tensor, array or sequence of whole
                numbers >= 0 (any dtype).
            n_experts: E.
            top_k: experts per token.
            fields: any other attribute of the class; per-expert ones as tensor, array or sequence. NaN and infinities
                become None: no evidence.

        Raises:
            ConfigError: an unknown field, a wrong length, counts that are no counts, k outside [1, E].
        """
        names = {item.name for item in dataclasses.fields(cls)} - {"expert_token_counts"}
        for name in fields:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=3)
                hint = f"; close: {', '.join(close)}" if close else ""
                raise ConfigError(f"RoutingEvent has no field {name!r}{hint}")
        values = dict(fields)
        for name in VECTORS:
            if values.get(name) is not None:
                values[name] = [known(value) for value in plain_list(name, values[name], n_experts)]
        for name in NUMBERS:
            value = values.get(name)
            if value is not None:
                values[name] = known(plain_number(value))
        if values.get("nonfinite_tokens", 0) is None:
            values["nonfinite_tokens"] = 0
        return cls(
            run_id=run_id,
            step=int(step),
            mode=mode,
            layer_id=layer_id,
            n_experts=n_experts,
            top_k=top_k,
            expert_token_counts=plain_counts(used_capacity, n_experts),
            **values,
        )

    @property
    def token_count(self) -> int:
        """Dispatched assignments: the sum of the counts."""
        return sum(self.expert_token_counts)

    @cached_property
    def shares(self) -> list[float] | None:
        """Share of the assignments per expert, summing to one; None for an empty window."""
        total = self.token_count
        return [count / total for count in self.expert_token_counts] if total else None

    @cached_property
    def _load(self) -> Load:
        return load_metrics(self.expert_token_counts, self.top_k, self.cut)

    def load_metrics(self) -> dict[str, Any]:
        """Every balance metric by name; computed once."""
        return self._load._asdict()

    @property
    def entropy(self) -> float | None:
        """Entropy of the shares, nats."""
        return self._load.entropy

    @property
    def n_effective(self) -> float | None:
        """Effective number of experts."""
        return self._load.n_effective

    @property
    def top2_share(self) -> float | None:
        """Sum of the two largest shares."""
        return self._load.top2_share

    @property
    def dead_experts(self) -> int | None:
        """Experts without an assignment."""
        return self._load.dead_experts

    @property
    def nearly_dead_count(self) -> int | None:
        """Experts with a share in (0, min(0.01, 0.1/E))."""
        return self._load.nearly_dead_count

    @property
    def max_violation(self) -> float | None:
        """max(count)/mean(count) - 1."""
        return self._load.max_violation

    @property
    def max_violation_ceiling(self) -> float:
        """E/k - 1."""
        return self._load.max_violation_ceiling

    @property
    def gini(self) -> float | None:
        """Gini coefficient of the shares."""
        return self._load.gini

    @property
    def expert_states(self) -> list[ExpertState]:
        """Every expert's row of this event, by index."""
        shares = self.shares
        gone = set(self.cut)
        nearly = metrics.nearly_dead_limit(self.n_experts - len(gone))
        return [
            ExpertState(
                expert_id=metrics.expert_name(self.layer_id, expert),
                layer_id=self.layer_id,
                token_count=count,
                share=None if shares is None else shares[expert],
                dead=None if shares is None or expert in gone else shares[expert] == 0.0,
                nearly_dead=None if shares is None or expert in gone else 0.0 < shares[expert] < nearly,
                phi_fast=self.phi_fast[expert] if self.phi_fast is not None else None,
                phi_mid=self.phi_mid[expert] if self.phi_mid is not None else None,
                phi_slow=self.phi_slow[expert] if self.phi_slow is not None else None,
            )
            for expert, count in enumerate(self.expert_token_counts)
        ]

    def to_record(self, *, vectors: bool = True) -> dict[str, Any]:
        """Strict-JSON dictionary: NaN and infinities become null, floats keep 7 significant digits.

        Args:
            vectors: False leaves the per-expert fields out and says ``"arrays": true``: they are in ``arrays.bin``.
        """
        record: dict[str, Any] = {"schema": RECORD_SCHEMA}
        for item in dataclasses.fields(self):
            if vectors or item.name not in (COUNTS, *VECTORS):
                record[item.name] = getattr(self, item.name)
        for name in VECTORS if vectors else ():
            record[name] = finite_list(record[name])
        if not vectors:
            record["arrays"] = True
        for name in NUMBERS:
            record[name] = finite(record[name])
        if not self.cut:
            del record["cut"]
        record["token_count"] = self.token_count
        record.update({name: finite(value) for name, value in self._load._asdict().items()})
        return record
