"""Settings of the lifecycle, grouped by what they are for: the dry run, its measurement, a cut, reviving."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from chronomoe_hf.config.base import ConfigBase, between, positive, require, takes_old_names


@dataclass(frozen=True, kw_only=True)
class DryRunConfig(ConfigBase):
    """Which experts could go, merge or split: evidence and cases, never a weight (docs/lifecycle.md, docs/roles.md).

    Args:
        enabled: look for prune candidates at every interval. Weights are never touched.
        prune_threshold: Phi_slow, ``"auto"`` = layer median - 3 robust standard deviations, see
            :func:`~chronomoe_hf.lifecycle.dry_run.cases.prune_threshold`.
        starvation_threshold: token-weighted mean Phi_slow, ``"auto"`` = below 0.8 of its own baseline.
        min_tokens: fewer tokens than this after `after_step` is low observability.
        coherence_tokens: tokens seen before low coherence can be judged.
        after_step: optimizer step before which low observability is not judged.
        confirmations: consecutive evaluations before a candidate is confirmed.
        merge_above: a pair of experts whose role vectors agree this well (cosine, before and after centring) is
            proposed for a merge; needs ``coherence.roles``.
        split_above: an overloaded expert with this bimodality, in [0, 1], is proposed for a split; needs
            ``coherence.roles``.
    """

    enabled: bool = True
    prune_threshold: float | Literal["auto"] = "auto"
    starvation_threshold: float | Literal["auto"] = "auto"
    min_tokens: int = 100
    coherence_tokens: int = 1000
    after_step: int = 1000
    confirmations: int = 3
    merge_above: float = 0.9
    split_above: float = 0.5

    def _check(self) -> None:
        for name in ("prune_threshold", "starvation_threshold"):
            value = getattr(self, name)
            if isinstance(value, float):
                between(f"lifecycle.dry_run.{name}", value, -1.0, 1.0)
        for name in ("min_tokens", "coherence_tokens", "after_step"):
            between(f"lifecycle.dry_run.{name}", getattr(self, name), 0, math.inf)
        positive("lifecycle.dry_run.confirmations", self.confirmations)
        between("lifecycle.dry_run.merge_above", self.merge_above, -1.0, 1.0)
        between("lifecycle.dry_run.split_above", self.split_above, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class MeasuringConfig(ConfigBase):
    """What a cut would cost, measured during training (docs/lifecycle.md).

    Args:
        enabled: at every Trainer evaluation, measure on its batches what pruning to ``cut.keep`` would cost. Costs
            3 + `controls` forwards of `batches` batches, and with ``coherence.roles`` at most 21 more for proposals;
            changes no weight and no loss.
        batches: evaluation batches read per rank.
        controls: random plans of the same size measured beside it.
    """

    enabled: bool = False
    batches: int = 16
    controls: int = 3

    def _check(self) -> None:
        positive("lifecycle.measuring.batches", self.batches)
        between("lifecycle.measuring.controls", self.controls, 0, math.inf)


@dataclass(frozen=True, kw_only=True)
class CutConfig(ConfigBase):
    """Which experts a plan keeps, and when this run is cut to it (docs/cut.md).

    Args:
        at: cut the model during the run: an optimizer step, or a fraction of a Trainer's run in (0, 1). A plan is
            made from the run's last windows then, and the experts that it drops get no token any more. No weight is
            changed by that. None = never.
        keep: fraction of the experts that a plan keeps, that of the cut and the one that is measured.
        rank: what orders the experts in either, see :func:`~chronomoe_hf.lifecycle.plan_prune`.
        multiple_of: the number of experts that stay is a multiple of it.
    """

    at: int | float | None = None
    keep: float = 0.75
    rank: Literal["contribution", "reap", "frequency", "mean_norm", "phi", "random"] = "contribution"
    multiple_of: int = 1

    def _check(self) -> None:
        require(0.0 < self.keep < 1.0, f"lifecycle.cut.keep must be in (0, 1), got {self.keep}")
        positive("lifecycle.cut.multiple_of", self.multiple_of)
        step = isinstance(self.at, int) and self.at >= 1
        require(
            self.at is None or step or (isinstance(self.at, float) and 0.0 < self.at < 1.0),
            f"lifecycle.cut.at must be an optimizer step (1 or more) or a fraction of the run in (0, 1), got {self.at}",
        )


@dataclass(frozen=True, kw_only=True)
class ReviveConfig(ConfigBase):
    """Idle experts as copies of busy ones (docs/split.md).

    Args:
        at: ``"start"`` **rewrites idle experts** when training begins (not on a resume): copies of busy ones, see
            :func:`chronomoe_hf.lifecycle.plan_split`. Only ``ChronoConfig.revive()`` and configs built from parts.
        batches: training batches per process that it reads for that.
        idle: below this many fair shares of the tokens an expert is idle and is rewritten.
    """

    at: Literal["off", "start"] = "off"
    batches: int = 8
    idle: float = 0.5

    def _check(self) -> None:
        positive("lifecycle.revive.batches", self.batches)
        between("lifecycle.revive.idle", self.idle, 0.01, 0.99)


@takes_old_names
@dataclass(frozen=True, kw_only=True)
class LifecycleConfig(ConfigBase):
    """The lifecycle of experts: a dry run, and what is more than that where it is asked for (docs/lifecycle.md).

    The names of config schemas 1 to 3, which had no groups (``LifecycleConfig(cut_at=0.5, keep=0.75)``,
    ``config.lifecycle.keep``), still work; `renamed` says where each of them is now.

    Args:
        dry_run: which experts could go, merge or split.
        measuring: what a cut would cost, measured at evaluations.
        cut: which experts a plan keeps, and when the run is cut.
        revive: idle experts are rewritten when training begins.
        router_drift: record how far every expert's row of the router has moved since the model was wrapped, once a
            window. Off by default, because the rows of the start must be kept: as many bytes of host memory as the
            routers' weights have, and as much in every checkpoint. Unknown under FSDP and ZeRO-3, which shard them.
    """

    renamed: ClassVar[Mapping[str, str]] = {
        **{
            name: f"dry_run.{name}"
            for name in (
                "enabled",
                "prune_threshold",
                "starvation_threshold",
                "min_tokens",
                "coherence_tokens",
                "after_step",
                "confirmations",
                "merge_above",
                "split_above",
            )
        },
        "measure": "measuring.enabled",
        "measure_batches": "measuring.batches",
        "measure_controls": "measuring.controls",
        "cut_at": "cut.at",
        "keep": "cut.keep",
        "rank": "cut.rank",
        "multiple_of": "cut.multiple_of",
        "split": "revive.at",
        "split_batches": "revive.batches",
        "split_idle": "revive.idle",
    }

    dry_run: DryRunConfig = field(default_factory=DryRunConfig)
    measuring: MeasuringConfig = field(default_factory=MeasuringConfig)
    cut: CutConfig = field(default_factory=CutConfig)
    revive: ReviveConfig = field(default_factory=ReviveConfig)
    router_drift: bool = False
