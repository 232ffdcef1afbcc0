"""Settings of what is watched and written: coherence, alerts, lifecycle, telemetry, checkpoints."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

from chronomoe_hf.config.base import ConfigBase, between, positive, require


@dataclass(frozen=True, kw_only=True)
class CoherenceConfig(ConfigBase):
    """How expert outputs are read (SPEC section 4).

    Args:
        enabled: read expert outputs at all; without them phi and contributions are reported as null.
        max_tokens: tokens of one micro-batch and layer whose expert outputs are read, spread evenly over the
            real tokens; every record says how many rows were used. ``None`` reads all of them (exact).
        reference: ``"leave_one_out"`` (mixture without the expert's own part; falls back to ``"mixture"``
            where k = 1) or ``"mixture"``.
        every: read expert outputs in every n-th micro-batch only; what is read counts n-fold, so that sums stay
            estimates of all. The fastest clock has a half-life of 7 steps: 4 changes little. Evaluation is read
            in full, and so is every forward of a compiled graph.
        roles: also keep the mean direction of every expert's outputs, and look for experts that are near-duplicates or
            serve two kinds of tokens (docs/lifecycle.md, "Roles and proposals"). Costs device memory of 16 L E D + 16 L
            E^2 bytes, and as much in every checkpoint. Compiled graphs are not read for it.
    """

    enabled: bool = True
    max_tokens: int | None = 256
    reference: Literal["leave_one_out", "mixture"] = "leave_one_out"
    every: int = 1
    roles: bool = False

    def _check(self) -> None:
        positive("coherence.every", self.every)
        require(self.enabled or not self.roles, "coherence.roles reads expert outputs, but coherence.enabled is False")
        if self.max_tokens is not None:
            positive("coherence.max_tokens", self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class AlertConfig(ConfigBase):
    """Alert thresholds (SPEC section 3).

    Args:
        neff_floor: PRE_COLLAPSE below this fraction of E; topology debt starts there too.
        top2_pre: PRE_COLLAPSE above this top-2 share relative to its ceiling min(1, 2/k); debt starts there too.
        top2_confirmed: COLLAPSE_CONFIRMED above this relative top-2 share, with a dead expert.
        drift_fraction: DRIFT below this fraction of the run's own baseline n_effective.
        pre_after, confirmed_after, drift_after: consecutive snapshots before the alert is raised.
        baseline_windows: full windows averaged into the baseline.
        min_window_tokens: assignments per expert (on average) below which a window gives no alert.
    """

    neff_floor: float = 0.6
    top2_pre: float = 0.75
    top2_confirmed: float = 0.85
    drift_fraction: float = 0.8
    pre_after: int = 3
    confirmed_after: int = 5
    drift_after: int = 3
    baseline_windows: int = 3
    min_window_tokens: int = 8

    def _check(self) -> None:
        for name in ("neff_floor", "top2_pre", "top2_confirmed", "drift_fraction"):
            between(f"alerts.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("pre_after", "confirmed_after", "drift_after", "baseline_windows"):
            positive(f"alerts.{name}", getattr(self, name))
        between("alerts.min_window_tokens", self.min_window_tokens, 0, math.inf)


@dataclass(frozen=True, kw_only=True)
class LifecycleConfig(ConfigBase):
    """The dry-run lifecycle, and the one thing that is more than a dry run: `cut_at` (SPEC section 6).

    Args:
        enabled: look for prune candidates at every interval. Weights are never touched.
        prune_threshold: Phi_slow, ``"auto"`` = layer mean - 2 standard deviations.
        starvation_threshold: token-weighted mean Phi_slow, ``"auto"`` = below 0.8 of its own baseline.
        min_tokens: fewer tokens than this after `after_step` is low observability.
        coherence_tokens: tokens seen before low coherence can be judged.
        after_step: optimizer step before which low observability is not judged.
        confirmations: consecutive evaluations before a candidate is confirmed.
        measure: at every Trainer evaluation, measure on its batches what pruning to `keep` would cost. Costs
            3 + `measure_controls` forwards of `measure_batches` batches, and with ``coherence.roles`` at most 21 more
            for proposals; changes no weight and no loss.
        keep: fraction of the experts that a plan keeps, the measured one and that of `cut_at`.
        rank: what orders the experts in either, see :func:`~chronomoe_hf.lifecycle.plan_prune`.
        multiple_of: the number of experts that stay is a multiple of it.
        cut_at: cut the model during the run: an optimizer step, or a fraction of a Trainer's run in (0, 1). A plan is
            made from the run's last windows then, and the experts that it drops get no token any more. No weight is
            changed by that. None = never.
        measure_batches: evaluation batches read per rank.
        measure_controls: random plans of the same size measured beside it.
        split: ``"start"`` **rewrites idle experts** when training begins (not on a resume): copies of busy ones, see
            :func:`chronomoe_hf.lifecycle.plan_split`. Only ``ChronoConfig.revive()`` and configs built from parts.
        split_batches: training batches per process that it reads for that.
        split_idle: below this many fair shares of the tokens an expert is idle and is rewritten.
        merge_above: a pair of experts whose role vectors agree this well (cosine, before and after centring) is
            proposed for a merge; needs ``coherence.roles``.
        split_above: an overloaded expert with this bimodality, in [0, 1], is proposed for a split; needs
            ``coherence.roles``.
        router_drift: record how far every expert's row of the router has moved since the model was wrapped, once a
            window. Off by default, because the rows of the start must be kept: as many bytes of host memory as the
            routers' weights have, and as much in every checkpoint. Unknown under FSDP and ZeRO-3, which shard them.
    """

    enabled: bool = True
    prune_threshold: float | Literal["auto"] = "auto"
    starvation_threshold: float | Literal["auto"] = "auto"
    min_tokens: int = 100
    coherence_tokens: int = 1000
    after_step: int = 1000
    confirmations: int = 3
    measure: bool = False
    keep: float = 0.75
    rank: Literal["contribution", "reap", "frequency", "mean_norm", "phi", "random"] = "contribution"
    multiple_of: int = 1
    cut_at: int | float | None = None
    measure_batches: int = 16
    measure_controls: int = 3
    split: Literal["off", "start"] = "off"
    split_batches: int = 8
    split_idle: float = 0.5
    merge_above: float = 0.9
    split_above: float = 0.5
    router_drift: bool = False

    def _check(self) -> None:
        for name in ("prune_threshold", "starvation_threshold"):
            value = getattr(self, name)
            if isinstance(value, float):
                between(f"lifecycle.{name}", value, -1.0, 1.0)
        for name in ("min_tokens", "coherence_tokens", "after_step"):
            between(f"lifecycle.{name}", getattr(self, name), 0, math.inf)
        positive("lifecycle.confirmations", self.confirmations)
        require(0.0 < self.keep < 1.0, f"lifecycle.keep must be in (0, 1), got {self.keep}")
        positive("lifecycle.multiple_of", self.multiple_of)
        step = isinstance(self.cut_at, int) and self.cut_at >= 1
        require(
            self.cut_at is None or step or (isinstance(self.cut_at, float) and 0.0 < self.cut_at < 1.0),
            "lifecycle.cut_at must be an optimizer step (1 or more) or a fraction of the run in (0, 1), got "
            f"{self.cut_at}",
        )
        positive("lifecycle.measure_batches", self.measure_batches)
        positive("lifecycle.split_batches", self.split_batches)
        between("lifecycle.split_idle", self.split_idle, 0.01, 0.99)
        between("lifecycle.measure_controls", self.measure_controls, 0, math.inf)
        between("lifecycle.merge_above", self.merge_above, -1.0, 1.0)
        between("lifecycle.split_above", self.split_above, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig(ConfigBase):
    """What is written where (SPEC sections 3 and 7).

    Args:
        jsonl: write JSONL records below ``<output_dir>/chronomoe``.
        output_dir: ``None`` = the Trainer's output_dir (nothing is written without a Trainer). A path becomes a
            string.
        scalars: add ``moe/...`` scalars to the Trainer's logs.
        per_layer_scalars: also one set of scalars per layer.
        evaluation: record evaluation apart from training (``eval_moe/...``).
        on_error: ``"warn"`` keeps training when our own code fails, ``"raise"`` stops.
    """

    jsonl: bool = True
    output_dir: str | os.PathLike[str] | None = None
    scalars: bool = True
    per_layer_scalars: bool = False
    evaluation: bool = True
    on_error: Literal["warn", "raise"] = "warn"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(ConfigBase):
    """Saving and resuming (SPEC section 7).

    Args:
        save: write the state (a folder ``chronomoe``) into every checkpoint.
        on_missing: ``"auto"`` (warn and start fresh, but raise if the run had acted), ``"fresh"`` or ``"raise"``.
        repair: ``"repair"`` reloads MoE weights that Trainer dropped, ``"raise"`` stops instead, ``"off"`` only warns.
        allow_partial: load matching layers of a state whose layer table differs.
        strict_save: raise on every rank when state cannot be written.
    """

    save: bool = True
    on_missing: Literal["auto", "fresh", "raise"] = "auto"
    repair: Literal["repair", "raise", "off"] = "repair"
    allow_partial: bool = False
    strict_save: bool = False
