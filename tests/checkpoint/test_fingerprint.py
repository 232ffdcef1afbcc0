"""Layer tables and weight fingerprints."""

from __future__ import annotations

import hashlib

import pytest
import torch
from support import moe_zoo
from support.models import tiny_model

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.checkpoint.checks import check_layers
from chronomoe_hf.checkpoint.fingerprint import SLICE_ELEMENTS, compare_fingerprints, fingerprint
from chronomoe_hf.errors import StateMismatchError


def layer(
    name: str, num_experts: int = 8, top_k: int = 2, router_class: str = "MixtralTopKRouter"
) -> dict[str, object]:
    return {"name": name, "router_class": router_class, "num_experts": num_experts, "top_k": top_k}


def test_equal_tables_pair_by_name_in_any_order() -> None:
    live = [layer("a"), layer("b", 4), layer("c", 16, 4)]
    assert check_layers(live, live) == [(0, 0), (1, 1), (2, 2)]
    assert check_layers([live[2], live[0], live[1]], live) == [(1, 0), (2, 1), (0, 2)]
    assert check_layers([], []) == []


@pytest.mark.parametrize(
    ("saved", "shown"),
    [
        (layer("b", 16), "E=16"),
        (layer("b", router_class="Qwen3MoeTopKRouter"), "Qwen3MoeTopKRouter"),
        (layer("z"), "(absent)"),
    ],
)
def test_a_differing_layer_is_shown_and_partial_loads_the_rest(saved, shown) -> None:
    table, live = [layer("a"), saved], [layer("a"), layer("b")]
    with pytest.raises(StateMismatchError) as caught:
        check_layers(table, live)
    text = str(caught.value)
    assert shown in text and "MixtralTopKRouter E=8 k=2" in text and "allow_partial" in text and "1 agree" in text
    assert "  a " not in text, "a layer that agrees is not part of the difference"
    assert check_layers(table, live, allow_partial=True) == [(0, 0)]


def test_another_k_is_no_difference() -> None:
    assert check_layers([layer("a", top_k=1)], [layer("a", top_k=4)]) == [(0, 0)]  # a setting; loading says so


def test_extra_saved_layers_are_a_difference() -> None:
    with pytest.raises(StateMismatchError, match=r"b .*\| \(absent\)"):
        check_layers([layer("a"), layer("b")], [layer("a")])
    assert check_layers([layer("a"), layer("b")], [layer("a")], allow_partial=True) == [(0, 0)]


def test_partial_with_nothing_in_common_still_raises() -> None:
    with pytest.raises(StateMismatchError) as caught:
        check_layers([layer("x")], [layer("a")], allow_partial=True)
    assert "set CheckpointConfig" not in str(caught.value)


def test_long_and_hostile_tables_stay_readable() -> None:
    saved = [layer(f"\x1b[31m{index}\n" + "n" * 500) for index in range(300)]
    with pytest.raises(StateMismatchError) as caught:
        check_layers(saved, [layer("a")])
    text = str(caught.value)
    assert "and 281 more" in text and len(text) < 8000
    assert all(line.isprintable() for line in text.split("\n"))


# ------------------------------------------------------------------------------------------------- fingerprints


