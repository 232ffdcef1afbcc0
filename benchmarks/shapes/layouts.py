"""Models of the layouts and widths of published ones, with random weights and a small vocabulary.

Shape suffixes: none; L MoE layers, E experts, k experts per token, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers

VOCABULARY = 512


@dataclass(frozen=True)
class Layout:
    """A model to be made.

    Args:
        name: in the table.
        family: the Transformers model type.
        layers: MoE layers.
        experts: E.
        top_k: k.
        settings: of its config.
        dtype: of its weights.
        tokens: of a micro-batch.
        lora: only LoRA adapters on the attention are trained.
        rounds: steps of every arm that are timed.
        interval: steps of a window.
        presets: what is compared with the untouched model.
    """

    name: str
    family: str
    layers: int
    experts: int
    top_k: int
    settings: dict[str, Any]
    dtype: str = "float32"
    tokens: int = 256
    lora: bool = False
    rounds: int = 6
    interval: int = 3
    presets: tuple[str, ...] = ("observe", "protect", "balance")


_NARROW: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "use_cache": False,
}
_LATENT: dict[str, Any] = {
    **_NARROW,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_nope_head_dim": 8,
}


def _narrow(name: str, family: str, layers: int, experts: int, top_k: int, **settings: Any) -> Layout:
    return Layout(name, family, layers, experts, top_k, {**_NARROW, **settings})


NARROW = (
    _narrow("Qwen3-30B-A3B", "qwen3_moe", 48, 128, 8, num_hidden_layers=48, num_experts=128, num_experts_per_tok=8,
            moe_intermediate_size=32, norm_topk_prob=True),
    _narrow("DeepSeek-V3", "deepseek_v3", 58, 256, 8, **{**_LATENT, "num_hidden_layers": 61, "first_k_dense_replace": 3,
            "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}),
    _narrow("Kimi-K2", "deepseek_v3", 60, 384, 8, **{**_LATENT, "num_hidden_layers": 61, "first_k_dense_replace": 1,
            "n_routed_experts": 384, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}),
    _narrow("gpt-oss-120b", "gpt_oss", 36, 128, 4, num_hidden_layers=36, num_local_experts=128, num_experts_per_tok=4),
    _narrow("Qwen3-Next", "qwen3_next", 48, 512, 10, num_hidden_layers=48, num_experts=512, num_experts_per_tok=10,
            moe_intermediate_size=32, shared_expert_intermediate_size=32, linear_num_value_heads=4,
            linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16),
    _narrow("Llama4-Maverick", "llama4_text", 24, 128, 1, num_hidden_layers=48, num_local_experts=128,
            num_experts_per_tok=1, interleave_moe_layer_step=2, intermediate_size_mlp=32),
    Layout("Switch-128", "switch_transformers", 12, 128, 1,
           {"vocab_size": VOCABULARY, "d_model": 64, "d_ff": 32, "d_kv": 16, "num_heads": 4, "num_layers": 12,
            "num_decoder_layers": 12, "num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6,
            "num_experts": 128, "decoder_start_token_id": 0, "use_cache": False}),
)  # fmt: skip
_REAL: dict[str, Any] = {"vocab_size": VOCABULARY, "use_cache": False}
_GRANITE: dict[str, Any] = {
    **_REAL, "vocab_size": 49155, "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 8,
    "tie_word_embeddings": True,
}  # fmt: skip
REAL = (
    Layout("Qwen3-30B-A3B, 1 layer", "qwen3_moe", 1, 128, 8,
           {**_REAL, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "norm_topk_prob": True, "num_hidden_layers": 1}, "bfloat16", 1024),
    Layout("OLMoE-1B-7B, 1 layer", "olmoe", 1, 64, 8,
           {**_REAL, "hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16,
            "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 1},
           "bfloat16", 1024),
    Layout("Mixtral-8x7B, 1 layer", "mixtral", 1, 8, 2,
           {**_REAL, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 1},
           "bfloat16", 1024, rounds=4, interval=2, presets=("observe", "protect")),
    Layout("granite-3.0-1b-a400m, LoRA", "granitemoe", 24, 32, 8, _GRANITE, "bfloat16", 1024, lora=True,
           rounds=8, interval=2, presets=("observe", "protect")),
    Layout("granite-3.0-1b-a400m, full", "granitemoe", 24, 32, 8, _GRANITE, "bfloat16", 1024,
           rounds=4, interval=2, presets=("observe", "protect")),
)  # fmt: skip


def build(layout: Layout) -> Any:
    """The model, in training mode."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(layout.family, **layout.settings)
    make: Callable[..., Any] = transformers.AutoModelForCausalLM.from_config
    if layout.family == "switch_transformers":
        make = transformers.SwitchTransformersForConditionalGeneration
    with _default_dtype(getattr(torch, layout.dtype)):
        model = make(config)
    if layout.lora:
        import peft

        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets))
    return model.train()


def batch(layout: Layout, tokens: int | None = None) -> dict[str, torch.Tensor]:
    """Random ids as inputs and labels, in rows of at most 512 tokens."""
    total = layout.tokens if tokens is None else tokens
    rows = max(1, total // 512)
    ids = torch.randint(2, VOCABULARY, (rows, total // rows), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
