"""Launches and memory that recording adds at the widths of large models, at their own depth: counted, not timed.

A recorded forward without gradients on the pretend device (``tests/support/phantom.py``): what a training step's
forward adds, in a memory that holds a whole depth. Where a lens is open, a backward adds four a layer. Experts are
narrow and their weights are shared by all layers, which changes neither the router nor what is recorded: their outputs
are as wide as the model. Large tensors have a shape and no numbers (``phantom.shapes_only``): a count takes seconds.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from support import phantom
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

import chronomoe_hf
from chronomoe_hf import ChronoConfig

CASES = ("observe", "protect, lens open", "balance")


@dataclass(frozen=True)
class Width:
    """A model's MoE layers: D hidden, E experts, k per token, T tokens of a micro-batch, L layers."""

    name: str
    hidden: int
    experts: int
    top_k: int
    tokens: int
    layers: int


WIDTHS = (
    Width("Qwen3-30B-A3B, T 8192", 2048, 128, 8, 8192, 48),
    Width("Mixtral-8x22B", 6144, 8, 2, 1024, 56),
    Width("Qwen3-235B-A22B", 4096, 128, 8, 1024, 94),
    Width("DeepSeek-V3's widths", 7168, 256, 8, 1024, 58),
    Width("Mixtral-8x22B, T 8192", 6144, 8, 2, 8192, 56),
    Width("Qwen3-235B-A22B, T 8192", 4096, 128, 8, 8192, 94),
    Width("DeepSeek-V3's widths, T 8192", 7168, 256, 8, 8192, 58),
)


def build(width: Width, layers: int) -> Any:
    """A Qwen3-MoE in bf16 of these widths in evaluation mode, one set of expert weights for all layers."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=width.hidden,
        intermediate_size=8,
        moe_intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts_per_tok=width.top_k,
        num_experts=width.experts,
        use_cache=False,
    )
    with torch.device("meta"):
        model: Any = Qwen3MoeForCausalLM(config)
    model.to(torch.bfloat16)
    shared: dict[tuple[Any, ...], torch.nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            here = (".experts" in name, key, tuple(parameter.shape)) if ".experts" in name else (name, key)
            if here not in shared:
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                value.fill_(1.0) if "norm" in name else value.normal_(0.0, 0.02)
                shared[here] = torch.nn.Parameter(value, requires_grad=False)
            module._parameters[key] = shared[here]
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.set_experts_implementation("grouped_mm")
    return model.eval()


def on_device(model: Any) -> Any:
    """Parameters and buffers on the pretend device, shared ones once: ``model.to`` would copy them for every layer."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, value in held.items():
                if value is not None:
                    if id(value) not in moved:
                        there = phantom.to_device(value.detach())
                        is_weight = isinstance(value, torch.nn.Parameter)
                        moved[id(value)] = torch.nn.Parameter(there, requires_grad=False) if is_weight else there
                    held[key] = moved[id(value)]
    return model


def count(width: Width, layers: int, case: str) -> dict[str, int]:
    """Launches, host reads and peak bytes of one recorded forward of the decoder."""
    rows = max(1, width.tokens // 512)
    ids = torch.randint(2, 64, (rows, width.tokens // rows), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with phantom.device(), torch.no_grad():
        model = on_device(build(width, layers))
        batch = phantom.to_device({"input_ids": ids, "attention_mask": mask})
        short = {name: value[:1, :8] for name, value in batch.items()}
        if case == "untouched":
            model.model(**short)
            with phantom.shapes_only(), phantom.counting() as seen:
                model.model(**batch)
        else:
            chronomoe_hf.wrap(model, ChronoConfig.preset(case.split(",")[0], interval=1000))
            system = chronomoe_hf.system_of(model)
            with system.recording_eval():
                model.model(**short)  # state moves to the device
                if case != "observe":
                    steer(system, lens="lens open" in case)
                model.model(**short)
                with phantom.shapes_only(), phantom.counting() as seen:
                    model.model(**batch)
            faults = {layer.recorder.fault or layer.recorder.outputs_fault for layer in system.layers} - {None}
            if faults:
                raise RuntimeError(f"recording has failed, so that the count is none: {faults}")
    out = {"launches": seen.total, "reads": sum(seen.reads.values()), "peak": seen.peak}
    del model, batch
    gc.collect()
    return out


def steer(system: Any, lens: bool) -> None:
    """Beta acts in every layer, and a lens where asked for."""
    for layer in system.layers:
        state, generator = layer.handle.state, torch.Generator().manual_seed(layer.layer_id)
        value = torch.randn(layer.num_experts, generator=generator) * 0.1
        for tensor in (state.beta_full, state.beta_applied):
            tensor.copy_(phantom.to_device(value) if isinstance(tensor, phantom.PhantomTensor) else value)
        state.beta_on = True
        if lens:
            weight = layer.adapter.weight(layer.router)
            share = torch.arange(1, layer.num_experts + 1).double()
            mean = torch.randn(weight.shape[1], generator=generator)
            layer.handle.lens.aim(mean, weight.cpu(), share / share.sum(), 2.0)
            layer.handle.lens.set_scale(0.3)


def table(width: Width, cases: tuple[str, ...] = CASES) -> list[dict[str, Any]]:
    """What each case adds to the whole model and a layer, and the memory over the untouched model's own peak.

    The untouched model's launches are counted at two depths: they are the same in every layer.
    """
    few = {layers: count(width, layers, "untouched") for layers in (1, 2)}
    own_layer = few[2]["launches"] - few[1]["launches"]
    reads = few[2]["reads"]
    own = few[1]["launches"] + (width.layers - 1) * own_layer
    out = []
    for case in cases:
        seen = count(width, width.layers, case)
        added = seen["launches"] - own
        out.append(
            {
                "model": width.name,
                "case": case,
                "layers": width.layers,
                "launches": added,
                "a_layer": round(added / width.layers, 2),
                "reads": seen["reads"] - reads,
                "memory_mb": round((seen["peak"] - few[2]["peak"]) / 2**20, 1),
                "bound_mb": 64 + 3 * width.layers,
            }
        )
    return out
