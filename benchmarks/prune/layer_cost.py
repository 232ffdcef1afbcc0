"""What refitting one layer of a real model's shape takes on the CPU: seconds of one core, and peak memory."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

from chronomoe_hf.lifecycle import EvidenceSource, PlannedLayer, PrunePlan, layer_specs, refit

# Qwen3-30B-A3B: one of its 48 layers, in its own dtype.
SHAPE = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
LENGTH, FIT, CHECK = 2048, 8, 2  # tokens of a batch, batches to fit, batches to check on


def one_layer(shape: dict[str, int]) -> Qwen3MoeForCausalLM:
    """A bf16 Qwen3-MoE with one layer of that shape and random weights."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **shape,
        num_hidden_layers=1,
        vocab_size=4096,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=shape["hidden_size"] // 16,
        norm_topk_prob=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Qwen3MoeForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def layer_cost(shape: dict[str, int] | None = None, length: int = LENGTH) -> list[dict[str, Any]]:
    """Refit half of the experts of one layer on 16k random tokens (plus 4k to check on)."""
    shape = SHAPE if shape is None else shape
    model = one_layer(shape).eval()
    spec = layer_specs(model)[0]
    kept = tuple(range(0, spec.num_experts, 2))
    layer = PlannedLayer(spec=spec, kept=kept, scores=(0.0,) * spec.num_experts)
    plan = PrunePlan(layers=(layer,), rank="given", source=EvidenceSource(kind="calibration"))
    batches = [{"input_ids": torch.randint(0, 4096, (1, length))} for _ in range(FIT + CHECK)]
    before_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    wall, started = time.perf_counter(), time.process_time()
    report = refit(model, plan, batches, held_out=CHECK / (FIT + CHECK))
    return [
        {
            "layer": f"Qwen3-30B-A3B ({', '.join(f'{key} {value}' for key, value in shape.items())}, bf16, half kept)",
            "tokens": report.layers[0].tokens,
            "seconds": time.process_time() - started,
            "wall_seconds": time.perf_counter() - wall,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "before_gb": before_gb,
            "layer_error": [report.layers[0].error_before, report.layers[0].error_after],
        }
    ]
