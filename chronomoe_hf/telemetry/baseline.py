"""The baseline of a run: what the load of every layer was before training changed it, and how sure a window can be.

Every alert compares a window with a level; a level alone says how a model and its data are, not what training did. So
each layer keeps its counts of the start, and every number exists twice: now, and changed by how much, with the error
that a window of that many tokens has.

The data is plain JSON, kept in the alert history, so that a checkpoint carries it.

Shape suffixes: E experts of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from chronomoe_hf import metrics
from chronomoe_hf.config import AlertConfig
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.telemetry.layers import LayerSnapshot

Array = np.ndarray[Any, Any]

# Numbers of a layer that are also given as a change since the baseline.
CHANGES = (
    "entropy",
    "n_effective",
    "top2_share",
    "top2_relative",
    "dead_experts",
    "nearly_dead_count",
    "max_violation",
    "gini",
    "load_cv",
    "coherence_mean",
)
ERRORS = 3.0  # standard errors beyond which a change is none of chance
MOVED = 0.05  # of E (effective experts) or of the ceiling (top-2 share): a smaller change is called none
DIED_TOKENS = 100  # assignments that an expert should have had by the baseline before its silence counts
DIED_SHARE = 0.25  # fair shares at the baseline below which an expert was idle from the start
DIED_WINDOWS = 3  # consecutive windows without a token
_MOST_STEPS = 9  # differences between neighbouring windows that are remembered


class LayerShape(Protocol):
    """What a baseline has to know of a layer: a LayerSnapshot has it."""

    @property
    def layer_id(self) -> int:
        """Index among the MoE layers."""

    @property
    def n_experts(self) -> int:
        """E."""

    @property
    def top_k(self) -> int:
        """Experts per token."""

    @property
    def cut(self) -> list[int]:
        """Experts that were cut."""


class Errors(NamedTuple):
    """Standard errors of the numbers of one window; what cannot be said is None.

    Args:
        n_effective: of the effective number of experts.
        top2_share: of the sum of the two largest shares.
        max_violation: of max(count) / mean(count) - 1.
        gini: of the Gini coefficient.
        coherence_mean: of the mean phi, from how much it moves between windows; a window's sums do not say it.
    """

    n_effective: float | None = None
    top2_share: float | None = None
    max_violation: float | None = None
    gini: float | None = None
    coherence_mean: float | None = None


def share_errors(counts: Sequence[int], top_k: int) -> list[float]:
    """Standard error of every expert's share if the window's tokens were a random sample.

    A token takes an expert at most once, so a count is binomial over tokens with probability k s, and the share s has
    the variance s (1 - k s) / sum(counts).

    Args:
        counts: assignments per expert, length E.
        top_k: experts per token.
    """
    share_E, total = _shares(counts)
    if total == 0.0:
        return [math.inf] * len(counts)
    rows: list[float] = np.sqrt(_variance(share_E, top_k) / total).tolist()
    return rows


def sampling_errors(counts: Sequence[int], top_k: int, cut: Sequence[int] = ()) -> Errors:
    """Standard errors of a window's numbers if its tokens were a random sample of the data.

    First-order (delta method) on the counts. With one expert a token they are multinomial; with k experts a token,
    drawn without replacement, the covariance is that of independent draws given their sum (Hajek 1964). Tokens of one
    text are alike, so the true error is larger; :class:`Noise` adds what the windows of the run themselves show.

    Args:
        counts: assignments per expert, length E.
        top_k: experts per token.
        cut: experts that were cut, left out.
    """
    left = [count for expert, count in enumerate(counts) if expert not in set(cut)]
    share_E, total = _shares(left)
    if total == 0.0:
        return Errors()
    size = len(left)
    used_E = share_E > 0.0
    log_E = np.log(np.where(used_E, share_E, 1.0))
    entropy = -float((share_E * log_E).sum())
    order_E = np.argsort(share_E)
    two_E = np.zeros(size)
    two_E[order_E[-2:]] = 1.0
    one_E = np.zeros(size)
    one_E[order_E[-1]] = float(size)
    rank_E = np.empty(size)
    rank_E[order_E] = np.arange(1, size + 1)
    slopes = {
        "n_effective": np.where(used_E, -math.exp(entropy) * (log_E + entropy), 0.0),
        "top2_share": two_E,
        "max_violation": one_E,
        "gini": 2.0 * rank_E / size,
    }
    return Errors(**{name: _error(slope_E, share_E, total, top_k) for name, slope_E in slopes.items()})


def small_sample_bias(counts: Sequence[int]) -> float:
    """How much a window of so few tokens understates the effective experts, to first order (Miller and Madow 1955)."""
    total = float(sum(counts))
    neff = metrics.effective_experts(counts) if total else None
    used = sum(count > 0 for count in counts)
    return 0.0 if neff is None else neff * (used - 1) / (2.0 * total)


def _shares(counts: Sequence[int]) -> tuple[Array, float]:
    count_E = np.asarray(counts, dtype=np.float64)
    total = float(count_E.sum())
    return (count_E / total if total else count_E), total


def _variance(share_E: Array, top_k: int) -> Array:
    """``s (1 - k s)``: N times the variance of a share, not below 0."""
    out: Array = share_E * np.clip(1.0 - top_k * share_E, 0.0, 1.0)
    return out


def _error(slope_E: Array, share_E: Array, total: float, top_k: int) -> float:
    """Standard error of a function of the shares with these derivatives."""
    if top_k == 1:
        mean = float((share_E * slope_E).sum())
        return math.sqrt(max(0.0, float((share_E * slope_E**2).sum()) - mean**2) / total)
    weight_E = _variance(share_E, top_k)
    weight = float(weight_E.sum())
    if weight <= 0.0:
        return 0.0
    mean = float((weight_E * slope_E).sum()) / weight
    return math.sqrt(float((weight_E * (slope_E - mean) ** 2).sum()) / total)


class Reference:
    """The baseline of every layer, as a view on plain JSON data.

    Args:
        data: ``{"source", "layers": {"0": {...}}, "noise", "quiet"}``, changed in place; an empty one starts fresh.
    """

    def __init__(self, data: MutableMapping[str, Any]) -> None:
        self.data = data
        data.setdefault("source", "windows")
        for name in ("layers", "noise", "quiet"):
            data.setdefault(name, {})

    @property
    def source(self) -> str:
        """``"windows"`` (the first ones of the run), ``"forward"``, or ``"profile"``."""
        return str(self.data["source"])

    def restart(self) -> None:
        """The layers have other experts than before: everything is collected anew, from windows."""
        self.data.update(source="windows", layers={}, noise={}, quiet={})

    def set_counts(self, source: str, layers: Mapping[int, Mapping[str, Any]], step: int = 0) -> None:
        """Take a baseline that was measured before the run.

        Args:
            source: ``"forward"`` or ``"profile"``.
            layers: by layer id, with ``expert_token_counts`` and, where known, ``coherence_mean``.
            step: optimizer steps done at that time.
        """
        self.restart()
        self.data["source"] = source
        for layer_id, values in layers.items():
            counts = [int(count) for count in values["expert_token_counts"]]
            self.data["layers"][str(layer_id)] = {
                "counts": counts,
                "windows": 1,
                "step": step,
                "coherence_mean": values.get("coherence_mean"),
                "settled": True,
            }

    def entry(self, layer_id: int) -> dict[str, Any] | None:
        """The baseline of a layer, None while it is not settled."""
        entry = self.data["layers"].get(str(layer_id))
        return entry if entry is not None and entry["settled"] else None

    def extend(self, layer: LayerSnapshot, step: int, config: AlertConfig, governed: bool) -> None:
        """Count a window into the layer's baseline, unless that is settled.

        It is settled once it has ``alerts.baseline_windows`` windows and ``alerts.baseline_tokens`` assignments per
        expert, or when something begins to act on the routing.
        """
        layers = self.data["layers"]
        entry = layers.get(str(layer.layer_id))
        if layer.token_count == 0 or (entry is not None and entry["settled"]):
            return
        if entry is None:
            entry = {"counts": [0] * layer.n_experts, "windows": 0, "step": 0, "coherence_mean": None, "settled": False}
            layers[str(layer.layer_id)] = entry
        elif governed:
            entry["settled"] = True  # what was seen before it acted
            return
        if len(entry["counts"]) != layer.n_experts:
            raise ConfigError(
                f"layer {layer.layer_id} has {layer.n_experts} experts, the baseline of this alert history "
                f"{len(entry['counts'])}; start with an empty history for another model"
            )
        entry["counts"] = [a + b for a, b in zip(entry["counts"], layer.expert_token_counts, strict=True)]
        entry["windows"] += 1
        entry["step"] = step
        entry["coherence_mean"] = layer.coherence_mean
        enough = sum(entry["counts"]) >= config.baseline_tokens * layer.num_choices
        entry["settled"] = enough and entry["windows"] >= config.baseline_windows

    def numbers(self, layer: LayerShape) -> dict[str, float | None] | None:
        """The baseline's numbers of a layer, under the names of the layer; None while it is not settled."""
        entry = self.entry(layer.layer_id)
        if entry is None or len(entry["counts"]) != layer.n_experts:
            return None
        load = metrics.load_metrics(entry["counts"], layer.top_k, layer.cut)._asdict()
        return {**load, "coherence_mean": entry.get("coherence_mean")}

    # ---- noise between windows -------------------------------------------------------------------------------------

    def watch(self, layer: LayerSnapshot) -> None:
        """Remember how far the layer's numbers moved since the window before, and which experts stay silent."""
        noise = self.data["noise"].setdefault(str(layer.layer_id), {})
        for name in Errors._fields:
            value = getattr(layer, name)
            if value is None:
                continue
            known = noise.get(name)
            steps = [] if known is None else [*known["steps"], abs(value - known["last"])][-_MOST_STEPS:]
            noise[name] = {"last": value, "steps": steps}
        self._watch_silence(layer)

    def between_windows(self, layer_id: int, name: str) -> float | None:
        """Standard deviation of a number from one window to the next; None before there are two differences.

        From the median of the differences between neighbours: a trend hardly enters it, and neither does one jump.
        """
        steps = sorted(self.data["noise"].get(str(layer_id), {}).get(name, {}).get("steps", []))
        return None if len(steps) < 2 else 1.048 * float(steps[(len(steps) - 1) // 2])

    def _watch_silence(self, layer: LayerSnapshot) -> None:
        entry = self.entry(layer.layer_id)
        quiet = self.data["quiet"].setdefault(str(layer.layer_id), {})
        if entry is None or len(entry["counts"]) != layer.n_experts:
            quiet.clear()
            return
        before, now = sum(entry["counts"]), layer.token_count
        for expert, count in enumerate(layer.expert_token_counts):
            share = entry["counts"][expert] / before if before else 0.0
            if count > 0 or expert in layer.cut or share * layer.num_choices < DIED_SHARE:
                quiet.pop(str(expert), None)
                continue
            windows, expected = quiet.get(str(expert), (0, 0.0))
            quiet[str(expert)] = [windows + 1, expected + share * now]

    def died(self, layer: LayerSnapshot) -> list[int]:
        """Experts that worked at the baseline and have had no token since for too long to be chance."""
        quiet = self.data["quiet"].get(str(layer.layer_id), {})
        return sorted(
            int(expert)
            for expert, (windows, expected) in quiet.items()
            if windows >= DIED_WINDOWS and expected >= DIED_TOKENS
        )

    # ---- comparing -------------------------------------------------------------------------------------------------

    def errors(self, layer: LayerSnapshot) -> Errors:
        """Standard errors of the window's numbers: the larger of a sample's and of what its neighbours show."""
        sampled = sampling_errors(layer.expert_token_counts, layer.top_k, layer.cut)
        return Errors(*(_larger(at, self.between_windows(layer.layer_id, n)) for n, at in sampled._asdict().items()))

    def changes(self, layer: LayerSnapshot) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """What changed since the baseline, and the standard error of each change that has one; empty without one."""
        before = self.numbers(layer)
        if before is None:
            return {}, {}
        change = {name: _minus(getattr(layer, name), before[name]) for name in CHANGES}
        now = self.errors(layer)._asdict()
        entry = self.entry(layer.layer_id)
        assert entry is not None
        start = sampling_errors(entry["counts"], layer.top_k, layer.cut)._asdict()
        # The baseline scatters like the windows that it was made of.
        more = math.sqrt(max(1, entry["windows"]))
        error: dict[str, float | None] = {}
        for name, value in now.items():
            between = self.between_windows(layer.layer_id, name)
            first = _larger(start[name], None if between is None else between / more)
            error[name] = None if value is None or first is None else math.hypot(value, first)
        return change, error

    def concentrated(self, layer: LayerSnapshot) -> bool:
        """Whether the layer is more concentrated than at the baseline, beyond chance and by an amount worth naming."""
        change, error = self.changes(layer)
        if not change:
            return False
        entry = self.entry(layer.layer_id)
        assert entry is not None
        bias = abs(small_sample_bias(layer.expert_token_counts) - small_sample_bias(entry["counts"]))
        fell, of_neff = change["n_effective"], error["n_effective"]
        rose, of_top2 = change["top2_share"], error["top2_share"]
        ceiling = min(1.0, 2.0 / layer.top_k)
        return (
            fell is not None and of_neff is not None and -fell > max(ERRORS * of_neff + bias, MOVED * layer.num_choices)
        ) or (rose is not None and of_top2 is not None and rose > max(ERRORS * of_top2, MOVED * ceiling))

    @property
    def num_settled(self) -> int:
        """Layers whose baseline is settled."""
        return sum(entry["settled"] for entry in self.data["layers"].values())

    def to_record(self, layers: Sequence[LayerShape], step: int) -> dict[str, Any]:
        """The record of a baseline: counts and numbers of every layer that has one."""
        rows = []
        for layer in layers:
            entry, numbers = self.entry(layer.layer_id), self.numbers(layer)
            if entry is None or numbers is None:
                continue
            rows.append(
                {
                    "layer_id": layer.layer_id,
                    "n_experts": layer.n_experts,
                    "top_k": layer.top_k,
                    "step": entry["step"],
                    "windows": entry["windows"],
                    "expert_token_counts": list(entry["counts"]),
                    **{name: numbers[name] for name in CHANGES},
                    "error": sampling_errors(entry["counts"], layer.top_k, layer.cut)._asdict(),
                }
            )
        return {"step": step, "source": self.source, "layers": rows}


def _larger(one: float | None, other: float | None) -> float | None:
    known = [value for value in (one, other) if value is not None]
    return max(known) if known else None


def _minus(now: Any, before: Any) -> float | None:
    return None if now is None or before is None else float(now) - float(before)
