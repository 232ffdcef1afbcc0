"""One rank of the last part of benchmarks/gpu/run.py: the all-reduce of a step at large models' sizes, and equal state.

Legend: L layers, E experts.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support import gloo_exit

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from cost.launches import Shape, build
from cost.scale import MODELS, reduced_bytes

REPEATS = 20


def main() -> None:
    """``worker.py DEVICE OUTPUT``."""
    kind, output = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rows = []
    for model in MODELS:
        size = reduced_bytes(model.layers, model.experts)
        flat, seconds = torch.ones(size // 8, dtype=torch.float64, device=device), []
        for _ in range(REPEATS + 3):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(flat)
            flat[0].item()  # wait for it
            seconds.append(time.perf_counter() - start)
        median = round(1000 * statistics.median(seconds[3:]), 4)
        rows.append({"model": model.name, "processes": dist.get_world_size(), "bytes": size, "ms": median})
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(build(Shape(), 2).to(device), ChronoConfig.balance(interval=2)))
    for step in range(1, 5):
        ids = torch.randint(2, 64, (2, 32), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        system.model(input_ids=ids.to(device), labels=ids.to(device)).loss.backward()
        system.step(step)  # raises on every rank where state differs between ranks
    counted = sum(system.last_snapshot.layers[0].expert_token_counts)
    expected = 2 * dist.get_world_size() * 64 * Shape().top_k
    rows.append({"model": "state equal on all ranks; assignments", "counted": counted, "expected": expected})
    if dist.get_rank() == 0:
        output.write_text(json.dumps(rows), encoding="utf-8")
    gloo_exit.leave()


if __name__ == "__main__":
    main()
