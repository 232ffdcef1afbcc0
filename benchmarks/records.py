"""What records cost at scale: a long run of a wide model written through the real writer, then read by the commands.

    python benchmarks/records.py --windows 1000 --layers 48 --experts 128

Writes ``results/records.md``. Counts are random; times depend on the machine, sizes do not.
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

from chronomoe_hf.telemetry import (
    AlertHistory,
    RoutingEvent,
    SystemSnapshot,
    TelemetryWriter,
    next_attempt,
    run_manifest,
)

RESULTS = Path(__file__).resolve().parent / "results" / "records.md"
COMMAND = [sys.executable, "-c", "from chronomoe_hf.cli.main import main; main()"]
VECTORS = ("prob_mean", "phi_fast", "phi_mid", "phi_slow", "contribution", "saliency", "beta")


def write_run(directory: Path, windows: int, layers: int, experts: int, top_k: int) -> list[float]:
    """Write a run; returns the milliseconds that the writer took for each window."""
    generator = np.random.default_rng(0)
    history, times = AlertHistory(), []
    with TelemetryWriter("run", directory) as writer:
        writer.write_manifest(run_manifest(run_id="run", config={}, layers=[], model_class="RandomModel"))
        for step in range(1, windows + 1):
            events = [_event(step, layer, experts, top_k, generator) for layer in range(layers)]
            snapshot = SystemSnapshot.from_events(
                events=events, step=step, run_id="run", model_name="", n_layers=layers, alert_history=history
            )
            started = time.perf_counter()
            writer.write_many("routing_events", events)
            writer.write("snapshots", snapshot)
            writer.write_many("alerts", snapshot.alerts)
            times.append(1000 * (time.perf_counter() - started))
    return times


def _event(step: int, layer: int, experts: int, top_k: int, generator: np.random.Generator) -> RoutingEvent:
    counts = generator.integers(1000, 100_000, experts)
    return RoutingEvent.from_router_output(
        run_id="run",
        step=step,
        mode="TRAIN",
        layer_id=layer,
        used_capacity=counts,
        n_experts=experts,
        top_k=top_k,
        tokens=int(counts.sum()) // top_k,
        calls=100,
        phi_rows=counts // 100,
        total_tokens_seen=counts * step,
        **{name: generator.normal(size=experts) for name in VECTORS},
    )


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


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("windows", 1000), ("layers", 48), ("experts", 128), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        times = np.array(write_run(directory, options.windows, options.layers, options.experts, options.top_k))
        size = sum(path.stat().st_size for path in (directory / "chronomoe").iterdir())
        started = time.perf_counter()
        next_attempt(directory)
        attempt = 1000 * (time.perf_counter() - started)
        rows = [(name, *timed(name, place)) for name in ("tail", "report", "validate")]
        page = (directory / "report.html").stat().st_size
    median, high = np.median(times), np.quantile(times, 0.99)
    lines = [
        "# What records cost",
        "",
        f"{options.windows} windows of {options.layers} layers with {options.experts} experts each, by "
        f"`python benchmarks/records.py`, on {platform.machine()}, Python {platform.python_version()}; one "
        "thread of two cores that did other work too.",
        "",
        "| what | time | memory or size |",
        "| --- | --- | --- |",
        f"| write a window | median {median:.0f} ms, 99 % below {high:.0f} ms | {size / len(times) / 1e6:.2f} MB |",
        f"| find the next attempt | {attempt:.1f} ms | |",
        *(f"| `chronomoe {name}` | {seconds:.1f} s | {memory:.0f} MB |" for name, seconds, memory in rows),
        f"| the page that `report` writes | | {page / 1e6:.2f} MB |",
    ]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"peak memory of writing: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
