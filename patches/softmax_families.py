"""Families that score with a softmax over all experts, besides DeepSeek-V2.

Mixtral and MiniMax (fp32, always renormalised, weights stay fp32), Qwen (fp32, renormalised by flag or always), OLMoE,
FlexOlmo, Mellum (flag), Jamba (never renormalised), Hunyuan (fp32 linear), Mistral 4 (native-dtype softmax, groups),
Mistral Large 4 (fp32, groups), LongCat (native bias, identity experts), ERNIE 4.5 (native bias, clamped sum).
"""

from __future__ import annotations

from chronomoe_hf.patches.registry import Adapter
from chronomoe_hf.patches.rules import EPS20, EPS20_BY_FLAG, SOFTMAX_BY_FLAG, GroupLimit, Renorm, ScoreTopK

GROUPS = GroupLimit(reduce="top2", fill=0.0)
ALWAYS = ScoreTopK(score="softmax32", renorm=Renorm("sum"))

# Of one plain rule each: family, router class, rule.
_PLAIN = (
    ("mixtral", "MixtralTopKRouter", ALWAYS),
    ("minimax", "MiniMaxTopKRouter", ALWAYS),
    ("qwen2_moe", "Qwen2MoeTopKRouter", SOFTMAX_BY_FLAG),
    ("qwen3_moe", "Qwen3MoeTopKRouter", SOFTMAX_BY_FLAG),
    ("qwen3_next", "Qwen3NextTopKRouter", SOFTMAX_BY_FLAG),
    ("qwen4_exp", "Qwen4ExpTextTopKRouter", SOFTMAX_BY_FLAG),
    ("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextTopKRouter", SOFTMAX_BY_FLAG),
    ("qwen3_omni_moe", "Qwen3OmniMoeTalkerTextTopKRouter", SOFTMAX_BY_FLAG),
    ("qwen3_omni_moe", "Qwen3OmniMoeTextTopKRouter", ALWAYS),
    ("qwen3_5_moe", "Qwen3_5MoeTopKRouter", ALWAYS),
    ("qwen3_vl_moe", "Qwen3VLMoeTextTopKRouter", ALWAYS),
    ("olmoe", "OlmoeTopKRouter", SOFTMAX_BY_FLAG),
    ("flex_olmo", "FlexOlmoTopKRouter", SOFTMAX_BY_FLAG),
    ("mellum", "MellumTopKRouter", SOFTMAX_BY_FLAG),
)

ADAPTERS = (
    *(Adapter(family=family, router_class=router_class, rule=rule) for family, router_class, rule in _PLAIN),
    Adapter(family="jamba", router_class="JambaTopKRouter", rule=ScoreTopK(score="softmax32")),
    Adapter(
        family="hunyuan_v1_moe",
        router_class="HunYuanMoEV1Gate",
        rule=ScoreTopK(score="softmax32", renorm=Renorm("sum")),
        weight_at="wg.weight",
    ),
    Adapter(
        family="mistral4",
        router_class="Mistral4TopkRouter",
        rule=ScoreTopK(score="softmax", sort=False, renorm=EPS20_BY_FLAG, group=GROUPS, scale="routed_scaling_factor"),
    ),
    Adapter(
        family="mistral_large4",
        router_class="MistralLarge4TextTopkRouter",
        rule=ScoreTopK(score="softmax", sort=False, renorm=EPS20, group=GROUPS, scale="routed_scaling_factor"),
    ),
    Adapter(
        family="longcat_flash",
        router_class="LongcatFlashTopkRouter",
        rule=ScoreTopK(score="softmax", sort=False, scale="routed_scaling_factor"),
        num_experts_at="n_routed_experts",
        weight_at="classifier.weight",
        bias_at="e_score_correction_bias",
        experts_call="longcat",
        notes="ids from config.n_routed_experts on are identity experts; E counts them",
    ),
    *(
        Adapter(
            family=family,
            router_class=router_class,
            rule=ScoreTopK(score="softmax32", renorm=Renorm("clamp", eps="norm_min")),
            bias_at="moe_statics.e_score_correction_bias",
        )
        for family, router_class in (
            ("ernie4_5_moe", "Ernie4_5_MoeTopKRouter"),
            ("ernie4_5_vl_moe", "Ernie4_5_VLMoeMoeTopKRouter"),
        )
    ),
)
