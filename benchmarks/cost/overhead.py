"""What wrapping costs: training-step time of a wrapped model over the untouched one, and memory growth.

Both models have the same weights and live in one process. Steps alternate (A B, B A, A B, ...), so that a slow
moment of the machine hits both; the figure is the median of the paired ratios. `null` times the untouched model
against its own copy: the noise floor of the machine. Nothing here asserts a time.

    python benchmarks/cost/overhead.py [--shape d512-e32-k4 ...] [--preset observe ...] [--pairs 21] [--output DIR]
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.system import ChronoSystem


@dataclass(frozen=True)
class Shape:
    """Model and batch: D width, E experts, k per token, tokens = batch * length."""

    hidden: int
    experts: int
    top_k: int
    intermediate: int
    layers: int = 2
    batch: int = 8
    length: int = 256


SHAPES = {
    "d512-e32-k4": Shape(hidden=512, experts=32, top_k=4, intermediate=512),
    "d512-e128-k8": Shape(hidden=512, experts=128, top_k=8, intermediate=256),
    "d512-e32-k4-t256": Shape(hidden=512, experts=32, top_k=4, intermediate=512, batch=1),
}
GRAPHS = ("eager", "compiled")
PRESETS = ("null", "observe", "protect", "balance")


def build(shape: Shape, device: str) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE of that shape with a small vocabulary, in training mode."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        moe_intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    return Qwen3MoeForCausalLM(config).to(device).train()


class Arm:
    """One model, stepped and timed."""

    def __init__(
        self, model: Qwen3MoeForCausalLM, batch: dict[str, torch.Tensor], preset: str, interval: int, graph: str
    ) -> None:
        self.model, self.batch, self.steps = model, batch, 0
        self.system: ChronoSystem | None = None
        if preset not in ("untouched", "null"):
            chronomoe_hf.wrap(model, ChronoConfig.preset(preset, interval=interval))
            self.system = chronomoe_hf.system_of(model)
        self.forward = torch.compile(model) if graph == "compiled" else model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step(self) -> float:
        """Seconds of one optimizer step, our step included."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.forward(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.system is not None:
            self.system.step(self.steps)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def state_bytes(system: ChronoSystem | None) -> int:
    """Bytes of every tensor that wrapping added."""
    if system is None:
        return 0
    tensors = [
        getattr(system.step_state, name) for name in (*system.step_state.NAMES, "beta_full_LE", "beta_applied_LE")
    ]
    tensors += [part for parts in system.sums.parts.values() for part in parts.values()]
    for layer in system.layers:
        tensors += [*layer.recorder.held("train"), *layer.recorder.held("eval")]
        if layer.handle.lens is not None:
            tensors += [layer.handle.lens.V, layer.handle.lens.U]
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(shape: Shape, preset: str, graph: str, pairs: int, interval: int, device: str) -> dict[str, Any]:
    """Paired ratios of one preset at one shape, both models eager or both compiled."""
    torch.compiler.reset()
    plain = build(shape, device)
    ids = torch.randint(2, 512, (shape.batch, shape.length), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    arms = {"untouched": Arm(plain, batch, "untouched", interval, graph)}
    arms[preset] = Arm(copy.deepcopy(plain), batch, preset, interval, graph)
    for arm in arms.values():
        for _ in range(2 * interval + 1):  # past two closed windows, so that governance is active and compiled
            arm.step()
    ratios, base = [], []
    for pair in range(pairs):
        order = list(arms) if pair % 2 == 0 else list(reversed(arms))
        seconds = {name: arms[name].step() for name in order}
        ratios.append(seconds[preset] / seconds["untouched"])
        base.append(seconds["untouched"])
    quartiles = statistics.quantiles(ratios, n=4)
    added = state_bytes(arms[preset].system)
    parameters = sum(p.numel() * p.element_size() for p in plain.parameters())
    return {
        "preset": preset,
        "graph": graph,
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "untouched_s": round(statistics.median(base), 4),
        "state_bytes": added,
        "state_share_of_parameters": round(added / parameters, 6),
    }


def markdown(results: dict[str, Any]) -> str:
    """The table that is read; `results` as in the JSON."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# What wrapping costs",
        "",
        "Time of a training step (forward, backward, SGD step, `system.step`) of a wrapped Qwen3-MoE over the",
        "untouched one: two layers, 2,048 tokens (t256: 256), steps of both alternating in one process, median and",
        f"quartiles of {results['pairs']} paired ratios. A window closes every {results['interval']} steps here "
        "(default: 100), so that control is in the figure.",
        f"`null` is the untouched model against its own copy. {results['machine']}; {versions}. Written by",
        "`benchmarks/cost/overhead.py`, with `overhead.json`.",
        "",
        "| shape | graph | preset | median | quartiles | state added | share of parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["results"]:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['shape']} | {row['graph']} | {row['preset']} | {row['ratio_median']:.3f} | {low:.3f} - {high:.3f} "
            f"| {row['state_bytes']:,} bytes | {row['state_share_of_parameters']:.3%} |"
        )
    lines += [
        "",
        "Memory grows by that state and, while a forward runs, by what its tape holds (`launches.md`).",
        "A compiled graph fits the lens's reader in every step, an eager one in the",
        "last step of a window. Not timed here: backends without a place to read expert outputs (`eager`, Transformers",
        "before 5.20), where 64 tokens are sent through the experts once more.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument(
        "--graph", nargs="+", choices=GRAPHS, default=list(GRAPHS), help="eager, torch.compile, or both"
    )
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--interval", type=int, default=4, help="window during the measurement (default 4)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="directory for overhead.json and overhead.md")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), {options.device}",
        "pairs": options.pairs,
        "interval": options.interval,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shapes": {name: asdict(SHAPES[name]) for name in options.shape},
        "results": [],
    }
    for name in options.shape:
        for graph, preset in itertools.product(options.graph, options.preset):
            how = (preset, graph, options.pairs, options.interval, options.device)
            row = {"shape": name, **measure(SHAPES[name], *how)}
            results["results"].append(row)
            print(json.dumps(row), flush=True)
            gc.collect()
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "overhead.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (options.output / "overhead.md").write_text(markdown(results), encoding="utf-8")
        print(f"wrote {options.output / 'overhead.md'}")


if __name__ == "__main__":
    main()
