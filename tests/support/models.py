"""One tiny model per first-class architecture, small enough for a forward in milliseconds.

Importable by every test (`from support import models`) and by the worker scripts of `tests/distributed`.

Legend: L layers, E experts, k experts per token; every family below has L = 2 MoE layers (Switch: 2 in the encoder
and 2 in the decoder), E = 8.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.mixtral import MixtralConfig, MixtralForCausalLM
from transformers.models.qwen2_moe import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.switch_transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

VOCAB = 64
NUM_EXPERTS = 8
# The routers' weights start at 0.02, where the eight logits nearly tie; 0.5 gives routing
# that differs between tokens, so a test that compares routings can fail.
INIT = 0.5

_BASE: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": INIT}
_ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
_QWEN: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
_SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 32}
_LINEAR: dict[str, Any] = {
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_SWITCH: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 32,
    "num_heads": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "num_experts": NUM_EXPERTS,
    "expert_capacity": 16,
    "dropout_rate": 0.0,
    "router_jitter_noise": 0.0,
    "decoder_start_token_id": 0,
}

FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, Any]]] = {
    "mixtral": (
        MixtralConfig,
        MixtralForCausalLM,
        {**_BASE, **_ATTENTION, "intermediate_size": 32, "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {**_BASE, **_ATTENTION, **_QWEN, **_SHARED}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**_BASE, **_ATTENTION, **_QWEN, "head_dim": 8}),
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM, {**_BASE, **_ATTENTION, **_QWEN, **_SHARED, **_LINEAR}),
    "qwen3_5_moe": (
        Qwen3_5MoeTextConfig,
        Qwen3_5MoeForCausalLM,
        {**_BASE, **_ATTENTION, **_QWEN, **_SHARED, **_LINEAR},
    ),
    "switch_transformers": (SwitchTransformersConfig, SwitchTransformersForConditionalGeneration, _SWITCH),
}


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The tiny configuration of `family`; `overrides` replace fields, e.g. ``num_experts_per_tok=1``."""
    config_class, _, fields = FAMILIES[family]
    return config_class(**{**fields, **overrides})


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, train: bool = True, **overrides: Any
) -> PreTrainedModel:
    """A tiny model of `family` on the CPU: the same weights for the same seed, `train()` mode unless told."""
    _, model_class, _ = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(tiny_config(family, **overrides)).to(dtype)
    return model.train(train)


def tiny_batch(family: str, *, batch: int = 4, length: int = 16, seed: int = 0, padded: bool = False) -> dict[str, Any]:
    """Inputs with labels for `tiny_model`: int64 [batch, length] below `VOCAB`.

    With `padded`, row b has its last b tokens masked (attention_mask 0, label -100).
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, batch):
            mask[row, -row:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    out = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}
    if family == "switch_transformers":
        out["decoder_attention_mask"] = mask
    return out
