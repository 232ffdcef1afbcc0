"""Every family of Transformers in a whole model: observing is exact, counts and phi are right, beta acts.

`moe_zoo` builds the tiny models, `family_checks` says what must hold; the routers alone are tested in `tests/patches`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import moe_zoo
from support.family_checks import (
    NO_BETA,
    NO_COHERENCE,
    OBSERVE,
    assert_identical,
    build,
    check_beta,
    check_observing,
    check_phi,
    output_and_grads,
    wrapped,
)
from support.moe_zoo import FAMILIES, ROUTED

import chronomoe_hf
from chronomoe_hf.errors import ContractError, UnsupportedArchitectureError

FAST = ("deepseek_v3", "gpt_oss", "ernie4_5_moe", "dbrx", "llama4", "jetmoe")
EVERY = [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in ROUTED]

# Rule -> variants of its families: other E and k, norms on and off, groups, shared experts, capacity.
VARIANTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "softmax": [
        ("qwen3_moe", {"num_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": False}),
        ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 1}),
        ("qwen2_moe", {"num_experts": 6, "num_experts_per_tok": 4, "norm_topk_prob": True}),
        ("qwen2_moe", {"shared_expert_intermediate_size": 8, "num_experts": 12}),
        ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3}),
        ("deepseek_v2", {"topk_method": "greedy", "n_routed_experts": 12, "num_experts_per_tok": 3}),
        ("deepseek_v2", {"n_group": 4, "topk_group": 2, "n_shared_experts": 2}),
        ("ernie4_5_moe", {"moe_num_experts": 10, "moe_k": 3}),
    ],
    "sigmoid": [
        ("deepseek_v3", {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
        ("deepseek_v3", {"n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 1}),
        ("glm4_moe", {"n_routed_experts": 6, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1}),
        ("deepseek_v3", {"routed_scaling_factor": 2.5, "n_shared_experts": 2}),
    ],
    "topk_squash": [
        ("gpt_oss", {"num_local_experts": 5, "num_experts_per_tok": 3}),
        ("gpt_oss", {"num_local_experts": 16, "num_experts_per_tok": 1}),
        ("granitemoe", {"num_local_experts": 6, "num_experts_per_tok": 4}),
        ("granitemoe", {"num_local_experts": 3, "num_experts_per_tok": 3}),
        ("granitemoeshared", {"num_local_experts": 12, "num_experts_per_tok": 2}),
    ],
    "inkling": [
        ("inkling", {"n_routed_experts": e, "num_experts_per_tok": k})
        for e, k in ((4, 1), (6, 3), (12, 2), (16, 4), (5, 2))
    ],
    "sparsemixer": [("phimoe", {"num_local_experts": e}) for e in (3, 4, 6, 12, 16)],
    "switch": [
        ("switch_transformers", {"num_experts": e, "expert_capacity": c})
        for e, c in ((2, 3), (3, 64), (8, 1), (12, 2), (5, 4))
    ],
}
VARIED = [
    pytest.param(family, fields, marks=pytest.mark.slow, id=f"{rule}-{index}-{family}")
    for rule, variants in VARIANTS.items()
    for index, (family, fields) in enumerate(variants)
]


@pytest.mark.parametrize("family", EVERY)
def test_observing_is_exact_and_counts_are_right(family: str) -> None:
    check_observing(family, build(family))


@pytest.mark.parametrize("family", EVERY)
def test_observing_is_exact_in_bf16(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    want = output_and_grads(model)
    system = wrapped(model, OBSERVE)
    assert_identical(output_and_grads(model), want)
    system.step(1)
    assert all(
        sum(layer.expert_token_counts) > 0 for layer in system.snapshot().layers if "vision" not in layer.layer_name
    )


@pytest.mark.parametrize("family", EVERY)
def test_phi_equals_the_definition(family: str) -> None:
    check_phi(family, build(family))


@pytest.mark.parametrize("family", EVERY)
def test_beta_raises_an_experts_count(family: str) -> None:
    check_beta(family, build(family))


@pytest.mark.parametrize(("family", "fields"), VARIED)
def test_variants_of_every_rule(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = build(family, **fields)
    check_observing(family, model)
    model.save_pretrained(tmp_path)
    check_observing(family, type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).train())
    check_phi(family, build(family, **fields))
    if fields.get("num_experts_per_tok") != fields.get("num_local_experts"):  # with k = E nothing can be gained
        check_beta(family, build(family, **fields))


def test_five_variants_of_every_rule() -> None:
    assert all(len({str(variant) for variant in variants}) >= 5 for variants in VARIANTS.values())


def test_doge_is_refused_by_name_and_reason() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"layers\.0\.mlp: doge routes by product keys"):
        chronomoe_hf.wrap(moe_zoo.build("doge"))


def test_every_family_is_either_routed_or_refused() -> None:
    assert set(FAMILIES) - set(ROUTED) == {"doge"}
    assert len(ROUTED) == 71
    assert set(NO_COHERENCE) | set(NO_BETA) <= set(ROUTED)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "hy_v3", "afmoe"])
def test_a_router_that_swaps_its_outputs_is_refused_at_wrap_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    router = next(m for m in model.modules() if chronomoe_hf.patches.match(m) is not None)
    native = type(router).forward

    def swapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        logits, weights, index = native(self, *args, **kwargs)
        return weights, logits, index

    monkeypatch.setattr(type(router), "forward", swapped)
    before = copy.copy(router.__dict__)
    with pytest.raises(ContractError, match=f"family '{family}', transformers"):
        chronomoe_hf.wrap(model)
    assert type(router).__name__.startswith(("Chrono",)) is False and router.__dict__.keys() == before.keys()
