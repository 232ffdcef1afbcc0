"""Qwen routers: softmax in fp32, top-k, renormalised by flag or always, cast to the dtype of the logits."""

from __future__ import annotations

from chronomoe_hf.patches.registry import Adapter, module_of
from chronomoe_hf.patches.rules import SOFTMAX_BY_FLAG, Renorm, ScoreTopK

ALWAYS = ScoreTopK(score="softmax32", renorm=Renorm("sum"))

_ROUTERS = (
    ("qwen2_moe", "Qwen2MoeTopKRouter", SOFTMAX_BY_FLAG),
    ("qwen3_moe", "Qwen3MoeTopKRouter", SOFTMAX_BY_FLAG),
    ("qwen3_next", "Qwen3NextTopKRouter", SOFTMAX_BY_FLAG),
    ("qwen4_exp", "Qwen4ExpTextTopKRouter", SOFTMAX_BY_FLAG),
    ("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextTopKRouter", SOFTMAX_BY_FLAG),
    ("qwen3_omni_moe", "Qwen3OmniMoeTalkerTextTopKRouter", SOFTMAX_BY_FLAG),
    ("qwen3_omni_moe", "Qwen3OmniMoeTextTopKRouter", ALWAYS),
    ("qwen3_5_moe", "Qwen3_5MoeTopKRouter", ALWAYS),
    ("qwen3_vl_moe", "Qwen3VLMoeTextTopKRouter", ALWAYS),
)

ADAPTERS = tuple(
    Adapter(family=family, module=module_of(family), router_class=router_class, rule=rule)
    for family, router_class, rule in _ROUTERS
)
