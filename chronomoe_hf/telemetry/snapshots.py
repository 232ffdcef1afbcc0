"""SystemSnapshot: all MoE layers over one window, with alerts."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Container, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chronomoe_hf.config import AlertConfig
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.pictures.shown import Looks, Shown
from chronomoe_hf.telemetry.alerts import Alert, AlertHistory, evaluate
from chronomoe_hf.telemetry.events import RECORD_SCHEMA, Mode, RoutingEvent
from chronomoe_hf.telemetry.layers import LayerSnapshot
from chronomoe_hf.telemetry.looks import window_looks
from chronomoe_hf.telemetry.replay import replay_scalars
from chronomoe_hf.telemetry.values import finite

__all__ = ["LayerSnapshot", "SystemSnapshot"]

UNREAD = "no roles: no expert output was read for them (compiled graphs are not)"

# Name of a per-layer scalar -> attribute of LayerSnapshot.
_LAYER_SCALARS = {
    "neff": "n_effective",
    "maxvio": "max_violation",
    "top2_share": "top2_share",
    "gini": "gini",
    "load_cv": "load_cv",
    "dead_experts": "dead_experts",
    "coherence": "coherence_mean",
    "disagreement_js": "disagreement_js",
    "relevance": "relevance",
    "lens_scale": "lens_scale",
}


@dataclass(kw_only=True, repr=False)
class SystemSnapshot(Shown):
    """All MoE layers over one window.

    Attributes:
        step: optimizer step at the end of the window.
        layers: by layer_id, layers without events left out.
        run_id, model_name, attempt, mode: whose numbers these are.
        n_layers: MoE layers of the model.
        train_loss, val_loss: as given.
        alerts: edges of this snapshot.
        active_alerts: alerts in force after it, with the step at which each was raised.
        step_ms: host time of ``system.step`` per optimizer step, milliseconds (``overhead_ms`` in older records); what
            forwards add is not in it, see ``benchmarks/results/launches.md``.
        loss_tokens: positions whose label took part in the loss, over all ranks; None where no forward that was
            recorded was given labels (or all were compiled).
        replay: what was compared between passes and repeated, see ``docs/replay.md``; None while replay is off.
        timestamp: seconds since the epoch.
        notes: remarks in plain words, layer by layer.
    """

    step: int
    layers: list[LayerSnapshot]
    run_id: str = ""
    model_name: str = ""
    attempt: int = 0
    mode: Mode = "TRAIN"
    n_layers: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    alerts: list[Alert] = field(default_factory=list)
    active_alerts: list[Alert] = field(default_factory=list)
    step_ms: float | None = None
    loss_tokens: int | None = None
    replay: dict[str, Any] | None = None
    timestamp: float = field(default_factory=time.time)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_events(
        cls,
        *,
        events: Iterable[RoutingEvent],
        step: int,
        run_id: str,
        model_name: str,
        n_layers: int,
        alert_history: AlertHistory | MutableMapping[str, Any] | None,
        train_loss: float | None = None,
        val_loss: float | None = None,
        config: AlertConfig | None = None,
        governed: bool = False,
        step_ms: float | None = None,
        loss_tokens: int | None = None,
    ) -> SystemSnapshot:
        """Summarise a window and raise or clear alerts.

        Args:
            events: of one mode, any number per layer, oldest first.
            step: optimizer step at the end of the window.
            run_id: the run.
            model_name: for people.
            n_layers: MoE layers of the model; a layer without events is NOT_OBSERVED.
            alert_history: state of the alerts, changed in place: an AlertHistory, or a dict that starts empty and is
                passed again each time. None judges this snapshot alone.
            train_loss: as logged, if known.
            val_loss: as logged, if known.
            config: alert thresholds.
            governed: beta or a lens has acted in this run; baselines stop collecting.
            step_ms: host time of ``system.step`` per optimizer step, milliseconds.
            loss_tokens: positions whose label took part in the loss, if known.

        Raises:
            ConfigError: events of several modes, a layer_id outside the model, events that disagree about E or k.
        """
        config = AlertConfig() if config is None else config
        history = alert_history if isinstance(alert_history, AlertHistory) else AlertHistory(alert_history)
        by_layer: dict[int, list[RoutingEvent]] = {}
        for event in events:
            by_layer.setdefault(event.layer_id, []).append(event)
        modes = {event.mode for group in by_layer.values() for event in group}
        if len(modes) > 1:
            raise ConfigError(
                f"a snapshot has one mode, got events of {', '.join(sorted(modes))}; filter by event.mode"
            )
        if by_layer and max(by_layer) >= n_layers:
            raise ConfigError(f"event of layer {max(by_layer)}, but n_layers is {n_layers} (ids run from 0)")
        layers = [
            LayerSnapshot.from_events(by_layer[layer_id], min_window_tokens=config.min_window_tokens)
            for layer_id in sorted(by_layer)
        ]
        missing = [layer_id for layer_id in range(n_layers) if layer_id not in by_layer]
        alerts = evaluate(layers, missing, step, history, config, governed, training=modes <= {"TRAIN"})
        return cls(
            step=step,
            layers=layers,
            run_id=run_id,
            model_name=model_name,
            attempt=max((event.attempt for group in by_layer.values() for event in group), default=0),
            mode=modes.pop() if modes else "TRAIN",
            n_layers=n_layers,
            train_loss=train_loss,
            val_loss=val_loss,
            alerts=alerts,
            active_alerts=history.active,
            step_ms=step_ms,
            loss_tokens=loss_tokens,
            notes=[f"layer {layer.layer_id}: {note}" for layer in layers for note in layer.notes],
        )

    def with_roles(self, records: Mapping[int, dict[str, Any]], unread: Container[int] = ()) -> SystemSnapshot:
        """This window beside what was found of its roles; the snapshot itself stays as it was.

        Args:
            records: layer id -> the roles of that layer.
            unread: ids of layers that get the remark that no output was read for them.
        """
        layers = [
            dataclasses.replace(
                layer,
                roles=records.get(layer.layer_id),
                notes=[*layer.notes, *([UNREAD] if layer.layer_id in unread else [])],
            )
            for layer in self.layers
        ]
        return dataclasses.replace(self, layers=layers)

    def with_replay(
        self, record: dict[str, Any], alerts: Sequence[Alert], active_alerts: Sequence[Alert]
    ) -> SystemSnapshot:
        """This window beside what was compared between passes and repeated; the snapshot itself stays as it was.

        Args:
            record: of the window, see ``docs/replay.md``.
            alerts: edges that follow from it.
            active_alerts: all that are in force after it.
        """
        return dataclasses.replace(
            self, replay=record, alerts=[*self.alerts, *alerts], active_alerts=list(active_alerts)
        )

    def _looks(self) -> Looks:
        return window_looks(self)

    def scalars(self, prefix: str = "moe/") -> dict[str, float]:
        """At most 14 numbers for a tracker, 19 with replay; what is undefined is left out.

        `neff_share_min` is the lowest n_effective of a layer as a share of its experts: it compares across models.

        Args:
            prefix: ``"moe/"``, or ``"eval_moe/"`` so that Trainer shows ``eval/moe/...``.
        """
        values: dict[str, float | None] = {}
        for name, attribute in (("neff", "n_effective"), ("maxvio", "max_violation"), ("top2_share", "top2_share")):
            known = self._known(attribute)
            values[f"{name}_mean"] = sum(known) / len(known) if known else None
            if known:
                values[f"{name}_{'min' if name == 'neff' else 'max'}"] = min(known) if name == "neff" else max(known)
        shares = [layer.n_effective / layer.num_choices for layer in self.layers if layer.n_effective is not None]
        values["neff_share_min"] = min(shares, default=None)
        for name in ("gini", "load_cv"):
            known = self._known(name)
            values[f"{name}_mean"] = sum(known) / len(known) if known else None
        dead = self._known("dead_experts")
        values["dead_experts"] = sum(dead) if dead else None
        coherence = self._known("coherence_mean")
        values["coherence_mean"] = sum(coherence) / len(coherence) if coherence else None
        values["coherence_min"] = min(self._known("coherence_min"), default=None)
        if self.mode == "TRAIN":  # an evaluation raises none, and a line that is always 0 says nothing
            values["alerts_active"] = len(self.active_alerts)
        values["step_ms"] = self.step_ms
        values |= {} if self.replay is None else replay_scalars(self.replay)
        return _finite_floats(values, prefix)

    def layer_scalars(self, prefix: str = "moe/") -> dict[str, float]:
        """The same, per layer: ``moe/layer_07/neff`` and so on; layer numbers are zero-padded so that they sort."""
        width = max(2, len(str(max(self.n_layers - 1, 0))))
        values: dict[str, float | None] = {}
        for layer in self.layers:
            for name, attribute in _LAYER_SCALARS.items():
                values[f"layer_{layer.layer_id:0{width}d}/{name}"] = getattr(layer, attribute)
        return _finite_floats(values, prefix)

    def _known(self, attribute: str) -> list[float]:
        values = (getattr(layer, attribute) for layer in self.layers)
        return [float(value) for value in values if value is not None]

    def to_record(self) -> dict[str, Any]:
        """Strict-JSON dictionary."""
        return {
            "schema": RECORD_SCHEMA,
            "run_id": self.run_id,
            "attempt": self.attempt,
            "step": self.step,
            "time": round(self.timestamp, 3),
            "mode": self.mode,
            "model_name": self.model_name,
            "n_layers": self.n_layers,
            "train_loss": finite(self.train_loss),
            "val_loss": finite(self.val_loss),
            "loss_tokens": self.loss_tokens,
            "scalars": {name: finite(value) for name, value in self.scalars("").items()},
            "layers": [layer.to_record() for layer in self.layers],
            "alerts": [alert.to_record() for alert in self.alerts],
            "active_alerts": [alert.to_record() for alert in self.active_alerts],
            "notes": list(self.notes),
        }


def _finite_floats(values: dict[str, float | None], prefix: str) -> dict[str, float]:
    return {prefix + name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
