"""Several runs on one page: the same measures on the same axes, compared at the last step that all of them reached.

A difference is given in units of its error: between seeds of one config where there are several, else from how the
difference moves over the last steps (loss) or from the sampling error of the windows (experts in use). Where neither
is known, the difference is given without a judgement.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.errors import ConfigError, TelemetryError
from chronomoe_hf.report.data import RunData, pick
from chronomoe_hf.report.figures import Figure, series
from chronomoe_hf.report.verdict import judge
from chronomoe_hf.report.words import counted, listed
from chronomoe_hf.telemetry.baseline import ERRORS
from chronomoe_hf.telemetry.views import LayerView, Window

PAIRED = 10  # logged steps that the error of a difference of losses is taken from
_IGNORED = ("telemetry", "checkpoint", "interval", "schema_version", "contract")  # settings that make no other config


@dataclass(frozen=True)
class Difference:
    """One number of two runs, or of two groups of runs.

    Attributes:
        name: of the measure.
        one, other: what is compared.
        values: of `one` and `other`.
        error: standard error of the difference, None where it is not known.
        at_step: where both were read.
        code: of the measure, for machines.
    """

    name: str
    one: str
    other: str
    values: tuple[float, float]
    error: float | None
    at_step: int
    code: str = ""

    @property
    def difference(self) -> float:
        """`one` minus `other`."""
        return self.values[0] - self.values[1]

    @property
    def beyond(self) -> bool | None:
        """Whether it is larger than three errors; None where no error is known."""
        if self.difference == 0.0:
            return False
        return None if self.error is None else abs(self.difference) > ERRORS * self.error

    def sentence(self, form: str) -> str:
        """In words."""
        ends = f"{self.values[0]:{form}} against {self.values[1]:{form}} at step {self.at_step}"
        if self.difference == 0.0:
            return f"The {self.name} of {self.one} and {self.other} are equal ({ends})."
        how = f"{abs(self.difference):{form}} {'lower' if self.difference < 0 else 'higher'}"
        lead = f"The {self.name} of {self.one} is {how} than that of {self.other}"
        if self.error is None:
            return f"{lead} ({ends}; one run each, so its error is not known)."
        if not self.beyond:
            return f"{lead}, within its error of {self.error:{form}} ({ends})."
        times = math.inf if self.error == 0.0 else abs(self.difference) / self.error
        units = "" if math.isinf(times) else f", {times:.1f} times its error"
        return f"{lead}{units} ({ends})."

    def to_record(self) -> dict[str, Any]:
        """Strict-JSON dictionary."""
        return {
            "name": self.code,
            "runs": [self.one, self.other],
            "values": list(self.values),
            "difference": self.difference,
            "error": self.error,
            "at_step": self.at_step,
        }


@dataclass(frozen=True)
class Measure:
    """A number of a run over its steps.

    Attributes:
        code: for machines.
        title: for the plot.
        name: in sentences.
        form: format of a value.
        value: step -> value of a run.
        paired: losses: the error of a difference is taken from the last steps that both runs logged.
        optional: left out where it is 0 throughout.
    """

    code: str
    title: str
    name: str
    form: str
    value: Callable[[RunData], dict[int, float]]
    paired: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Comparison:
    """Several runs.

    Attributes:
        names: how they are called on the page.
        sentences: the differences in words, the lengths first.
        figure: the plot and its table.
        differences: of every run from the first, or of every group from the first group where there are groups.
        groups: config -> names of its runs.
    """

    names: tuple[str, ...]
    sentences: list[str]
    figure: Figure
    differences: list[Difference] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)


MEASURES = (
    Measure("eval_loss", "evaluation loss", "evaluation loss", ".3f", lambda run: dict(run.eval_loss), paired=True),
    Measure("training_loss", "training loss", "training loss", ".3f", lambda run: dict(run.loss), paired=True),
    Measure(
        "neff_mean", "mean Neff / E", "share of experts in effective use", ".3f", lambda run: _over(run, _mean_neff)
    ),
    Measure(
        "dead_experts",
        "dead experts",
        "number of dead experts",
        ".0f",
        lambda run: _over(run, lambda w: _sum(w, "dead_experts")),
    ),
    Measure(
        "max_violation_mean",
        "mean max violation",
        "violation (busiest expert over the mean, less 1)",
        ".3f",
        lambda run: _over(run, lambda window: _mean(window, lambda layer: layer.get("max_violation"))),
    ),
    Measure(
        "lens_open",
        "layers with an open lens",
        "number of layers with an open lens",
        ".0f",
        lambda run: {step: float(now.acting) for step, now in run.governing.items()},
        optional=True,
    ),
)


def compare(runs: Sequence[RunData]) -> Comparison:
    """Two runs or more, overlaid; every number is read at the last step that all of them reached.

    Raises:
        TelemetryError: one run is given twice.
    """
    _refuse_twice(runs)
    names = _names(runs)
    groups = _groups(runs, names)
    grouped = any(len(members) > 1 for members in groups.values()) and len(groups) > 1
    panels: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    differences: list[tuple[Difference, str]] = []
    steps = [run.windows[-1].step if run.windows else 0 for run in runs]
    for measure in MEASURES:
        values = [measure.value(run) for run in runs]
        if not any(values) or (measure.optional and not any(any(each.values()) for each in values)):
            continue
        panels.append(_panel(measure, names, values))
        if not all(values):
            continue
        at = min(max(each) for each in values)
        ends = [_at(each, at) for each in values]
        rows.append([measure.title, str(at), *(f"{end:{measure.form}}" for end in ends)])
        made = (
            _between_groups(measure, names, ends, groups, at)
            if grouped
            else _between_runs(measure, names, values, runs, ends, at)
        )
        differences += [(one, measure.form) for one in made]
    sentences = [_lengths(names, steps, runs)]
    if grouped:
        sentences.append("Runs of one config count as one group; errors are over its seeds.")
    sentences += [one.sentence(form) for one, form in differences if one.difference or one.name in _LOSSES]
    spec = {"kind": "lines", "x": [], "panels": panels, "marks": []} if panels else None
    title = " beside ".join(names) if len(names) < 4 else f"{len(names)} runs"
    head = ["at the last common step", "step", *names]
    figure = Figure("compare", title, " ".join(sentences), spec, head, rows)
    return Comparison(names, sentences, figure, [one for one, _ in differences], groups)


_LOSSES = ("evaluation loss", "training loss")


def verdicts_record(runs: Sequence[RunData], compared: Comparison, report: str | None) -> dict[str, Any]:
    """``{"runs": [verdict, ...], "differences": [...]}``, for machines."""
    return {
        "schema": 1,
        "runs": [{"name": name, **judge(run).to_record()} for name, run in zip(compared.names, runs, strict=True)],
        "groups": compared.groups,
        "differences": [one.to_record() for one in compared.differences],
        "report": report,
    }


def _refuse_twice(runs: Sequence[RunData]) -> None:
    seen: set[tuple[Path, str]] = set()
    for run in runs:
        key = (run.directory.resolve(), run.name)
        if key in seen:
            raise TelemetryError(f"{run.directory} is given twice; a run cannot be compared with itself")
        seen.add(key)


def _names(runs: Sequence[RunData]) -> tuple[str, ...]:
    names = [run.directory.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({run.name[:8]})" for name, run in zip(names, runs, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name}, {at}" for at, name in enumerate(names, 1)]
    return tuple(names)


def _groups(runs: Sequence[RunData], names: Sequence[str]) -> dict[str, list[str]]:
    """Runs by config: those of one config are seeds of one another."""
    keys: dict[str, list[str]] = {}
    labels: dict[str, str] = {}
    for run, name in zip(runs, names, strict=True):
        config = {part: value for part, value in _todays(run.config).items() if part not in _IGNORED}
        key = json.dumps([run.model, config], sort_keys=True)
        contract = run.config.get("contract")
        labels.setdefault(key, contract if isinstance(contract, str) else name)
        keys.setdefault(key, []).append(name)
    out: dict[str, list[str]] = {}
    for key, members in keys.items():
        label = labels[key] if labels[key] not in out else f"{labels[key]} ({members[0]})"
        out[label] = members
    return out


def _todays(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recorded config by the names of today: runs of several versions compare. As it is where that cannot be."""
    try:
        return ChronoConfig.from_dict(config).to_dict()
    except ConfigError:
        return config


