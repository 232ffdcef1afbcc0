"""export_checkpoint: whole and sharded files, quantized ones, and files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models as tiny
from support import moe_zoo, texts
from support.cut_plans import plan_of

from chronomoe_hf import lifecycle
from chronomoe_hf.errors import ExportError, PlanMismatchError, WrapError
from chronomoe_hf.export.slicing import Piece
from chronomoe_hf.export.tensor_files import read_header, write_checkpoint


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def saved(directory: Path, family: str = "mixtral", **options: Any) -> lifecycle.PrunePlan:
    model = tiny.tiny_model(family) if family in tiny.FAMILIES else moe_zoo.build(family)
    model.save_pretrained(directory, **options)
    return plan_of(model)


def rewrite(directory: Path, change: Any) -> None:
    """Replace the tensors of a one-file checkpoint by what `change` makes of them."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_other_files_come_along(tmp_path: Path) -> None:
    plan = saved(tmp_path / "source")
    texts.tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    (tmp_path / "source" / "LICENSE").write_text("do what you want")
    (tmp_path / "source" / "trainer_state.json").write_text("{}")
    (tmp_path / "source" / "optimizer.pt").write_bytes(b"x")
    lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out", check="shapes")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "LICENSE", "README.md", "generation_config.json", "prune_plan.json"} <= names
    assert not names & {"trainer_state.json", "optimizer.pt"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n# Mine\n") and "5 of 8 experts stay" in card


def test_shards_keep_their_order_and_the_index_is_right(tmp_path: Path) -> None:
    plan = saved(tmp_path / "source", max_shard_size="60KB")
    report = lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out", check="shapes")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    assert (
        index["metadata"]["total_size"]
        == report.bytes_after
        == sum(value.numel() * value.element_size() for value in tensors(tmp_path / "out").values())
    )
    assert index["metadata"]["total_parameters"] == report.parameters_after
    assert report.checked == "shapes" and report.max_difference is None
    kept = plan.layers[0].kept
    source, out = tensors(tmp_path / "source"), tensors(tmp_path / "out")
    for new, old in enumerate(kept):
        name = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
        assert torch.equal(out[name.format(new)], source[name.format(old)])
    assert name.format(len(kept)) not in out


def test_experts_on_an_inner_axis_are_cut(tmp_path: Path) -> None:
    source = {"a": torch.arange(2 * 4 * 3).view(2, 4, 3), "b": torch.randn(3, 2).bfloat16()}
    save_file(source, tmp_path / "model.safetensors")
    stored, _ = read_header(tmp_path / "model.safetensors")
    (tmp_path / "out").mkdir()
    pieces = {"a": Piece("a", 1, (0, 2, 3)), "c": Piece("b", 1, (1,)), "b": Piece("b")}
    numbers, size = write_checkpoint(tmp_path / "out", stored, pieces, {})
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out["a"], source["a"][:, [0, 2, 3]]) and torch.equal(out["c"], source["b"][:, [1]])
    assert torch.equal(out["b"], source["b"]) and (numbers, size) == (18 + 3 + 6, 18 * 8 + 9 * 2)


@pytest.mark.parametrize("missing", ["shard", "torn", "header", "index", "twice", "none", "bin", "config"])
def test_files_that_are_not_whole_are_refused_before_anything_is_written(missing: str, tmp_path: Path) -> None:
    plan = saved(tmp_path / "source", max_shard_size="60KB")
    source = tmp_path / "source"
    first = min(source.glob("*.safetensors"))
    index = source / "model.safetensors.index.json"
    error: type[Exception] = ExportError
    if missing == "shard":
        first.unlink()
        message = r"lacks 1 of its \d+ weight files \(first: model-00001.*nothing was written"
    elif missing == "torn":
        first.write_bytes(first.read_bytes()[:-100])
        message = "is torn: it has"
    elif missing == "header":
        first.write_bytes(b"\xff" * 64)
        message = "is not a safetensors file"
    elif missing == "index":
        data = json.loads(index.read_text())
        data["weight_map"]["lm_head.weight"] = max(
            set(data["weight_map"].values()) - {data["weight_map"]["lm_head.weight"]}
        )
        index.write_text(json.dumps(data))
        message = "disagree about lm_head.weight"
    elif missing == "twice":
        other = max(source.glob("*.safetensors"))
        save_file({**load_file(other), **load_file(first)}, other)
        message = "which another file"
    elif missing == "none":
        index.unlink()
        message = r"has neither model\.safetensors nor"
    elif missing == "bin":
        index.unlink()
        (source / "pytorch_model.bin").write_bytes(b"x")
        message = r"pytorch_model\.bin is a pickle"
    else:
        (source / "config.json").unlink()
        error, message = WrapError, r"no config\.json"
    with pytest.raises(error, match=message):
        lifecycle.export_checkpoint(source, plan, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_plan_or_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    plan = saved(tmp_path / "source")
    other = saved(tmp_path / "other", "qwen3_moe")
    with pytest.raises(PlanMismatchError, match="make a plan from evidence of this model"):
        lifecycle.export_checkpoint(tmp_path / "source", other, tmp_path / "out")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    with pytest.raises(ExportError, match=r"has shape .* in the files, .* by the config"):
        lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="check must be one of auto, logits, shapes"):
        lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out", check="maybe")  # type: ignore[arg-type]
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out")


