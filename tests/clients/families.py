"""The families whose checkpoints are served: tiny configs that engines accept, and what balances them.

Engines want head sizes and widths of their own, and read fields that the config classes of Transformers do not write
(``topk_method``, ``scoring_func``); real checkpoints have those fields.
"""

from __future__ import annotations

from typing import Any

VOCAB = 1024
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_E8 = {"num_experts": 8, "num_experts_per_tok": 2}
_LOCAL8 = {"num_local_experts": 8, "num_experts_per_tok": 2}
_SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 1, "topk_group": 1}

# family -> (Transformers' name, fields, how it is steered: "bias" by its own correction bias, "beta" by beta in the
# router's own bias, "lens" by a lens in the router's weight), experts that stay.
FAMILIES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "mixtral": ("Mixtral", {**_LOCAL8, "intermediate_size": 64}, "lens", 6),
    "qwen2_moe": ("Qwen2Moe", {**_E8, "shared_expert_intermediate_size": 64}, "lens", 5),
    "qwen3_moe": ("Qwen3Moe", {**_E8, "moe_intermediate_size": 128, "norm_topk_prob": True}, "lens", 6),  # 128: W4A16
    "olmoe": ("Olmoe", {**_E8, "intermediate_size": 64}, "lens", 5),
    "flex_olmo": ("FlexOlmo", {**_E8, "intermediate_size": 64}, "lens", 5),
    "granitemoe": ("GraniteMoe", {**_LOCAL8, "intermediate_size": 64}, "lens", 5),
    "granitemoeshared": (
        "GraniteMoeShared",
        {**_LOCAL8, "intermediate_size": 64, "shared_intermediate_size": 64},
        "lens",
        5,
    ),
    "gpt_oss": ("GptOss", {**_LOCAL8, "sliding_window": 128}, "beta", 5),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1",
        {"num_experts": 8, "intermediate_size": 64, "moe_topk": [2, 2, 2], "moe_intermediate_size": [64, 64, 64],
         "num_shared_expert": [1, 1, 1]},
        "lens",
        5,
    ),
    "glm4_moe": (
        "Glm4Moe",
        {**_SIGMOID, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1,
         "first_k_dense_replace": 1},
        "bias",
        12,
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**_SIGMOID, "n_routed_experts": 16, "num_experts_per_tok": 4, "first_k_dense_replace": 1, "n_group": 2,
         "topk_group": 1, "kv_lora_rank": 512, "q_lora_rank": 32, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64,
         "v_head_dim": 64, "head_dim": 64},
        "bias",
        12,
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {"moe_k": 2, "moe_num_experts": 8, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
        "bias",
        5,
    ),
    "exaone_moe": (
        "ExaoneMoe",
        {**_E8, "n_group": 1, "topk_group": 1, "num_shared_experts": 1, "sliding_window": 128,
         "scoring_func": "sigmoid",
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
         "mlp_layer_types": ["dense", "sparse", "sparse"]},
        "bias",
        5,
    ),
    "afmoe": (
        "Afmoe",
        {**_E8, "num_dense_layers": 1, "num_shared_experts": 1, "score_func": "sigmoid", "sliding_window": 128,
         "route_norm": True, "n_group": 1, "topk_group": 1, "mup_enabled": True},
        "bias",
        5,
    ),
    "minimax_m2": (
        "MiniMaxM2",
        {**_LOCAL8, "intermediate_size": 64, "scoring_func": "sigmoid", "rotary_dim": 64, "use_routing_bias": True},
        "bias",
        5,
    ),
}  # fmt: skip
KINDS = ("plain", "governed", "folded", "cut", "refitted")
PROMPT_TOKENS = 40
NUM_PROMPTS = 6
NEW_TOKENS = 16