def _between_groups(
    measure: Measure, names: Sequence[str], ends: Sequence[float], groups: dict[str, list[str]], at: int
) -> list[Difference]:
    value = dict(zip(names, ends, strict=True))
    means, errors = {}, {}
    for label, members in groups.items():
        own = [value[name] for name in members]
        means[label] = statistics.fmean(own)
        errors[label] = statistics.stdev(own) / math.sqrt(len(own)) if len(own) > 1 else None
    first, *others = groups
    out = []
    for label in others:
        # One run alone has the scatter of the other group's runs.
        known = [error for error in (errors[first], errors[label]) if error is not None]
        sizes = [len(groups[first]), len(groups[label])]
        error = None
        if len(known) == 2:
            error = math.hypot(*known)
        elif known:
            spread = known[0] * math.sqrt(max(sizes))
            error = math.hypot(known[0], spread)
        of = [f"{name} (n = {size})" for name, size in zip((label, first), (sizes[1], sizes[0]), strict=True)]
        out.append(Difference(measure.name, of[0], of[1], (means[label], means[first]), error, at, measure.code))
    return out


def _between_runs(
    measure: Measure,
    names: Sequence[str],
    values: Sequence[dict[int, float]],
    runs: Sequence[RunData],
    ends: Sequence[float],
    at: int,
) -> list[Difference]:
    out = []
    for other in range(1, len(runs)):
        error = (
            _paired_error(values[0], values[other], at)
            if measure.paired
            else _window_error(measure, runs[0], runs[other], at)
        )
        pair = (ends[0], ends[other])
        out.append(Difference(measure.name, names[0], names[other], pair, error, at, measure.code))
    return out


