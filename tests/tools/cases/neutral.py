"""Observing is neutral on quantised and patched models: `neutral.py KIND [FAMILY ...]`, every family by default.

KIND: 4-bit, 8-bit (bitsandbytes), int8 (torchao, weight-only), liger, fp8 (torch arithmetic in place of their Triton
kernels), mxfp4 (dequantised when it is loaded). Prints a JSON line a family: the outputs of the observed model are the
quantised model's own, bit for bit, and the counts those of a hook. Where the model cannot be made or run without us,
the line says so.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stand_ins import LigerArithmetic, replace_with_fp8
from support import moe_zoo
from support.family_checks import build, inputs
from torch import Tensor, nn

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of
from chronomoe_hf.config import CoherenceConfig

warnings.simplefilter("ignore")
logging.disable(logging.ERROR)
OBSERVE = ChronoConfig.observe(interval=1, coherence=CoherenceConfig(max_tokens=16))


class NotMade(Exception):
    """The library has no such model of this family; the words say why."""


# ---- ways to quantise ------------------------------------------------------------------------------------------------


def loaded(family: str, way: Any) -> Any:
    """Saved and loaded again with a quantization config."""
    plain = build(family)
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        return type(plain).from_pretrained(folder, quantization_config=way, device_map={"": "cpu"})


def four_bit(family: str) -> Any:
    from transformers import BitsAndBytesConfig

    model = loaded(family, BitsAndBytesConfig(load_in_4bit=True))
    return packed(model, lambda module: type(module).__name__ == "Linear4bit")


def eight_bit(family: str) -> Any:
    from transformers import BitsAndBytesConfig

    model = loaded(family, BitsAndBytesConfig(load_in_8bit=True))
    return packed(model, lambda module: type(module).__name__ == "Linear8bitLt")


def int8(family: str) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = loaded(family, TorchAoConfig(Int8WeightOnlyConfig()))
    return packed(model, lambda m: any(type(p.data).__name__ == "Int8Tensor" for p in m.parameters(recurse=False)))


def fp8(family: str) -> Any:
    model = build(family)
    routers = [name for name, module in model.named_modules() if chronomoe_hf.patches.match(module) is not None]
    # `weights_proj`: the indexer of DeepSeek-V3.2 rewrites that layer in its forward.
    model = replace_with_fp8(model, ["lm_head", "weights_proj", *routers], 8)
    return packed(model, lambda module: type(module).__name__ == "FP8Experts", "experts that FP8 replaces")


class LigerSiLU:
    """Of shared experts and dense layers."""

    @staticmethod
    def apply(gate: Any, up: Any, *rest: Any) -> Any:
        return nn.functional.silu(gate) * up


def liger(family: str) -> Any:
    import liger_kernel.transformers.swiglu as swiglu
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    swiglu.LigerFusedMoEFunction, swiglu.LigerSiLUMulFunction = LigerArithmetic, LigerSiLU
    kind = moe_zoo.build(family).config.model_type
    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(kind)
    if patch is None:
        raise NotMade("Liger has no patch for it")
    switches = {name: False for name, each in inspect.signature(patch).parameters.items() if each.default is not None}
    patch(**{name: name == "swiglu" for name in switches if name != "model"})
    return packed(build(family), lambda module: type(module).__name__ == "LigerExperts", "experts that Liger replaces")


def mxfp4(family: str) -> Any:
    from transformers import Mxfp4Config

    if family != "gpt_oss":
        raise NotMade("only gpt-oss is published in it")
    from safetensors.torch import load_file, save_file

    plain = build(family, hidden_size=64, intermediate_size=64)
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        file = Path(folder, "model.safetensors")
        tensors, generator = load_file(file), torch.Generator().manual_seed(0)
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, inner, outer = tensors.pop(name).shape
            shape = (experts, outer, inner // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(120, 126, shape, generator=generator, dtype=torch.uint8)
        save_file(tensors, file, {"format": "pt"})
        config = json.loads(Path(folder, "config.json").read_text())
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        Path(folder, "config.json").write_text(json.dumps(config))
        return type(plain).from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))


def experts4bit(family: str) -> Any:
    """experts4bit-qlora's loader: every experts module is one of its own, 4-bit weights under a LoRA."""
    from experts4bit_qlora import load_moe_4bit_streaming

    given = moe_zoo.FAMILIES[family]["tiny_config_kwargs"]
    plain = build(family, **{name: 64 for name in WIDTHS if name in given})  # it packs in blocks of 64
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        model = load_moe_4bit_streaming(folder, "cpu", torch.float32, 4, 8)[0]
    return packed(model, lambda module: type(module).__name__ == "ExpertsLoRA", "experts that it replaces")


WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size")


def packed(model: Any, is_packed: Callable[[nn.Module], bool], what: str = "a layer that it packs") -> Any:
    """The model, if anything in it was packed or replaced."""
    if not any(is_packed(module) for module in model.modules()):
        raise NotMade(f"it has not {what}")
    return model


KINDS = {
    "4-bit": four_bit,
    "8-bit": eight_bit,
    "int8": int8,
    "liger": liger,
    "fp8": fp8,
    "mxfp4": mxfp4,
    "experts4bit": experts4bit,
}


# ---- the check -------------------------------------------------------------------------------------------------------


def forward(model: Any) -> Tensor:
    torch.manual_seed(3)
    with torch.enable_grad():
        output = model(**inputs(model))
    value: Tensor = output.get("logits", output.get("last_hidden_state"))
    return value.detach()


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


def counting(system: Any, mask_T: Tensor) -> list[Tensor]:
    """Counts of real tokens that hooks on the routers fill."""
    counts = [torch.zeros(layer.num_experts, dtype=torch.int64) for layer in system.layers]
    for layer in system.layers:

        def hook(module: Any, args: Any, output: Any, layer: Any = layer) -> None:
            routing = layer.adapter.read(module, output)
            kept = torch.ones_like(routing.index_TK, dtype=torch.bool) if routing.kept_TK is None else routing.kept_TK
            real = kept & mask_T[:, None] if len(kept) == len(mask_T) else kept
            counts[layer.layer_id] += torch.bincount(routing.index_TK[real], minlength=layer.num_experts)

        layer.router.register_forward_hook(hook)
    return counts


def check(kind: str, family: str) -> dict[str, Any]:
    try:
        model = KINDS[kind](family).train()
        forward(model)  # bitsandbytes packs 8-bit weights in the first one
        want = forward(model)
    except Exception as error:
        why = str(error) if isinstance(error, NotMade) else f"{type(error).__name__}: {error}"
        return {"result": "native fails", "error": why.splitlines()[0][:160]}
    chronomoe_hf.wrap(model, OBSERVE)
    system = system_of(model)
    counts = counting(system, inputs(model)["attention_mask"].flatten().bool())
    got = forward(model)
    snapshot = system.step(1)
    assert snapshot is not None
    neutral = got.dtype == want.dtype and torch.equal(bits(got), bits(want))
    equal = [layer.expert_token_counts for layer in snapshot.layers] == [count.tolist() for count in counts]
    failed = [str(alert.detail) for alert in snapshot.alerts if alert.kind == "RECORDING_FAILED"]
    good = neutral and equal and not failed and any(bool(count.any()) for count in counts)
    return {
        "result": "ok" if good else "FAILED",
        "neutral": neutral,
        "counts": "EQUAL" if equal else "DIFFERENT",
        **({"alerts": failed} if failed else {}),
    }


def main() -> int:
    kind, families = sys.argv[1], sys.argv[2:] or moe_zoo.ROUTED
    bad = 0
    for family in families:
        try:
            line = check(kind, family)
        except Exception as error:
            line = {"result": "FAILED", "error": f"{type(error).__name__}: {error}"[:300]}
        bad += line["result"] == "FAILED"
        print(json.dumps({"case": f"{family}, {kind}", **line}), flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
