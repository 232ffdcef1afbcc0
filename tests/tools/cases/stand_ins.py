"""Liger's patched experts and FP8 experts, with torch arithmetic in the place of their Triton kernels."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from support import models as tiny

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of


class LigerArithmetic:
    """What Liger's fused kernel computes."""

    @staticmethod
    def apply(x: Any, gate_up: Any, down: Any, index: Any, weight: Any, *rest: Any) -> Any:
        gate, up = torch.einsum("td,tkod->tko", x, gate_up[index]).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        return torch.einsum("tki,tkdi,tk->td", inner, down[index], weight.to(x.dtype))


def liger() -> Any:
    """A Mixtral built after ``apply_liger_kernel_to_mixtral``; only its fused Triton function is replaced."""
    import liger_kernel.transformers.swiglu as swiglu
    from liger_kernel.transformers import apply_liger_kernel_to_mixtral

    swiglu.LigerFusedMoEFunction = LigerArithmetic
    apply_liger_kernel_to_mixtral(rope=False, rms_norm=False, cross_entropy=False, fused_linear_cross_entropy=False)
    model = tiny.tiny_model("mixtral")
    assert type(model.model.layers[0].mlp.experts).__name__ == "LigerExperts"
    return model


def replace_with_fp8(model: Any, kept: list[str], block: int) -> Any:
    """FP8 layers and experts in a model, but for `kept`, with torch arithmetic in place of their Triton kernels.

    Args:
        model: changed in place.
        kept: modules that stay as they are.
        block: rows and columns that share a scale.
    """
    import transformers.integrations.finegrained_fp8 as native
    from transformers import FineGrainedFP8Config

    def grouped(x: Any, w: Any, scale: Any, offsets: Any, num: Any, block: Any) -> Any:
        w, out, start = native._dequantize_fp8_weight(w, scale, block, x.dtype), x.new_zeros(x.shape[0], w.shape[1]), 0
        for expert, end in enumerate(offsets.tolist()):
            out[start:end] = x[start:end] @ w[expert].T
            start = end
        return out

    native.fp8_grouped_matmul = grouped
    native.fp8_linear = lambda x, w, s, block, bias=None, *rest: torch.nn.functional.linear(
        x, native._dequantize_fp8_weight(w, s, block, x.dtype), bias
    )
    blocks = FineGrainedFP8Config(weight_block_size=(block, block))
    native.replace_with_fp8_linear(model, modules_to_not_convert=kept, quantization_config=blocks)
    torch.manual_seed(0)
    for module in model.modules():  # the layers were made on the meta device
        for name, each in list(module._parameters.items()):
            if each is not None and each.is_meta:
                scale = name.endswith("scale_inv")
                value = torch.full(each.shape, 0.05) if scale else torch.randn(each.shape)
                setattr(module, name, torch.nn.Parameter(value.to(each.dtype), requires_grad=False))
    return model


def fp8() -> Any:
    model = tiny.tiny_model("qwen3_moe", hidden_size=64, moe_intermediate_size=64, intermediate_size=64, head_dim=16)
    return replace_with_fp8(model, ["lm_head", "gate", "self_attn"], 32)


def output_and_grads(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return {"logits": output.logits.detach(), **grads}


def check(name: str, make: Any) -> int:
    try:
        model = make()
    except Exception as error:
        print(json.dumps({"case": name, "result": "native fails", "error": f"{type(error).__name__}: {error}"[:200]}))
        return 0
    model.train()
    want = output_and_grads(model)
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    got = output_and_grads(model)
    snapshot = system_of(model).step(1)
    assert snapshot is not None
    neutral = all(torch.equal(got[key], want[key]) for key in want)
    phi = system_of(model).coherence(0).snapshot(1)
    ok = neutral and all(layer.tokens for layer in snapshot.layers) and bool(phi) and not snapshot.alerts
    line = {"neutral": neutral, "tokens": [layer.tokens for layer in snapshot.layers], "experts with phi": len(phi)}
    print(
        json.dumps(
            {"case": name, "result": "ok" if ok else "FAILED", **line, "alerts": list(map(str, snapshot.alerts))}
        )
    )
    return int(not ok)


if __name__ == "__main__":
    wanted = {"liger": liger, "fp8": fp8}
    sys.exit(sum(check(name, wanted[name]) for name in sys.argv[1:]))
