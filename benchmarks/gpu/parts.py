"""What benchmarks/gpu/run.py measures, part by part. Every part returns rows for the table."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu.base import (
    PRESETS,
    Bench,
    Row,
    Untouched,
    Wrapped,
    build,
    free,
    make_arm,
    make_batch,
    one_step,
    paired,
    ratios,
    sgd,
    synchronise,
)
from gpu.processes import ranks, suite

ROOT = Path(__file__).resolve().parents[2]
WINDOW, ACTING = 4, 6  # governance acts from step 5 on; step 6 closes no window (as in benchmarks/cost/launches.py)


def overhead(bench: Bench) -> list[Row]:
    """Time of a step over the untouched model's, steps of both in turn, windows closing on the way."""
    rows = []
    for tokens in bench.tokens:
        batch = make_batch(bench, tokens)
        for name in ("untouched, a copy", *PRESETS, "router logits", "hooks with .item()"):
            plain = build(bench)
            arms = [Untouched(plain), make_arm(copy.deepcopy(plain), name, bench)]
            rows.append({"tokens": tokens, "arm": name, **ratios(*paired(bench, arms, batch, 2 * bench.interval + 1))})
            del plain, arms
            free(bench)
    return rows


@contextlib.contextmanager
def sync_mode(bench: Bench, mode: str) -> Iterator[None]:
    """`torch.cuda.set_sync_debug_mode`; nothing on the CPU."""
    if bench.device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def syncs(bench: Bench) -> list[Row]:
    """Steps between windows: what waits for the GPU in forward and backward, and whether anything does in our step."""
    rows = []
    batch = make_batch(bench, bench.tokens[0])
    for name in ("untouched", *PRESETS, "router logits", "hooks with .item()"):
        arm = make_arm(build(bench), name, replace(bench, interval=WINDOW))
        optimizer = sgd(arm)
        for step in range(1, ACTING):
            one_step(arm, optimizer, batch, step)
        with warnings.catch_warnings(record=True) as seen, sync_mode(bench, "warn"):
            warnings.simplefilter("always")
            arm.forward(batch).backward()
        raised = ""
        with sync_mode(bench, "error"):
            try:
                arm.after(ACTING)
            except RuntimeError as error:
                raised = str(error).splitlines()[0]
        waits = sum("synchroniz" in str(each.message) for each in seen)
        rows.append({"arm": name, "waits_in_forward_and_backward": waits, "step_error": raised})
        del arm, optimizer
        free(bench)
    return rows


def _trained(bench: Bench, name: str, steps: int) -> tuple[list[float], list[Tensor]]:
    """Losses, and every weight and state tensor after `steps` steps, on the CPU."""
    arm = make_arm(build(bench, 2), name, bench)
    optimizer = sgd(arm)
    losses = [one_step(arm, optimizer, make_batch(bench, bench.tokens[0], step), step) for step in range(1, steps + 1)]
    tensors = [parameter.detach().cpu() for parameter in arm.model.parameters()]
    if isinstance(arm, Wrapped):
        state = arm.system.step_state
        tensors += [getattr(state, field).cpu() for field in state.NAMES]
    return [float(loss) for loss in losses], tensors


def equal_runs(bench: Bench) -> list[Row]:
    """Two runs of the same steps: losses, weights and state bit for bit; and the first loss against the untouched "
    "one."""
    rows, steps = [], 2 * bench.interval + 2
    first_loss = None
    for name in ("untouched", *PRESETS):
        (losses, tensors), (again, others) = (_trained(bench, name, steps) for _ in range(2))
        first_loss = losses[0] if first_loss is None else first_loss
        same = all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(tensors, others, strict=True))
        rows.append(
            {
                "arm": name,
                "steps": steps,
                "losses_equal": losses == again,
                "tensors_equal": same,
                "first_loss_as_untouched": losses[0] == first_loss,
            }
        )
        free(bench)
    return rows


def _forward_backward(arm: Untouched, batch: dict[str, Tensor]) -> None:
    arm.forward(batch).backward()


def _after(arm: Untouched, batch: dict[str, Tensor]) -> None:
    arm.after(ACTING)


