"""Quantised checkpoints: `quantised.py bitsandbytes|torchao`. Families whose router holds an nn.Linear, and others.

Prints a JSON line a case. Observing must change no bit of logits and gradients, and count what a hook counts; the
default preset must train to the end and unwrap with a fold must say that nothing folds.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from typing import Any

import torch
from support import moe_zoo
from support.family_checks import inputs

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of
from chronomoe_hf.wrapping.weights import WAY_OUT, quantised_router

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
FAMILIES = ("hunyuan_v1_moe", "afmoe", "jetmoe", "dbrx", "nllb_moe", "mixtral", "qwen3_moe", "olmoe")
# bitsandbytes packs in blocks of 64 rows' worth of numbers: the tiny configs' widths are made that large.
WIDE = {"hidden_size": 64, "intermediate_size": 64}


def ways(library: str) -> dict[str, Any]:
    if library == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        return {
            "4-bit": BitsAndBytesConfig(load_in_4bit=True),
            "8-bit": BitsAndBytesConfig(load_in_8bit=True),
        }
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return {"int8 weight-only": TorchAoConfig(Int8WeightOnlyConfig())}


def load(family: str, way: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        plain = moe_zoo.build(family)
        plain.save_pretrained(folder)
        model = type(plain).from_pretrained(folder, quantization_config=way, device_map={"": "cpu"})
    return model.train()


def forward(model: Any) -> torch.Tensor:
    torch.manual_seed(3)
    output = model(**inputs(model))
    value: torch.Tensor = output.get("logits", output.get("last_hidden_state"))
    return value.detach()


def observe(family: str, way: Any) -> dict[str, Any]:
    try:
        native = load(family, way)
        want = forward(native)
    except Exception as error:
        return {"result": "native fails", "error": str(error)[:120]}
    model = load(family, way)
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    system = system_of(model)
    counts = [torch.zeros(layer.num_experts, dtype=torch.int64) for layer in system.layers]
    mask = inputs(model)["attention_mask"].flatten().bool()

    def counting(layer: Any) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            routing = layer.adapter.read(module, output)
            kept = torch.ones_like(routing.index_TK, dtype=torch.bool) if routing.kept_TK is None else routing.kept_TK
            real = kept & mask[:, None]
            counts[layer.layer_id] += torch.bincount(routing.index_TK[real], minlength=layer.num_experts)

        return hook

    for layer in system.layers:
        layer.router.register_forward_hook(counting(layer))
    got = forward(model)
    snapshot = system.step(1)
    assert snapshot is not None
    equal = [layer.expert_token_counts for layer in snapshot.layers] == [each.tolist() for each in counts]
    packed = sum(quantised_router(layer.adapter, layer.router) is not None for layer in system.layers)
    return {
        "result": "ok" if torch.equal(got, want) and equal and sum(map(int, map(sum, counts))) else "FAILED",
        "neutral": torch.equal(got, want),
        "counts": "EQUAL" if equal else "DIFFERENT",
        "routers_packed": packed,
        "coherence": any(layer.phi_fast is not None for layer in snapshot.layers)
        if hasattr(snapshot.layers[0], "phi_fast")
        else None,
        "alerts": [alert.kind for alert in snapshot.alerts if alert.kind == "RECORDING_FAILED"],
    }


def govern(family: str, way: Any) -> dict[str, Any]:
    """The default preset through some windows of a collapsed batch, then a fold: nothing computes with the codes."""
    try:
        model = load(family, way)
        forward(model)
    except Exception as error:
        return {"result": "native fails", "error": str(error)[:120]}
    try:
        chronomoe_hf.wrap(model, ChronoConfig.protect(interval=1))
    except chronomoe_hf.errors.UnsupportedArchitectureError as error:
        return {"result": "ok", "refused": str(error)[:80]}
    system = system_of(model)
    ids = torch.full((2, 16), 5)
    batch = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    for step in range(1, 13):
        model(**batch)
        system.step(step)
    packed = [layer for layer in system.layers if quantised_router(layer.adapter, layer.router)]
    lenses = [layer.layer_id for layer in packed if layer.handle.lens is not None]
    with tempfile.TemporaryDirectory() as folder:
        saved = system.save(folder)
    before = {name: value.clone() for name, value in stored(model).items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chronomoe_hf.unwrap(model, fold=True)
    said = [str(each.message) for each in caught if "nothing folds into the routers" in str(each.message)]
    told = len(said) == bool(packed) and all(WAY_OUT in each for each in said)
    after = stored(model)
    same = not packed or all(torch.equal(after[name], value) for name, value in before.items())
    return {
        "result": "ok" if not lenses and saved and told and same else "FAILED",
        "routers_packed": len(packed),
        "steps": 12,
        **({"said that nothing folds": told, "weights as before": same} if packed else {}),
    }


def stored(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model; of torchao's the codes, which can be compared."""
    state = model.state_dict().items()
    return {name: getattr(value, "qdata", value) for name, value in state if isinstance(value, torch.Tensor)}


def main() -> int:
    failed = 0
    for name, way in ways(sys.argv[1]).items():
        for family in FAMILIES:
            for part, check in (("observe", observe), ("protect, fold", govern)):
                try:
                    line = check(family, way)
                except Exception as error:
                    line = {"result": "FAILED", "error": f"{type(error).__name__}: {error}"[:300]}
                failed += line["result"] == "FAILED"
                print(json.dumps({"case": f"{family}, {name}, {part}", **line}), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
