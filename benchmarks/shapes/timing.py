"""What wrapping adds to a training step: one process, one set of weights, the arms in turns.

The arms are copies of a model that share its parameters, so that a model of billions of parameters is held once. In a
round every arm takes a step, in an order that changes; a figure is the median over rounds of an arm's step over the
untouched model's step of the same round. Time is processor time of the process, which another job on the machine moves
less than the clock.
"""

from __future__ import annotations

import copy
import gc
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from cost.records import write_run
from shapes.layouts import VOCABULARY, Layout, batch, build

AMORTISED = (10, 100)
"""Steps of a window over which its last step is spread: a short one, and the longest that `interval=None` gives."""


def twin(model: Any) -> Any:
    """A copy of the modules with the same parameters and buffers."""
    held = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in held})


def open_lenses(system: Any) -> int:
    """Open every lens, as a window that finds a starving expert does; how many there are."""
    num = 0
    for layer in system.layers:
        lens = layer.handle.lens
        if lens is None or not getattr(lens, "supported", True):
            continue
        weight = layer.adapter.weight(layer.router).detach().float()
        share = torch.arange(1, layer.num_experts + 1).double()
        mean = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(layer.layer_id))
        if lens.aim(mean, weight, share / share.sum(), 2.0) is None:
            lens.set_scale(0.3)
            num += 1
    return num


class Arm:
    """A model that is stepped and timed."""

    def __init__(self, model: Any, preset: str | None, interval: int) -> None:
        self.model, self.preset, self.steps, self.system = model, preset, 0, None
        self.wrap_s = 0.0
        if preset is not None:
            config = ChronoConfig.preset(preset, interval=interval)
            start = time.process_time()
            chronomoe_hf.wrap(model, config)
            self.wrap_s = time.process_time() - start
            self.system = chronomoe_hf.system_of(model)

    def step(self, rows: dict[str, torch.Tensor]) -> tuple[float, float]:
        """Processor seconds of a step: all of it, and of it `system.step`."""
        if self.preset == "protect" and self.steps:
            open_lenses(self.system)
        gc.collect()
        start = time.process_time()
        self.model(**rows).loss.backward()
        with torch.no_grad():  # plain SGD, in place
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-1e-4)
                    parameter.grad = None
        self.steps += 1
        middle = time.process_time()
        if self.system is not None:
            self.system.step(self.steps)
        end = time.process_time()
        return end - start, end - middle


def held_bytes(system: Any) -> int:
    """Bytes of every tensor that wrapping holds between forwards."""
    state = system.step_state
    tensors = [getattr(state, name) for name in (*state.NAMES, "beta_full_LE", "beta_applied_LE")]
    tensors += [part for parts in system.sums.parts.values() for part in parts.values()]
    for layer in system.layers:
        tensors += [*layer.recorder.held("train"), *layer.recorder.held("eval")]
        if layer.handle.lens is not None and hasattr(layer.handle.lens, "V"):
            tensors += [layer.handle.lens.V, layer.handle.lens.U]
    return sum(tensor.nbytes for tensor in tensors)


def measure(layout: Layout) -> list[dict[str, Any]]:
    """A row for every preset of a layout."""
    model, rows = build(layout), batch(layout)
    warm = twin(model)  # the first wrap of a process imports what it needs
    chronomoe_hf.wrap(warm, "observe")
    del warm
    arms = {"untouched": Arm(model, None, layout.interval)}
    for preset in layout.presets:
        arms[preset] = Arm(twin(model), preset, layout.interval)
    for _ in range(layout.interval):
        for arm in arms.values():
            arm.step(rows)
    seen: list[dict[str, tuple[float, float]]] = []
    for number in range(layout.rounds):
        order = random.Random(number).sample(list(arms), len(arms))
        seen.append({name: arms[name].step(rows) for name in order})
    out = [_row(layout, name, arms[name], seen) for name in layout.presets]
    del arms, model
    gc.collect()
    return out


