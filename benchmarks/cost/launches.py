"""What wrapping adds to a training step on an accelerator, in launches: counted on a pretend device, not timed.

A launch is an operation on the device that is neither a view nor a bare allocation (``tests/support/phantom.py``); the
figure is the same on every machine. What grows with the layers is told from what does not by running a Qwen3-MoE of
two and of six layers. ``forward`` is forward and backward of one micro-batch, over the untouched model; ``step`` is
``system.step`` between windows. Memory is the most bytes that are alive while the decoder's forward runs,
over the untouched model.

    python benchmarks/cost/launches.py [--tokens 1024 ...] [--output DIRECTORY] [--label after]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

import chronomoe_hf
from chronomoe_hf import ChronoConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # the pretend device lives with the tests
from support import phantom

LAYERS = (2, 6)
INTERVAL = 4


@dataclass(frozen=True)
class Shape:
    """Model and batch: D width, E experts, k per token, tokens = batch * length."""

    hidden: int = 64
    experts: int = 16
    top_k: int = 4
    batch: int = 4
    length: int = 256
    dtype: str = "float32"


SMALL = Shape()
LARGE = Shape(hidden=2048, experts=128, top_k=8, batch=16, length=512, dtype="bfloat16")
CASES = ("untouched", "observe", "protect", "protect, window's last step", "protect, lens open", "balance")


def build(shape: Shape, layers: int, native_bias: bool = False) -> Any:
    """A Qwen3-MoE (or, with a native correction bias, a DeepSeek-V3) of that shape in training mode."""
    torch.manual_seed(0)
    common = {
        "vocab_size": 64,
        "hidden_size": shape.hidden,
        "intermediate_size": 32,
        "moe_intermediate_size": 8 if shape.hidden > 512 else 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": shape.top_k,
        "use_cache": False,
    }
    if native_bias:
        config: Any = DeepseekV3Config(
            **{**common, "num_key_value_heads": 4},
            n_routed_experts=shape.experts,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=0,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            v_head_dim=8,
            qk_nope_head_dim=8,
        )
        model: Any = DeepseekV3ForCausalLM(config)
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, head_dim=16, num_experts=shape.experts))
    model.set_experts_implementation("grouped_mm")
    return model.to(getattr(torch, shape.dtype)).train()


def count(shape: Shape, layers: int, case: str, native_bias: bool = False) -> dict[str, Any]:
    """Launches, host reads and peak bytes of one micro-batch and of one step, once governance acts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (shape.batch, shape.length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with phantom.device():
        model = phantom.to_device(build(shape, layers, native_bias))
        batch = phantom.to_device({"input_ids": ids, "attention_mask": mask, "labels": ids})
        preset, system = case.split(",")[0], None
        if preset != "untouched":
            chronomoe_hf.wrap(model, ChronoConfig.preset(preset, interval=INTERVAL))
            system = chronomoe_hf.system_of(model)
        warm = INTERVAL + (3 if "last step" in case else 1)
        short = {name: rows[:1] for name, rows in batch.items()} if shape is LARGE else batch
        for step in range(1, warm + 1):  # only what is counted has the full length there
            if system is None and step > 1:
                break
            model(**short).loss.backward()
            if system is not None:
                system.step(step)
        if system is not None and "lens open" in case:
            open_lenses(system)
        model.zero_grad()
        with phantom.counting() as forward:
            loss = model(**batch).loss
        with phantom.counting() as backward:
            loss.backward()
        del loss
        with phantom.counting() as decoder:  # without the head, whose logits are the peak of a model this small
            model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        with phantom.counting() as stepping:
            if system is not None and "last step" not in case:
                system.step(warm + 1)
    return {
        "forward": forward.total + backward.total,
        "forward_reads": sum(forward.reads.values()) + sum(backward.reads.values()),
        "uploads": sum(forward.uploads.values()),
        "peak": decoder.peak,
        "step": stepping.total,
        "step_reads": sum(stepping.reads.values()),
    }


def open_lenses(system: Any) -> None:
    """Give every lens a basis and a scale, as a window that finds a starving expert does."""
    for layer in system.layers:
        lens = layer.handle.lens
        weight = layer.adapter.weight(layer.router)
        share = torch.arange(1, layer.num_experts + 1).double()
        generator = torch.Generator().manual_seed(layer.layer_id)
        lens.aim(torch.randn(weight.shape[1], generator=generator), weight.cpu(), share / share.sum(), 2.0)
        lens.set_scale(0.3)


def table(shape: Shape, native_bias: bool = False, layers: tuple[int, int] = LAYERS) -> list[dict[str, Any]]:
    """One row per case: what a layer adds, what is fixed, host reads, memory."""
    cases = ("untouched", "balance") if native_bias else CASES
    counted = {case: [count(shape, number, case, native_bias) for number in layers] for case in cases}
    few, many = layers
    plain = counted["untouched"]
    rows = []
    for case in cases:
        low, high = counted[case]
        own = case == "untouched"
        added = [one["forward"] - (0 if own else base["forward"]) for one, base in zip((low, high), plain, strict=True)]
        a_layer = (added[1] - added[0]) / (many - few)
        step_layer = (high["step"] - low["step"]) / (many - few)
        peak = [one["peak"] - (0 if own else base["peak"]) for one, base in zip((low, high), plain, strict=True)]
        peak_layer = (peak[1] - peak[0]) / (many - few)
        rows.append(
            {
                "case": case + (" (native bias, DeepSeek-V3)" if native_bias else ""),
                "forward_per_layer": round(a_layer, 2),
                "forward_fixed": round(added[0] - few * a_layer, 2),
                "forward_reads": high["forward_reads"] - (0 if own else plain[1]["forward_reads"]),
                "uploads": high["uploads"] - (0 if own else plain[1]["uploads"]),
                "step_per_layer": round(step_layer, 2),
                "step_fixed": round(low["step"] - few * step_layer, 2),
                "step_reads": high["step_reads"],
                "memory_per_layer_mb": round(peak_layer / 2**20, 2),
                "memory_fixed_mb": round((peak[0] - few * peak_layer) / 2**20, 2),
            }
        )
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The table that is read; `results` as in the JSON."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Launches that wrapping adds",
        "",
        "Counted on a pretend device (`tests/support/phantom.py`) by `benchmarks/cost/launches.py`, not timed and not",
        "measured on a GPU. A launch is an operation on the device that is neither a view nor a bare allocation. First",
        "forward and backward of one micro-batch over the untouched model (`untouched`: its own), then `system.step`",
        "between windows, then the memory that a decoder's forward needs at its peak, over the untouched model.",
        "The bounds that a test holds (12, 25 and 16 a layer, 150 fixed) are for the small shapes. At T 8192 a layer's",
        "sums fill the 64 MB that layers may take together, so that fewer layers share a launch.",
        f"{versions}.",
    ]
    for label, run in results["runs"].items():
        for name, part in run.items():
            lines += [
                "",
                f"## {label}: {name}",
                "",
                "| case | a layer | fixed | host reads | step: a layer | fixed | host reads | memory a layer | fixed |",
                "|---|---|---|---|---|---|---|---|---|",
            ]
            lines += [
                f"| {row['case']} | {row['forward_per_layer']:g} | {row['forward_fixed']:g} | {row['forward_reads']} "
                f"| {row['step_per_layer']:g} | {row['step_fixed']:g} | {row['step_reads']} "
                f"| {row['memory_per_layer_mb']:g} MB | {row['memory_fixed_mb']:g} MB |"
                for row in part["rows"]
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count and print; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", default="now", help="name of this run in the table")
    parser.add_argument(
        "--large", action="store_true", help="also T 8192, E 128, k 8, D 2048, bf16 (needs about 12 GB)"
    )
    parser.add_argument("--output", type=Path, help="directory for launches.json and launches.md; runs are added")
    options = parser.parse_args()
    run: dict[str, Any] = {}
    for name, shape, native in (
        ("T 1024, E 16, k 4, D 64", SMALL, False),
        ("T 1024, E 16, k 4, native bias", SMALL, True),
        *((("T 8192, E 128, k 8, D 2048, bf16", LARGE, False),) if options.large else ()),
    ):
        run[name] = {"shape": asdict(shape), "rows": table(shape, native, (2, 4) if shape is LARGE else LAYERS)}
        for row in run[name]["rows"]:
            print(json.dumps(row), flush=True)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / "launches.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": {}}
        results["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
        results["runs"][options.label] = run
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