def naive_line(tensor: torch.Tensor, sliced: bool) -> str:
    """The definition, element by element, for tensors whose slices are whole rows of at most 256 columns."""
    experts = tensor if tensor.ndim == 3 else [tensor]
    picked: list[torch.Tensor] = []
    if not sliced:
        picked = list(tensor.reshape(-1))
    else:
        rows = max(1, 256 // tensor.shape[-1])
        for part in (slice(None, rows), slice(-rows, None)):
            for matrix in experts:
                picked += [value for row in list(matrix)[part] for value in row]
    raw = b"".join(value.reshape(1).view(torch.uint8).numpy().tobytes() for value in picked)
    name = str(tensor.dtype).removeprefix("torch.")
    return f"{name} {'x'.join(map(str, tensor.shape))} {hashlib.sha256(raw).hexdigest()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_lines_follow_the_definition(dtype) -> None:
    router, experts = torch.randn(4, 16).to(dtype), torch.randn(4, 40, 16).to(dtype)
    lines = fingerprint([("r", router), ("e", experts)], sampled=[("s", experts[0])])
    assert lines == {"r": naive_line(router, False), "e": naive_line(experts, True), "s": naive_line(experts[0], True)}


def test_every_router_element_counts() -> None:
    weight = torch.randn(4, 600)
    before = fingerprint([("r", weight)])
    for row in range(4):
        for column in (0, 300, 599):
            changed = weight.clone()
            changed[row, column] += 1
            assert compare_fingerprints(before, fingerprint([("r", changed)])) == ["r"]


def test_every_expert_counts_at_both_ends() -> None:
    weight = torch.randn(5, 30, 1000)
    before = fingerprint([("e", weight)])
    seen = 0
    for expert in range(5):
        for row, column in ((0, 0), (0, SLICE_ELEMENTS - 1), (-1, -1), (-1, -SLICE_ELEMENTS)):
            changed = weight.clone()
            changed[expert, row, column] += 1
            assert compare_fingerprints(before, fingerprint([("e", changed)])) == ["e"]
            seen += 1
    assert seen == 20
    changed = weight.clone()
    changed[:, 10] += 1
    assert compare_fingerprints(before, fingerprint([("e", changed)])) == [], "a slice, not the whole tensor"
    swapped = weight[[1, 0, 2, 3, 4]]
    assert compare_fingerprints(before, fingerprint([("e", swapped)])) == ["e"], "experts in another order"


def test_layout_does_not_matter_but_dtype_and_shape_do() -> None:
    weight = torch.randn(4, 8, 16)
    reference = fingerprint([("e", weight)])
    assert fingerprint([("e", weight.transpose(1, 2).contiguous().transpose(1, 2))]) == reference
    assert fingerprint([("e", weight.clone().requires_grad_())]) == reference
    assert compare_fingerprints(reference, fingerprint([("e", weight.bfloat16())])) == ["e"]
    assert compare_fingerprints(reference, fingerprint([("e", weight.reshape(8, 4, 16))])) == ["e"]
    negative_zero = torch.zeros(2, 2)
    assert fingerprint([("z", negative_zero)]) != fingerprint([("z", -negative_zero)]), "bytes, not values"


def test_a_large_matrix_is_sliced_and_odd_shapes_work() -> None:
    large = torch.zeros(3000, 3000)  # 36 MB
    before = fingerprint([("w", large)])
    large[1500, 1500] = 1
    assert fingerprint([("w", large)]) == before
    large[2999, 2999] = 1
    assert fingerprint([("w", large)]) != before
    odd = {
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4, 4),
        "bias": torch.zeros(3),
        "4d": torch.ones(2, 3, 4, 5),
    }
    assert set(fingerprint(odd.items())) == set(odd)
    assert set(fingerprint([], sampled=odd.items())) == set(odd)


def test_names_on_one_side_differ_and_unreadable_weights_do_not() -> None:
    lines = fingerprint([("a", torch.ones(2)), ("m", torch.ones(2, 2, device="meta"))])
    assert lines["m"] == "sharded"
    assert compare_fingerprints(lines, fingerprint([("a", torch.ones(2)), ("m", torch.ones(2, 2))])) == []
    assert compare_fingerprints(lines, {}) == ["a"]
    assert compare_fingerprints({}, lines) == ["a"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_device_does_not_matter(dtype) -> None:
    router, experts = torch.randn(4, 16).to(dtype), torch.randn(4, 40, 16).to(dtype)
    assert fingerprint([("r", router.cuda()), ("e", experts.cuda())]) == fingerprint([("r", router), ("e", experts)])


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "hunyuan_v1_moe", "granitemoe", "gpt_oss"])
def test_every_line_names_a_tensor_of_the_model(family: str) -> None:
    model = moe_zoo.build(family)
    names = {name for name, _ in model.named_parameters()}
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(model, ChronoConfig.observe()))
    lines = system.fingerprint()
    assert len(lines) >= 3 * len(system.layers)
    assert set(lines) <= names, sorted(set(lines) - names)


def test_a_mismatch_names_the_tensor_that_is_wrong() -> None:
    model = tiny_model("mixtral")
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(model, ChronoConfig.observe()))
    saved = system.fingerprint()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.experts.down_proj").add_(1)
    assert compare_fingerprints(saved, system.fingerprint()) == ["model.layers.1.mlp.experts.down_proj"]


def test_names_of_schema_1_stand_for_the_tensors_they_mean() -> None:
    """It named the experts below the router; also where the router lies deeper."""
    live = {"m.0.gate.weight": "a", "m.0.experts.up": "b", "m.0.experts.down": "c"}
    for router in ("gate", "gate.wg"):
        saved = {"m.0.gate.weight": "a", f"m.0.{router}.experts.up": "b", f"m.0.{router}.experts.down": "c"}
        assert compare_fingerprints(saved, live) == []
        assert compare_fingerprints({**saved, f"m.0.{router}.experts.up": "x"}, live) == ["m.0.experts.up"]
        lacking = {name: line for name, line in saved.items() if not name.endswith("down")}
        assert compare_fingerprints(lacking, live) == ["m.0.experts.down"]
