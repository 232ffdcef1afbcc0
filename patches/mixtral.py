"""Mixtral and MiniMax: softmax in fp32, top-k, always renormalised, weights stay fp32."""

from __future__ import annotations

from chronomoe_hf.patches.registry import Adapter, module_of
from chronomoe_hf.patches.rules import Renorm, ScoreTopK

RULE = ScoreTopK(score="softmax32", renorm=Renorm("sum"))

ADAPTERS = tuple(
    Adapter(family=family, module=module_of(family), router_class=router_class, rule=RULE)
    for family, router_class in (("mixtral", "MixtralTopKRouter"), ("minimax", "MiniMaxTopKRouter"))
)
