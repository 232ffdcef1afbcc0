"""What records cost at scale: a long run of a wide model written through the real writer, then read by the commands.

    python benchmarks/cost/records.py --windows 1000 --layers 48 --experts 128 [--output DIRECTORY]

Writes ``records.md``. Counts are random; times depend on the machine, sizes do not.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoSystem
from chronomoe_hf.telemetry import next_attempt
from chronomoe_hf.window.host import Moment

RESULTS = Path(__file__).resolve().parents[1] / "results"
COMMAND = [sys.executable, "-c", "from chronomoe_hf.cli.main import main; main()"]
PARTS = ("events", "summary", "records")


def write_run(directory: Path, windows: int, layers: int, experts: int, top_k: int) -> np.ndarray:
    """Write a run.

    Returns:
        Milliseconds ``(windows, parts, 2)``: of PARTS, first by the clock, then of processor time.
    """
    system = wide_system(layers, experts, top_k)
    system.open_telemetry(directory)
    generator, spread = torch.Generator().manual_seed(0), dict.fromkeys(range(layers), 1.0)
    times = []
    for step in range(1, windows + 1):
        fill(system, generator)
        host = system.step_state.host()
        at = Moment(system.run_id, step, window_steps=1, governed=True, step_ms=1.0)
        marks = [_now()]
        events = system.host.events(at, host, spread=spread)
        marks.append(_now())
        snapshot = system.host.summarise(at, events, host, system.alerts)
        marks.append(_now())
        system.records.window(events, snapshot)
        marks.append(_now())
        times.append(1000.0 * np.diff(np.array(marks), axis=0))
    system.close_telemetry()
    return np.array(times)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def wide_system(layers: int, experts: int, top_k: int) -> ChronoSystem:
    """A wrapped Qwen3-MoE with that many routers, and as narrow as can be in everything else."""
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        moe_intermediate_size=4,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=experts,
        num_experts_per_tok=top_k,
    )
    model = Qwen3MoeForCausalLM(config).train()
    chronomoe_hf.wrap(model, ChronoConfig.protect())
    return chronomoe_hf.system_of(model)


def fill(system: ChronoSystem, generator: torch.Generator) -> None:
    """The state of a window's end, with random numbers in every column."""
    state, row = system.step_state, system.step_state.row
    window_LR, shape = state.window_LR, state.beta_LE.shape
    window_LR.copy_(100.0 * torch.rand(window_LR.shape, generator=generator, dtype=torch.float64))
    count_LE = torch.randint(1000, 100_000, shape, generator=generator)
    row.count(window_LR).copy_(count_LE)
    row.expert(window_LR, "phi_rows").copy_(count_LE // 100)
    for name, value in (("tokens", count_LE.sum(-1) // system.layers[0].top_k), ("dropped", 0), ("nonfinite", 0)):
        row.meta(window_LR, name).copy_(torch.as_tensor(value))
    row.meta(window_LR, "calls").fill_(100.0)
    state.tokens_LE.add_(count_LE)
    state.updates_LE.add_(1)
    state.ema_CLE.copy_(0.3 * torch.randn(state.ema_CLE.shape, generator=generator, dtype=torch.float64))
    state.beta_LE.copy_(0.1 * torch.randn(shape, generator=generator))


def timed(*arguments: str) -> tuple[float, float]:
    """Seconds and the largest resident memory (MB) of a command."""
    started = time.perf_counter()
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMAND, *arguments], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - started, int(done.stdout) / 1024


def part_row(name: str, times: np.ndarray) -> str:
    """Median and 99th percentile of one part; `times` are ``(windows, 2)``."""
    cells = (f"{np.quantile(times[:, clock], level):.1f} ms" for clock in (0, 1) for level in (0.5, 0.99))
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("windows", 1000), ("layers", 48), ("experts", 128), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        times = write_run(directory, options.windows, options.layers, options.experts, options.top_k)
        size = sum(path.stat().st_size for path in (directory / "chronomoe").iterdir())
        started = time.perf_counter()
        next_attempt(directory)
        attempt = 1000 * (time.perf_counter() - started)
        rows = [(name, *timed(name, place)) for name in ("tail", "report", "validate")]
        page = (directory / "report.html").stat().st_size
    lines = [
        "# What records cost",
        "",
        f"{options.windows} windows of {options.layers} layers with {options.experts} experts each, by "
        f"`python benchmarks/cost/records.py`, on {platform.machine()}, Python {platform.python_version()}; one "
        "thread of two cores that did other work too. `events` is from the transferred state to one event a layer, "
        "`summary` the snapshot with its alerts, `records` what is written.",
        "",
        "| a window | clock: median | 99 % below | processor: median | 99 % below |",
        "| --- | --- | --- | --- | --- |",
        *(part_row(name, times[:, at]) for at, name in enumerate(PARTS)),
        part_row("all", times.sum(1)),
        "",
        "| what | time | memory or size |",
        "| --- | --- | --- |",
        f"| records of a window | | {size / len(times) / 1e6:.2f} MB |",
        f"| find the next attempt | {attempt:.1f} ms | |",
        *(f"| `chronomoe {name}` | {seconds:.1f} s | {memory:.0f} MB |" for name, seconds, memory in rows),
        f"| the page that `report` writes | | {page / 1e6:.2f} MB |",
    ]
    (options.output / "records.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"peak memory of writing: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
