"""Families that score each expert with a sigmoid and choose over all of them (no groups), most with a native bias."""

from __future__ import annotations

from chronomoe_hf.patches.registry import Adapter
from chronomoe_hf.patches.rules import EPS20, Renorm, ScoreTopK

ESB = "e_score_correction_bias"
HUNYUAN_V3 = ScoreTopK(score="sigmoid", sort=False, renorm=EPS20, scale="router_scaling_factor")
MINIMAX_M2 = ScoreTopK(score="sigmoid32", sort=False, renorm=Renorm("sum"))

_SOFTCAP = "laguna caps its logits with a tanh, so they are not linear in the router's input"
_MULTIPLIER = "muse_spark multiplies its logits by output_multiplier, so the router weight alone does not give them"

ADAPTERS = (
    Adapter(family="hy_v3", router_class="HYV3TopKRouter", rule=HUNYUAN_V3, bias_arg=ESB),
    Adapter(
        family="dots3_note",
        router_class="Dots3NoteVisionTopKRouter",
        rule=HUNYUAN_V3,
        bias_arg=ESB,
        notes="router of the vision tower: its rows are patches, not text tokens",
    ),
    Adapter(
        family="inkling2",
        router_class="Inkling2TopKRouter",
        rule=ScoreTopK(score="@score_fn", sort=False, renorm=EPS20, scale="routed_scaling_factor"),
        bias_at=ESB,
    ),
    Adapter(
        family="muse_spark",
        router_class="MuseSparkTopkRouter",
        rule=ScoreTopK(
            score="sigmoid",
            sort=False,
            renorm=Renorm("sum_eps", eps="norm_topk_prob_eps"),
            scale="routed_scaling_factor",
        ),
        bias_at=ESB,
        linear=False,
        refuse={"lens": _MULTIPLIER, "fold": _MULTIPLIER},
        notes="experts run in moe_hidden_size, between two projections of the block",
    ),
    Adapter(
        family="minimax_m2",
        router_class="MiniMaxM2TopKRouter",
        rule=MINIMAX_M2,
        bias_arg=ESB,
    ),
    Adapter(
        family="minimax_m3_vl",
        router_class="MiniMaxM3VLTopKRouter",
        rule=MINIMAX_M2,
        bias_at=ESB,
    ),
    Adapter(
        family="step3p7",
        router_class="Step3p7TopKRouter",
        rule=MINIMAX_M2,
        bias_at=ESB,
        experts_call="direct",
    ),
    Adapter(
        family="laguna",
        router_class="LagunaTopKRouter",
        rule=ScoreTopK(score="sigmoid32", renorm=Renorm("sum")),
        bias_at=ESB,
        linear=False,
        refuse={"lens": _SOFTCAP, "fold": _SOFTCAP},
    ),
    Adapter(
        family="lfm2_moe",
        router_class="Lfm2MoeTopKRouter",
        rule=ScoreTopK(
            score="sigmoid", renorm=Renorm("sum_eps", when="norm_topk_prob", eps=1e-6), scale="routed_scaling_factor"
        ),
        bias_arg="expert_bias",
        bias_when="use_expert_bias",
    ),
    Adapter(
        family="flint",
        router_class="FlintTopKRouter",
        rule=ScoreTopK(score="sigmoid32", renorm=Renorm("sum", when="norm_topk_prob")),
    ),
    Adapter(
        family="afmoe",
        router_class="AfmoeTokenChoiceRouter",
        rule=ScoreTopK(score="sigmoid32", renorm=EPS20, scale="route_scale"),
        weight_at="gate.weight",
        bias_arg="expert_bias",
    ),
)
