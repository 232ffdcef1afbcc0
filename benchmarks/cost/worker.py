"""One of two ranks of benchmarks/cost/run.py: every collective of `system.step`, counted while it runs.

Legend: L layers, E experts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support import gloo_exit

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from cost.launches import Shape, build

INTERVAL = 3


class Counted:
    """`torch.distributed.all_reduce` and `broadcast` of this process, with the bytes that they were given."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        for name in ("all_reduce", "broadcast"):
            setattr(dist, name, self._counting(getattr(dist, name)))

    def _counting(self, original: Any) -> Any:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes.append(tensor.numel() * tensor.element_size())
            return original(tensor, *args, **kwargs)

        return call


def measure(seen: Counted, shape: Shape, layers: int, preset: str) -> dict[str, Any]:
    """Bytes of every collective, of a step between windows and of one that closes a window."""
    torch.manual_seed(0)
    model = chronomoe_hf.wrap(build(shape, layers), ChronoConfig.preset(preset, interval=INTERVAL))
    system = chronomoe_hf.system_of(model)
    found: dict[str, Any] = {"layers": layers, "experts": shape.experts, "hidden": shape.hidden, "preset": preset}
    for step in range(1, 2 * INTERVAL + 1):
        ids = torch.randint(2, 64, (shape.batch, shape.length), generator=torch.Generator().manual_seed(step))
        seen.bytes.clear()
        model(input_ids=ids, labels=ids).loss.backward()
        system.step(step)
        found["window" if step % INTERVAL == 0 else "between"] = list(seen.bytes)
    return found


def main() -> None:
    """``worker.py OUTPUT CASES``: cases as JSON, each [layers, experts, hidden, preset]."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seen = Counted()
    rows = []
    for layers, experts, hidden, preset in json.loads(sys.argv[2]):
        shape = Shape(hidden=hidden, experts=experts, top_k=2, batch=2, length=32)
        rows.append(measure(seen, shape, layers, preset))
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(rows), encoding="utf-8")
    gloo_exit.leave()


if __name__ == "__main__":
    main()
