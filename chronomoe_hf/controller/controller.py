"""The controller: snapshot in, decisions out.

It holds one ControlState per MoE layer and calls the pure functions of `policy` in the order of the control law.
It runs on the host, once per interval, and is deterministic: every rank that sees the same snapshots decides the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from chronomoe_hf.config import AlertConfig, ControlConfig
from chronomoe_hf.controller import policy
from chronomoe_hf.controller.decisions import ControlDecision
from chronomoe_hf.errors import ConfigError, StateCorruptError, StateMismatchError
from chronomoe_hf.lens.lens import ChronoLens, IdentityLens
from chronomoe_hf.metrics import relative_top2
from chronomoe_hf.telemetry.snapshots import LayerSnapshot, SystemSnapshot
from chronomoe_hf.telemetry.writer import TelemetryWriter

# What the controller remembers about one layer between evaluations.


@dataclass
class ControlState:
    """Control memory of one MoE layer.

    Every number is a Python float or int, so that JSON (shortest-repr floats) restores it bit for bit.

    Attributes:
        pressure: moving average of the topology debt, in [0, 1].
        integral: leaky integral of the shortfall, in [0, scale_max].
        harm_backoff: factor on the lens scale, in [harm.floor, 1].
        harm_hold: evaluations left in which harm_backoff does not recover.
        last_scale: lens scale set at the last evaluation, logit standard deviations.
        last_top2: relative top-2 share at the last evaluation with evidence, None before the first and after harm.
        last_step: optimizer step of the last evaluation, None before the first.
        num_evaluations, num_abstained, num_harms: counts since the start of the run.
    """

    pressure: float = 0.0
    integral: float = 0.0
    harm_backoff: float = 1.0
    harm_hold: int = 0
    last_scale: float = 0.0
    last_top2: float | None = None
    last_step: int | None = None
    num_evaluations: int = 0
    num_abstained: int = 0
    num_harms: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON-ready dictionary of every field."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state_dict(cls, data: Any) -> Self:
        """Inverse of :meth:`state_dict`.

        Raises:
            StateCorruptError: fields are missing, unknown, or not finite numbers.
        """
        names = {item.name for item in dataclasses.fields(cls)}
        found = set(data) if isinstance(data, dict) else set()
        if found != names:
            raise StateCorruptError(
                f"controller state has fields {sorted(found)}, expected {sorted(names)}; "
                "load an intact checkpoint or start the controller fresh"
            )
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            values[item.name] = _number(item.name, data[item.name], str(item.type))
        return cls(**values)


def _number(name: str, value: Any, kind: str) -> float | int | None:
    """`value` checked against a field's annotation ("float", "int", or either with "| None")."""
    if value is None and kind.endswith("None"):
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (kind.startswith("int") and not isinstance(value, int)):
        raise StateCorruptError(
            f"controller state: {name} must be a finite {kind}, got {value!r}; use an intact checkpoint"
        )
    return int(value) if kind.startswith("int") else float(value)


Lens = ChronoLens | IdentityLens
Lenses = Mapping[int, Lens] | Sequence[Lens] | None


class Verdict(NamedTuple):
    """What one evaluation decided, before anything is changed.

    Args:
        decisions: one per layer of the snapshot.
        states: the controller's memory after it, per layer.
    """

    decisions: list[ControlDecision]
    states: list[ControlState]