def _paired_error(one: dict[int, float], other: dict[int, float], at: int) -> float | None:
    """Standard deviation of the difference from one logged step to the next, over the last common ones."""
    common = sorted(step for step in one.keys() & other.keys() if step <= at)[-PAIRED:]
    if len(common) < 3:
        return None
    apart = [one[step] - other[step] for step in common]
    moves = [abs(b - a) for a, b in itertools.pairwise(apart)]
    return statistics.fmean(moves) / 1.128  # mean absolute difference of two normal draws


def _window_error(measure: Measure, one: RunData, other: RunData, at: int) -> float | None:
    """Error of the mean Neff / E of two windows, from the sampling error that their layers carry."""
    if measure.title != "mean Neff / E":
        return None
    parts = []
    for run in (one, other):
        window = next((each for each in reversed(run.windows) if each.step <= at), None)
        if window is None:
            return None
        own = [
            layer.error["n_effective"] / layer.num_choices
            for layer in window.layers
            if "n_effective" in layer.error and layer.num_choices
        ]
        if not own:
            return None
        parts.append(math.sqrt(sum(error**2 for error in own)) / len(own))
    return math.hypot(*parts)


def _lengths(names: Sequence[str], steps: Sequence[int], runs: Sequence[RunData]) -> str:
    each = listed([f"{name} has {step} steps" for name, step in zip(names, steps, strict=True)], most=8)
    if len(set(steps)) == 1:
        return f"{counted(len(runs), 'run')} of {steps[0]} steps each."
    return f"{each}; all are compared at their last common step."


def _panel(measure: Measure, names: Sequence[str], values: Sequence[dict[int, float]]) -> dict[str, Any]:
    steps = sorted({step for each in values for step in each})
    known = [value for each in values for value in each.values()]
    low = min(known) if measure.paired else 0.0
    lines = [
        series(name, [each.get(step, math.nan) for step in steps]) for name, each in zip(names, values, strict=True)
    ]
    return {"title": measure.title, "low": low, "high": max(*known, low + 1e-3), "x": steps, "series": lines}


def _at(values: dict[int, float], step: int) -> float:
    """The newest value at or before `step`; the first one where none is so early."""
    before = [known for known in values if known <= step]
    return values[max(before)] if before else values[min(values)]


def _over(run: RunData, value: Callable[[Window], float | None]) -> dict[int, float]:
    return {window.step: known for window in pick(run.windows) if (known := value(window)) is not None}


def _mean_neff(window: Window) -> float | None:
    return _mean(window, lambda layer: layer.neff_fraction)


def _mean(window: Window, value: Callable[[LayerView], float | None]) -> float | None:
    known = [number for layer in window.layers if (number := value(layer)) is not None]
    return sum(known) / len(known) if known else None


def _sum(window: Window, name: str) -> float | None:
    known = [number for layer in window.layers if (number := layer.get(name)) is not None]
    return sum(known) if known else None