def _row(layout: Layout, preset: str, arm: Arm, seen: list[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    last = [each for number, each in enumerate(seen, start=1) if number % layout.interval == 0]
    between = [each for number, each in enumerate(seen, start=1) if number % layout.interval]
    ratios = [each[preset][0] / each["untouched"][0] for each in between]
    closing = statistics.median(each[preset][0] / each["untouched"][0] for each in last)
    plain, ratio = statistics.median(each["untouched"][0] for each in seen), statistics.median(ratios)
    untouched = [each["untouched"][0] for each in seen]
    return {
        "model": layout.name,
        "shape": f"{layout.layers} x {layout.experts}, k {layout.top_k}",
        "tokens": layout.tokens,
        "dtype": layout.dtype,
        "preset": preset,
        "untouched_s": round(plain, 3),
        "untouched_spread": round(max(untouched) / min(untouched), 3),
        "ratio": round(ratio, 4),
        "ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "last_step": round(closing, 4),
        **{f"over_{steps}": round(((steps - 1) * ratio + closing) / steps, 4) for steps in AMORTISED},
        "step_ms": round(1000 * statistics.median(each[preset][1] for each in between), 2),
        "window_ms": round(1000 * statistics.median(each[preset][1] for each in last), 2),
        "wrap_ms": round(1000 * arm.wrap_s, 1),
        "held_mb": round(held_bytes(arm.system) / 2**20, 2),
    }


BASE: dict[str, int] = {"layers": 2, "experts": 32, "top_k": 4, "hidden": 128, "tokens": 1024}
GROWTH: dict[str, tuple[int, ...]] = {
    "layers": (1, 4, 16, 64),
    "experts": (8, 32, 128, 512),
    "top_k": (1, 4, 16),
    "hidden": (256, 1024, 4096),
    "tokens": (512, 2048, 8192),
}


def growing(**changed: int) -> Layout:
    """A Qwen3-MoE of the base shape with something changed."""
    size = {**BASE, **changed}
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": size["hidden"],
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "num_hidden_layers": size["layers"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": size["experts"],
        "num_experts_per_tok": size["top_k"],
        "use_cache": False,
    }
    return Layout("base", "qwen3_moe", size["layers"], size["experts"], size["top_k"], settings, tokens=size["tokens"])


def added_ms(layout: Layout, preset: str, rounds: int) -> tuple[float, float]:
    """Processor ms that a forward costs with a preset over the untouched model's, and the untouched model's own."""
    rows = batch(layout)
    model = build(layout)
    body = {name: rows[name] for name in ("input_ids", "attention_mask")}
    arms = {"untouched": Arm(model, None, 1000), preset: Arm(twin(model), preset, 1000)}
    if preset == "protect":
        open_lenses(arms[preset].system)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 2):
        for name in list(arms) if number % 2 else list(reversed(arms)):
            start = time.process_time()
            arms[name].model.model(**body)
            if number >= 2:
                times[name].append(1000 * (time.process_time() - start))
        arms[preset].system.step(number + 1)
    del arms, model
    gc.collect()
    added = [mine - plain for mine, plain in zip(times[preset], times["untouched"], strict=True)]
    return statistics.median(added), statistics.median(times["untouched"])


def growth(rounds: int = 11) -> list[dict[str, Any]]:
    """How what is added grows in each size, and the exponent from the last but one point to the last."""
    out = []
    for what, points in GROWTH.items():
        for preset in ("observe", "protect"):
            added, own = zip(*(added_ms(growing(**{what: point}), preset, rounds) for point in points), strict=True)
            factor = math.log(points[-1] / points[-2])
            out.append(
                {
                    "what": what,
                    "preset": preset,
                    "points": list(points),
                    "added_ms": [round(value, 2) for value in added],
                    "own_ms": [round(value, 2) for value in own],
                    "exponent": round(math.log(max(added[-1], 1e-3) / max(added[-2], 1e-3)) / factor, 2),
                    "own_exponent": round(math.log(own[-1] / own[-2]) / factor, 2),
                }
            )
    return out


def windows(counts: tuple[int, int] = (64, 256)) -> dict[str, Any]:
    """Processor ms of all windows of a short and of a long run of 8 x 64 experts that keeps records.

    A run's windows are its number times their median: one that another job has disturbed is not the run's.
    """
    total = []
    for count in counts:
        with tempfile.TemporaryDirectory() as directory:
            window_ms = write_run(Path(directory), count, 8, 64, 4)[:, :, 1].sum(-1)
            total.append(count * statistics.median(window_ms.tolist()))
    exponent = math.log(total[1] / total[0]) / math.log(counts[1] / counts[0])
    return {"points": list(counts), "ms": [round(value, 1) for value in total], "exponent": round(exponent, 2)}