class Controller:
    """Reads snapshots, tracks pressure per layer, gates the lenses, and leaves a record of every decision.

    Args:
        n_layers: MoE layers, numbered from 0.
        n_experts_per_layer: E of each layer.
        config: gains and thresholds.
        top_k_per_layer: k of each layer; by default the snapshot says.
        floors: where debt starts, its `neff_floor` and `top2_pre`; by default those of ``AlertConfig()``.

    Raises:
        ConfigError: a list's length is not `n_layers`, or an entry is not positive.
    """

    def __init__(
        self,
        n_layers: int,
        n_experts_per_layer: Sequence[int],
        config: ControlConfig | None = None,
        top_k_per_layer: Sequence[int] | None = None,
        floors: AlertConfig | None = None,
    ) -> None:
        if n_layers < 1:
            raise ConfigError(f"Controller n_layers must be at least 1, got {n_layers}")
        for name, values in (("n_experts_per_layer", n_experts_per_layer), ("top_k_per_layer", top_k_per_layer)):
            if values is not None and (len(values) != n_layers or min(values) < 1):
                raise ConfigError(f"Controller {name} must hold {n_layers} positive integers, got {list(values)}")
        self.config = ControlConfig() if config is None else config
        self.floors = AlertConfig() if floors is None else floors
        self.n_layers = n_layers
        self.n_experts_per_layer = tuple(n_experts_per_layer)
        self.top_k_per_layer = None if top_k_per_layer is None else tuple(top_k_per_layer)
        self.run_id: str | None = None
        self._states = [ControlState() for _ in range(n_layers)]
        self._writer: TelemetryWriter | None = None

    def initialize(self, run_id: str, writer: TelemetryWriter | None = None) -> Self:
        """Name the run; a `writer` receives every decision as a ``control_decisions`` record. Keeps the state."""
        self.run_id = run_id
        self._writer = writer
        return self

    def layer_state(self, layer_id: int) -> ControlState:
        """The live control memory of a layer (read it; the controller writes it)."""
        return self._states[layer_id]

    def decide(self, snapshot: SystemSnapshot, lenses: Lenses = None) -> Verdict:
        """Evaluate every layer of a snapshot. Changes nothing: neither a lens nor this controller.

        Args:
            snapshot: a closed window. Its ``lens_spread`` says how evenly each lens would act.
            lenses: lenses by layer id, or a list of lenses (each knows its layer); only read. A layer without one is
                evaluated all the same and abstains with ``lens_unsupported``.

        Returns:
            One decision per layer of the snapshot (none when the controller is disabled), and the memory that
            :meth:`accept` takes over.

        Raises:
            ConfigError: the snapshot has a layer or a number of experts this controller was not built for.
        """
        by_layer = _by_layer(lenses)
        states = [dataclasses.replace(state) for state in self._states]
        if not self.config.enabled:
            return Verdict([], states)
        for layer in snapshot.layers:
            self._check_layer(layer)
        decisions = [
            self._decide(states[layer.layer_id], snapshot, layer, by_layer.get(layer.layer_id))
            for layer in snapshot.layers
        ]
        return Verdict(decisions, states)

    def accept(self, verdict: Verdict) -> None:
        """Remember a verdict of :meth:`decide` and record its decisions where a writer was given."""
        self._states = verdict.states
        if self._writer is not None:
            self._writer.write_many("control_decisions", verdict.decisions)

    def update(self, snapshot: SystemSnapshot, lenses: Lenses = None) -> list[ControlDecision]:
        """Decide, remember, and set the scale of every lens: the original's one call for a loop of your own.

        Args:
            snapshot: a closed window.
            lenses: as for :meth:`decide`; their scales are set, and all closed when the controller is disabled.

        Returns:
            The decisions.

        Raises:
            ConfigError: see :meth:`decide`; nothing was changed.
        """
        verdict = self.decide(snapshot, lenses)
        self.accept(verdict)
        scale = {decision.layer_id: decision.scale for decision in verdict.decisions}
        for layer_id, lens in _by_layer(lenses).items():
            if layer_id in scale or not self.config.enabled:
                lens.set_scale(scale.get(layer_id, 0.0))
        return verdict.decisions

    def _check_layer(self, layer: LayerSnapshot) -> None:
        if not 0 <= layer.layer_id < self.n_layers:
            raise ConfigError(
                f"the snapshot has layer {layer.layer_id}, this controller has layers 0 to {self.n_layers - 1}; "
                "build it with the model's n_layers"
            )
        expected = self.n_experts_per_layer[layer.layer_id]
        if layer.n_experts != expected:
            raise ConfigError(
                f"layer {layer.layer_id} of the snapshot has {layer.n_experts} experts, this controller expects "
                f"{expected}; build it with the model's n_experts_per_layer"
            )

    def _top_k(self, layer: LayerSnapshot) -> int:
        return layer.top_k if self.top_k_per_layer is None else self.top_k_per_layer[layer.layer_id]

    def _decide(
        self, state: ControlState, snapshot: SystemSnapshot, layer: LayerSnapshot, lens: Lens | None
    ) -> ControlDecision:
        """One turn of the control law for one layer; `state` is a copy and moves on."""
        config, spread = self.config, layer.lens_spread
        evidence = _evidence(layer)
        debt, quota, harmed = None, None, False
        if evidence is not None and config.reference == "baseline":
            evidence = _since_baseline(evidence, layer, self._top_k(layer))
        if evidence is not None:
            fit = lens is None or policy.is_fit(spread, config)
            debt, quota, harmed = self._observe(state, evidence, self._top_k(layer), fit)
        drive = policy.drive_of(state.pressure, state.integral, config)
        heat = state.pressure  # in [0, 1] already
        requested = policy.lens_scale(
            drive=drive, heat=heat, harm_backoff=state.harm_backoff, step=snapshot.step, config=config
        )
        reason = policy.abstain_reason(
            drive=drive,
            harm_backoff=state.harm_backoff,
            sufficient=evidence is not None,
            lens_supported=lens is not None and lens.supported,
            config=config,
            lens_spread=None if lens is None else spread,
        )
        state.last_scale = requested if reason is None else 0.0
        state.last_step = snapshot.step
        state.num_evaluations += 1
        state.num_abstained += reason is not None
        return ControlDecision(
            run_id=snapshot.run_id if self.run_id is None else self.run_id,
            step=snapshot.step,
            layer_id=layer.layer_id,
            observed=self._observed(layer),
            debt=debt,
            pressure=state.pressure,
            heat=heat,
            forgetting=policy.forgetting_of(state.pressure, config),
            beta_multiplier=policy.beta_multiplier(state.pressure, config) if evidence is not None else 1.0,
            gate=config.gate,
            integral=state.integral,
            harmed=harmed,
            harm_backoff=state.harm_backoff,
            scale_requested=requested,
            scale=state.last_scale,
            scale_cap=policy.scale_cap(snapshot.step, config),
            abstain_reason=reason,
            lens=None if lens is None else {"rank": lens.rank, **lens.norms(), "spread": spread, "note": lens.note},
            quota=quota,
            alerts=tuple(alert.kind for alert in snapshot.active_alerts if alert.layer_id == layer.layer_id),
        )

    def _observe(
        self, state: ControlState, seen: _Evidence, top_k: int, fit: bool
    ) -> tuple[policy.Debt, policy.Quota | None, bool]:
        """Add a window with evidence to the state; returns debt, quota and the harm guard's verdict."""
        config, n_experts = self.config, len(seen.shares) - len(seen.cut)
        floors = self.floors
        if seen.before is not None:
            floors = floors.replace(
                neff_floor=min(floors.neff_floor, seen.before.n_effective / n_experts),
                top2_pre=max(floors.top2_pre, min(1.0, seen.before.top2)),
            )
            config = config.replace(
                integral_target=min(config.integral_target, seen.before.n_effective / n_experts),
                integral_min_share=config.integral_min_share if seen.before.dead_experts == 0 else 0.0,
            )
        debt = policy.topology_debt(
            n_effective=seen.n_effective,
            top2_share=seen.top2_share,
            dead_experts=max(0, seen.dead_experts - (0 if seen.before is None else seen.before.dead_experts)),
            n_experts=n_experts,
            top_k=top_k,
            floors=floors,
        )
        quota = policy.quota_of(
            seen.shares,
            top2_share=seen.top2_share,
            dead_experts=seen.dead_experts,
            top_k=top_k,
            config=config,
            n_experts=n_experts,
        )
        # The guard watches t, not the plain share: at k = 8 a layer can double its concentration within 0.02.
        top2 = relative_top2(seen.top2_share, top_k)
        rise = None if state.last_top2 is None else top2 - state.last_top2
        harmed = policy.is_harm(state.last_scale, rise, config)
        state.harm_backoff, state.harm_hold = policy.next_harm_backoff(
            state.harm_backoff, state.harm_hold, harmed, config
        )
        state.num_harms += harmed
        # The next window reflects the smaller scale, so it is not judged.
        state.last_top2 = None if harmed and config.harm.restart else top2
        state.pressure = policy.next_pressure(state.pressure, debt.total, config)
        state.integral = policy.next_integral(
            state.integral,
            n_effective=seen.n_effective,
            n_experts=n_experts,
            config=config,
            min_share=min(share for expert, share in enumerate(seen.shares) if expert not in seen.cut),
            fit=fit,
        )
        return debt, quota, harmed

    def _observed(self, layer: LayerSnapshot) -> dict[str, float | int | None]:
        top_k = self._top_k(layer)
        return {
            "entropy": layer.entropy,
            "n_effective": layer.n_effective,
            "top2_share": layer.top2_share,
            "top2_relative": None if layer.top2_share is None else relative_top2(layer.top2_share, top_k),
            "dead_experts": layer.dead_experts,
            "n_experts": layer.n_experts,
            "top_k": top_k,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: the experts per layer and every layer's state; floats return bit for bit."""
        return {
            "n_experts_per_layer": list(self.n_experts_per_layer),
            "layers": [state.state_dict() for state in self._states],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; all or nothing.

        Raises:
            StateCorruptError: entries are missing or malformed.
            StateMismatchError: the state belongs to a model with other layers or expert counts.
        """
        if not isinstance(state, dict) or set(state) != {"n_experts_per_layer", "layers"}:
            raise StateCorruptError(
                "controller state must have exactly n_experts_per_layer and layers; use an intact checkpoint"
            )
        saved = state["n_experts_per_layer"]
        if saved != list(self.n_experts_per_layer) or len(state["layers"]) != self.n_layers:
            raise StateMismatchError(
                f"controller state is for experts per layer {saved}, this controller has "
                f"{list(self.n_experts_per_layer)}; load a checkpoint of this model"
            )
        self._states = [ControlState.from_state_dict(layer) for layer in state["layers"]]


class _Before(NamedTuple):
    """The layer at the run's baseline; `top2` relative to its ceiling."""

    n_effective: float
    top2: float
    dead_experts: int


class _Evidence(NamedTuple):
    """The metrics that the control law needs, all defined; `before` where only what was lost since then counts."""

    shares: Sequence[float]
    n_effective: float
    top2_share: float
    dead_experts: int
    cut: frozenset[int]
    before: _Before | None = None


def _evidence(layer: LayerSnapshot) -> _Evidence | None:
    """What the window shows; None if it is too short. Without one assignment there are no metrics to begin with."""
    if not layer.sufficient or layer.shares is None:
        return None
    if layer.n_effective is None or layer.top2_share is None or layer.dead_experts is None:
        return None
    return _Evidence(layer.shares, layer.n_effective, layer.top2_share, layer.dead_experts, frozenset(layer.cut))


def _since_baseline(seen: _Evidence, layer: LayerSnapshot, top_k: int) -> _Evidence:
    """The evidence with the layer's baseline beside it: the window itself while there is none, so nothing is owed."""
    change = {name: layer.change.get(name) or 0.0 for name in ("n_effective", "top2_share", "dead_experts")}
    before = _Before(
        n_effective=seen.n_effective - change["n_effective"],
        top2=relative_top2(seen.top2_share - change["top2_share"], top_k),
        dead_experts=round(seen.dead_experts - change["dead_experts"]),
    )
    return seen._replace(before=before)


def _by_layer(lenses: Lenses) -> dict[int, Lens]:
    if lenses is None:
        return {}
    if isinstance(lenses, Mapping):
        return dict(lenses)
    return {lens.layer_id: lens for lens in lenses}