def test_tensors_that_no_model_has_are_refused_or_left_out(tmp_path: Path) -> None:
    plan = saved(tmp_path / "source")
    head = {f"model.layers.2.mlp.experts.{e}.w1.weight": torch.zeros(2, 2) for e in range(8)}
    rewrite(tmp_path / "source", lambda found: found | head)
    with pytest.raises(ExportError, match=r"8 tensors .*first: model\.layers\.2\.mlp.*next-token head.*drop_unknown"):
        lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out", drop_unknown=True, check="logits")
    assert not head.keys() & tensors(tmp_path / "out").keys()


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    plan = saved(tmp_path / "source")
    gone = "model.layers.1.block_sparse_moe.experts.6.w3.weight"
    rewrite(tmp_path / "source", lambda found: {n: v for n, v in found.items() if n != gone})
    with pytest.raises(ExportError, match=f"1 of the model's tensors are not in the files .first: {gone}"):
        lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out")


# ---- quantized files -----------------------------------------------------------------------------------------------


def quantize(directory: Path, method: str) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": method}}))


def test_scales_beside_the_weights_follow_their_experts(tmp_path: Path) -> None:
    plan = saved(tmp_path / "source", "deepseek_v3")

    def fp8(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = dict(found)
        for at, (name, value) in enumerate(found.items()):
            if value.dim() == 2 and "proj" in name:
                out[name] = value.to(torch.float8_e4m3fn)
                out[f"{name}_scale_inv"] = torch.full((1, 1), float(at))
        return out

    rewrite(tmp_path / "source", fp8)
    quantize(tmp_path / "source", "fp8")
    report = lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    assert report.checked == "shapes"
    source, out = tensors(tmp_path / "source"), tensors(tmp_path / "out")
    experts = 0
    for planned in plan.layers:
        prefix = planned.spec.name.removesuffix("gate") + "experts.{}.down_proj.{}"
        for new, old in enumerate(planned.kept):
            for part in ("weight", "weight_scale_inv"):
                got, want = out[prefix.format(new, part)], source[prefix.format(old, part)]
                assert got.dtype == want.dtype and torch.equal(got.float(), want.float())
                experts += 1
        assert prefix.format(plan.num_kept, "weight_scale_inv") not in out
    assert experts and any("self_attn" in name and name.endswith("scale_inv") for name in out)


def test_packed_fused_experts_are_cut_by_rows(tmp_path: Path) -> None:
    plan = saved(tmp_path / "source", "gpt_oss")

    def mxfp4(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {}
        for name, value in found.items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                generator = torch.Generator().manual_seed(len(name))
                shape = (value.shape[0], value.shape[2], 2, 8)
                out[f"{name}_blocks"] = torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator)
                out[f"{name}_scales"] = torch.randint(0, 255, shape[:3], dtype=torch.uint8, generator=generator)
            else:
                out[name] = value
        return out

    rewrite(tmp_path / "source", mxfp4)
    quantize(tmp_path / "source", "mxfp4")
    lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    source, out = tensors(tmp_path / "source"), tensors(tmp_path / "out")
    packed = [name for name in source if name.endswith(("_blocks", "_scales"))]
    assert packed
    for name in packed:
        layer = plan.layers[int(name.split(".")[2])]
        assert torch.equal(out[name], source[name][list(layer.kept)])
    with pytest.raises(ExportError, match="experts packed like this cannot be cut"):
        rewrite(tmp_path / "source", lambda found: found | {packed[0]: found[packed[0]].flatten(0, 1).clone()})
        lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "again")
