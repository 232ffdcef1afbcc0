"""DeepSeek-V2, V3 and V4 routers, and the families that share their code.

V2: softmax, best group by its best expert (arXiv:2405.04434). V3: sigmoid plus correction bias, best
groups by the sum of their two best (arXiv:2412.19437). V4: sqrt-softplus plus correction bias; its first layers route
by a table of token ids and make no choice.
"""

from __future__ import annotations

from chronomoe_hf.patches.registry import Adapter, ObserveOnly
from chronomoe_hf.patches.rules import EPS20, EPS20_BY_FLAG, GroupLimit, ScoreTopK

V2 = ScoreTopK(
    score="softmax32",
    sort=False,
    group=GroupLimit(reduce="max", fill=0.0, when=("topk_method", "group_limited_greedy"), fill_weights=True),
    scale="routed_scaling_factor",
)
V3 = ScoreTopK(score="sigmoid", sort=False, renorm=EPS20_BY_FLAG, group=GroupLimit(), scale="routed_scaling_factor")
V4 = ScoreTopK(score="@score_fn", sort=False, renorm=EPS20, scale="routed_scaling_factor")

_V2_ROUTERS = (
    ("deepseek_v2", "DeepseekV2TopkRouter"),
    ("deepseek_ocr2", "DeepseekOcr2TextTopkRouter"),
    ("unlimited_ocr", "UnlimitedOcrTextTopkRouter"),
)
_V3_ROUTERS = (
    ("deepseek_v3", "DeepseekV3TopkRouter"),
    ("deepseek_v32", "DeepseekV32TopkRouter"),
    ("axk1", "AXK1TopkRouter"),
    ("bailing_hybrid", "BailingHybridTopkRouter"),
    ("dots1", "Dots1TopkRouter"),
    ("dots3_note", "Dots3NoteTextTopkRouter"),
    ("exaone_moe", "ExaoneMoeTopkRouter"),
    ("glm4_moe", "Glm4MoeTopkRouter"),
    ("glm4_moe_lite", "Glm4MoeLiteTopkRouter"),
    ("glm4v_moe", "Glm4vMoeTextTopkRouter"),
    ("glm5_next", "Glm5NextTextTopkRouter"),
    ("glm_moe_dsa", "GlmMoeDsaTopkRouter"),
    ("hy_v4", "HYV4TopkRouter"),
    ("kimi_linear", "KimiLinearTopkRouter"),
    ("mimo_v2_flash", "MiMoV2FlashTopkRouter"),
    ("nemotron_h", "NemotronHTopkRouter"),
    ("solar_open", "SolarOpenTopkRouter"),
)

_HASH_REASON = (
    "the hash layers of deepseek_v4 look their experts up by token id: there is no choice that logits could move"
)

ADAPTERS = (
    *(Adapter(family=family, router_class=name, rule=V2) for family, name in _V2_ROUTERS),
    *(
        Adapter(family=family, router_class=name, rule=V3, bias_at="e_score_correction_bias")
        for family, name in _V3_ROUTERS
    ),
    Adapter(
        family="axk2",
        router_class="AXK2TopkRouter",
        rule=ScoreTopK(
            score="sigmoid", sort=False, renorm=EPS20_BY_FLAG, group=GroupLimit(fill=0.0), scale="routed_scaling_factor"
        ),
        bias_at="e_score_correction_bias",
    ),
    Adapter(
        family="beam",
        router_class="BeamTopKRouter",
        rule=ScoreTopK(score="sigmoid", renorm=EPS20_BY_FLAG, group=GroupLimit()),
        bias_at="e_score_correction_bias",
        notes="the routed scaling factor is applied by the block, after the experts",
    ),
    Adapter(
        family="deepseek_v4",
        router_class="DeepseekV4TopKRouter",
        rule=V4,
        bias_at="e_score_correction_bias",
    ),
    ObserveOnly(
        family="deepseek_v4",
        router_class="DeepseekV4HashRouter",
        rule=V4,
        by_token=True,
        refuse={"beta": _HASH_REASON, "lens": _HASH_REASON, "fold": _HASH_REASON, "replay": _HASH_REASON},
        notes="Transformers does not record the logits of hash layers",
    ),
)
