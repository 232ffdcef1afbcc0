"""Every family that a stock checkpoint of fewer experts can hold: the exported model is the masked one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import family_checks, moe_zoo
from support.cut_plans import plan_of

from chronomoe_hf import lifecycle
from chronomoe_hf.errors import ChronoError, ExportError, LifecycleError
from chronomoe_hf.export.cut_model import COUNTS, REFUSED
from chronomoe_hf.wrapping.discovery import find_layers

FAST = ("mixtral", "deepseek_v3", "gpt_oss", "hy_v3", "ernie4_5_moe", "switch_transformers")
PLAIN = [name for name in moe_zoo.ROUTED if name not in REFUSED]
EVERY = [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in PLAIN]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(**family_checks.inputs(model))
    return output.get("logits", output.get("last_hidden_state"))


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("family", EVERY)
def test_the_exported_model_is_the_masked_one(family: str, tmp_path: Path) -> None:
    model = family_checks.build(family).eval()
    plan = plan_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with lifecycle.masked(model, plan):
        want = logits(model)
    assert not torch.allclose(want, logits(model), atol=1e-4), "bad test setup: the dropped experts do nothing"
    report = lifecycle.export(model, plan, tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    small = type(model).from_pretrained(tmp_path / "out")
    difference = float((logits(small) - want).abs().max())
    assert difference <= 1e-5 and report.max_difference <= 1e-5 * max(1.0, float(want.abs().max()))
    again = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in small.state_dict().items())
    check_experts(model, small, plan)
    check_config(tmp_path / "out", plan)
    # The same from files, without loading a weight.
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "files", check="shapes")
    from_files, from_model = tensors(tmp_path / "files"), tensors(tmp_path / "out")
    assert from_files.keys() == from_model.keys()
    assert all(torch.equal(value, from_model[name]) for name, value in from_files.items())
    assert logits(type(model).from_pretrained(tmp_path / "files")).equal(logits(small))


def check_experts(model: Any, small: Any, plan: lifecycle.PrunePlan) -> None:
    """Router rows, native biases and expert outputs of new id n are those of old id kept[n]."""
    compared = 0
    for planned, old, new in zip(plan.layers, find_layers(model)[0], find_layers(small)[0], strict=True):
        kept = list(planned.kept)
        assert old.name == new.name and new.adapter.num_experts(new.router) == len(kept)
        if old.adapter.weight(old.router).shape[0] == planned.spec.num_experts:
            assert torch.equal(new.adapter.weight(new.router), old.adapter.weight(old.router)[kept])
            compared += 1
        native = old.adapter.native_bias(old.router, old.parent)
        if native is not None:
            assert torch.equal(new.adapter.native_bias(new.router, new.parent), native.view(-1)[kept])
        assert new.adapter.groups(new.router) == old.adapter.groups(old.router)
        if old.unreadable is None:
            width = old.adapter.weight(old.router).shape[-1]
            hidden = torch.randn(5, width, generator=torch.Generator().manual_seed(4))
            try:
                outputs = [family_checks.library_outputs(old.experts, hidden, expert) for expert in kept]
            except RuntimeError:  # the experts of this family read something narrower than the router does
                continue
            for number, output in enumerate(outputs):
                assert torch.allclose(family_checks.library_outputs(new.experts, hidden, number), output, atol=1e-6)
    assert compared, "bad test setup: no router row was compared"


def check_config(directory: Path, plan: lifecycle.PrunePlan) -> None:
    """Every name of the count that stands in config.json says the new number."""
    found = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                if name in COUNTS and value is not None:
                    found.append(value)
                walk(value)

    walk(json.loads((directory / "config.json").read_text()))
    flat = [number for value in found for number in (value if isinstance(value, list) else [value])]
    assert flat and set(flat) == {plan.num_kept}


@pytest.mark.parametrize("family", EVERY)
def test_in_bf16(family: str, tmp_path: Path) -> None:
    model = family_checks.build(family)
    model.save_pretrained(tmp_path / "source")
    model = type(model).from_pretrained(tmp_path / "source", dtype=torch.bfloat16).eval()
    plan = plan_of(model)
    with lifecycle.masked(model, plan):
        want = logits(model)
    lifecycle.export(model, plan, tmp_path / "out")
    small = type(model).from_pretrained(tmp_path / "out", dtype="auto")
    assert small.dtype == torch.bfloat16
    far = (logits(small).float() - want.float()).abs().amax(-1).flatten()
    assert float((far <= 0.03 * max(1.0, float(want.float().abs().max()))).float().mean()) >= 0.95


@pytest.mark.parametrize("family", [*REFUSED])
def test_families_that_cannot_are_refused_by_name(family: str, tmp_path: Path) -> None:
    model = moe_zoo.build(family)
    if family == "doge":
        with pytest.raises(ChronoError, match="product keys"):
            lifecycle.layer_specs(model)
        return
    with pytest.raises(LifecycleError, match=f"{family} cannot be exported with fewer experts: {REFUSED[family]}"):
        lifecycle.export(model, plan_of(model), tmp_path / "out")
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ExportError, match=REFUSED[family]):
        lifecycle.export_checkpoint(tmp_path / "source", plan_of(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