def _on_gpu(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def _launches(bench: Bench, name: str, layers: int) -> tuple[int, int]:
    """Launches of forward with backward, and of the step between windows, from the profiler.

    On a GPU: kernels, copies and fills that ran on it. Elsewhere the operations, so that the path is the same.
    """
    arm = make_arm(build(bench, layers), name, replace(bench, interval=WINDOW))
    batch, optimizer, counts = make_batch(bench, bench.tokens[0]), sgd(arm), []
    for step in range(1, ACTING):
        one_step(arm, optimizer, batch, step)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.device == "cuda" else [])]
    for act in (_forward_backward, _after):
        synchronise(bench)
        with profile(activities=activities) as profiler:
            act(arm, batch)
            synchronise(bench)
        if bench.device == "cuda":
            found = [e for e in profiler.events() if _on_gpu(e)]
        else:
            found = [e for e in profiler.events() if e.name.startswith("aten::")]
        if not found and act is _forward_backward:
            raise RuntimeError("the profiler saw nothing run; is CUPTI there?")
        counts.append(len(found))
    del arm, optimizer
    free(bench)
    return counts[0], counts[1]


def launches(bench: Bench) -> list[Row]:
    """Launches that a layer and a step add, by the profiler; beside them the pretend device's count."""
    said = json.loads((ROOT / "benchmarks" / "results" / "launches.json").read_text(encoding="utf-8"))["runs"]
    pretend = {row["case"]: row for row in next(iter(said[list(said)[-1]].values()))["rows"]}
    few, many, rows = 1, 3, []
    plain = [_launches(bench, "untouched", layers) for layers in (few, many)]
    for name in ("untouched", *PRESETS):
        own = plain if name == "untouched" else [_launches(bench, name, layers) for layers in (few, many)]
        added = [a[0] - (0 if name == "untouched" else b[0]) for a, b in zip(own, plain, strict=True)]
        a_layer = (added[1] - added[0]) / (many - few)
        step_layer = (own[1][1] - own[0][1]) / (many - few)
        rows.append(
            {
                "arm": name,
                "per_layer": a_layer,
                "fixed": added[0] - few * a_layer,
                "step_per_layer": step_layer,
                "step_fixed": own[0][1] - few * step_layer,
                "pretend": {key: pretend[name][key] for key in ("forward_per_layer", "forward_fixed", "step_fixed")},
            }
        )
    return rows


def memory(bench: Bench) -> list[Row]:
    """Peak of a step, in bytes, and what wrapping adds to it."""
    rows: list[Row] = []
    for name in ("untouched", *PRESETS):
        arm = make_arm(build(bench), name, bench)
        batch, optimizer = make_batch(bench, bench.tokens[-1]), sgd(arm)
        for step in range(1, bench.interval + 2):
            if step == bench.interval and bench.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            one_step(arm, optimizer, batch, step)
        peak = torch.cuda.max_memory_allocated() if bench.device == "cuda" else 0
        rows.append({"arm": name, "peak": peak, "added": peak - (rows[0]["peak"] if rows else peak)})
        del arm, optimizer
        free(bench)
    return rows


class Compiled(Untouched):
    """An arm whose model is compiled."""

    def __init__(self, arm: Untouched, backend: str) -> None:
        super().__init__(arm.model)
        self.arm, self.compiled = arm, torch.compile(arm.model, fullgraph=True, backend=backend)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss."""
        return self.compiled(**batch).loss

    def after(self, step: int) -> None:
        """As the arm."""
        self.arm.after(step)


def compiled(bench: Bench) -> list[Row]:
    """`torch.compile(fullgraph=True)` of both models: time, and recompilations after the first windows."""
    rows = []
    bench = replace(bench, interval=min(bench.interval, 5), pairs=min(bench.pairs, 20))
    batch = make_batch(bench, bench.tokens[-1])
    for name in PRESETS:
        torch.compiler.reset()
        plain = build(bench, 2)
        arms: list[Untouched] = [
            Compiled(Untouched(plain), bench.backend),
            Compiled(make_arm(copy.deepcopy(plain), name, bench), bench.backend),
        ]
        warm = 2 * bench.interval + 2
        paired(replace(bench, pairs=1), arms, batch, warm)
        before = _frames()
        row = {"arm": name, **ratios(*paired(bench, arms, batch, 0)), "recompiled": _frames() - before}
        rows.append(row)
        del plain, arms
        free(bench)
    return rows


def _frames() -> int:
    from torch._dynamo.utils import counters

    return int(counters["frames"]["total"])


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "overhead": overhead,
    "syncs": syncs,
    "equal_runs": equal_runs,
    "launches": launches,
    "memory": memory,
    "compiled": compiled,
    "suite": suite,
    "ranks": ranks,
}
