"""What engines and older readers need of an exported checkpoint: its config, its names, its heads, its templates."""

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
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

import chronomoe_hf
from chronomoe_hf import ChronoConfig, lifecycle, system_of
from chronomoe_hf.cli.main import app
from chronomoe_hf.errors import ExportError, LifecycleError

BALANCE = ChronoConfig.balance(beta__dead_zone=None, beta__first_layer="same", beta__rate=0.3)


def qwen3_moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    rope = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2,
        num_experts=8, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=256, initializer_range=0.3, rope_parameters=rope,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def config_of(directory: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return data


# ---- config.json ----------------------------------------------------------------------------------------------------


def test_a_published_config_changes_in_its_count_only(tmp_path: Path) -> None:
    """As configs were written before Transformers 5: old names, a field that no class knows, an order of its own."""
    model = qwen3_moe()
    model.save_pretrained(tmp_path / "source")
    published = config_of(tmp_path / "source")
    rope = published.pop("rope_parameters")
    published["rope_theta"] = rope.pop("rope_theta")
    published["rope_scaling"] = rope
    published["torch_dtype"] = published.pop("dtype")
    published.pop("num_local_experts", None)
    published |= {"num_experts": 8, "transformers_version": "4.51.0", "scoring_func": "softmax"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(published))
    plan = plan_of(model)
    lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out", check="logits")
    after = config_of(tmp_path / "out")
    assert plan.num_kept != 8 and after.pop("num_local_experts") == after.pop("num_experts") == plan.num_kept
    del published["num_experts"]
    assert after == published
    built = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(built.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("how", ["files", "live"])
def test_a_config_of_transformers_5_gets_the_old_names_too(how: str, tmp_path: Path) -> None:
    model = qwen3_moe()
    model.save_pretrained(tmp_path / "source")
    before, plan = config_of(tmp_path / "source"), plan_of(model)
    assert "rope_theta" not in before and "torch_dtype" not in before
    if how == "files":
        lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out", check="logits")
    else:
        lifecycle.export(model, plan, tmp_path / "out")
    after = config_of(tmp_path / "out")
    assert after["rope_parameters"] == before["rope_parameters"] and after["dtype"] == after["torch_dtype"] == "float32"
    assert after["rope_theta"] == 1e6 and after["num_experts"] == after["num_local_experts"] == plan.num_kept
    assert after["rope_scaling"] == {k: v for k, v in before["rope_parameters"].items() if k != "rope_theta"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.rope_parameters == model.config.rope_parameters


# ---- names of the experts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_names_in_memory_are_cut_and_published_names_written(family: str, tmp_path: Path) -> None:
    """Files as ``Accelerator.save_model`` writes them: one tensor for all experts."""
    model = tiny.tiny_model(family) if family in tiny.FAMILIES else moe_zoo.build(family)
    model.save_pretrained(tmp_path / "published")
    plan = plan_of(model)
    model.save_pretrained(tmp_path / "memory")
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "memory" / "model.safetensors", metadata={"format": "pt"})
    lifecycle.export_checkpoint(tmp_path / "published", plan, tmp_path / "want", check="logits")
    report = lifecycle.export_checkpoint(tmp_path / "memory", plan, tmp_path / "got", check="logits")
    want = {n: v for f in (tmp_path / "want").glob("*.safetensors") for n, v in load_file(f).items()}
    got = {n: v for f in (tmp_path / "got").glob("*.safetensors") for n, v in load_file(f).items()}
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    assert report.parameters_after == sum(value.numel() for value in got.values())
    names = sorted(path.name for path in (tmp_path / "got").iterdir())
    assert not [name for name in names if name.startswith("part-")]


def test_a_model_loaded_from_names_in_memory_is_exported_with_published_ones(tmp_path: Path) -> None:
    model = qwen3_moe()
    model.save_pretrained(tmp_path / "memory")
    save_file(dict(model.state_dict()), tmp_path / "memory" / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    lifecycle.export(loaded, plan_of(model), tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in names and not any("gate_up_proj" in n for n in names)


# ---- other parts ----------------------------------------------------------------------------------------------------


def test_dropped_heads_leave_the_config_too(tmp_path: Path) -> None:
    model = moe_zoo.build("glm4_moe")
    model.save_pretrained(tmp_path / "source")
    config = config_of(tmp_path / "source") | {"num_nextn_predict_layers": 1}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    file = tmp_path / "source" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.9.eh_proj.weight": torch.zeros(2, 2)}, file, metadata={"format": "pt"})
    plan = plan_of(model)
    with pytest.raises(ExportError, match=r"drop_unknown=True \(--drop-unknown\)"):
        lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    report = lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out", drop_unknown=True)
    assert report.dropped_tensors == 1 and config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0
    assert "1 tensors that the model of Transformers does not have" in (tmp_path / "out" / "README.md").read_text()


def test_every_chat_template_comes_along(tmp_path: Path) -> None:
    model = tiny.tiny_model("mixtral")
    model.save_pretrained(tmp_path / "source")
    tokenizer = texts.tokenizer()
    tokenizer.chat_template = {"default": "a", "rag": "b"}
    tokenizer.save_pretrained(tmp_path / "source")
    assert (tmp_path / "source" / "additional_chat_templates" / "rag.jinja").is_file(), "bad test setup"
    lifecycle.export_checkpoint(tmp_path / "source", plan_of(model), tmp_path / "out", check="shapes")
    assert (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").read_text() == "b"


def test_packed_numbers_are_counted_as_the_weights_that_they_are(tmp_path: Path) -> None:
    """W4A16 keeps eight weights in an int32, with scales beside them."""
    model = moe_zoo.build("qwen3_moe")
    model.save_pretrained(tmp_path / "source")
    plan, file = plan_of(model), tmp_path / "source" / "model.safetensors"
    packed: dict[str, torch.Tensor] = {}
    for name, value in load_file(file).items():
        if ".experts." in name:
            stem = name.removesuffix("weight")
            packed[f"{stem}weight_packed"] = torch.zeros(value.shape[0], value.shape[1] // 8, dtype=torch.int32)
            packed[f"{stem}weight_scale"] = torch.ones(value.shape[0], 1)
            packed[f"{stem}weight_shape"] = torch.tensor(value.shape)
        else:
            packed[name] = value
    save_file(packed, file, metadata={"format": "pt"})
    quantized = config_of(tmp_path / "source") | {"quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(quantized))
    report = lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    assert report.parameters_before == sum(value.numel() for value in model.parameters())
    small = Qwen3MoeForCausalLM(Qwen3MoeConfig.from_pretrained(tmp_path / "out"))
    assert report.parameters_after == sum(value.numel() for value in small.parameters()) < report.parameters_before
    assert config_of(tmp_path / "out")["quantization_config"] == quantized["quantization_config"]


def test_scales_of_fused_experts_are_cut_by_rows(tmp_path: Path) -> None:
    """One tensor of scales for all experts, beside a fused weight: row e is expert e's."""
    model = moe_zoo.build("gpt_oss")
    model.save_pretrained(tmp_path / "source")
    plan, file = plan_of(model), tmp_path / "source" / "model.safetensors"
    out: dict[str, torch.Tensor] = {}
    for at, (name, value) in enumerate(load_file(file).items()):
        out[name] = value
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            out[name] = value.to(torch.float8_e4m3fn)
            shape = (value.shape[0], 1, value.shape[2])
            out[f"{name}_scale"] = torch.rand(shape, generator=torch.Generator().manual_seed(at))
    save_file(out, file, metadata={"format": "pt"})
    quantized = config_of(tmp_path / "source") | {"quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(quantized))
    lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    scales = [name for name in out if name.endswith("_scale")]
    assert len(scales) == 4
    for name in scales:
        kept = list(plan.layers[int(name.split(".")[2])].kept)
        assert torch.equal(got[name], out[name][kept])
        weight = name.removesuffix("_scale")
        assert torch.equal(got[weight].view(torch.uint8), out[weight][kept].view(torch.uint8))


def test_a_quantized_model_is_not_refitted(tmp_path: Path) -> None:
    model = moe_zoo.build("qwen3_moe")
    model.hf_quantizer = object()  # what from_pretrained leaves on a quantized model
    batch = {"input_ids": torch.randint(1, 60, (2, 16))}
    with pytest.raises(LifecycleError, match="quantized"):
        lifecycle.refit(model, plan_of(moe_zoo.build("qwen3_moe")), [batch])


# ---- what steers ----------------------------------------------------------------------------------------------------


def governed(directory: Path, **overrides: Any) -> Any:
    model = chronomoe_hf.wrap(tiny.tiny_model("mixtral", **overrides), BALANCE).train()
    for step in range(1, 9):
        model(**tiny.tiny_batch("mixtral", seed=step))
        system_of(model).step(step)
    model.eval().save_pretrained(directory)
    return model


@pytest.mark.parametrize("how", ["files", "live"])
def test_the_card_speaks_of_what_steers(how: str, tmp_path: Path) -> None:
    model = governed(tmp_path / "source")
    plan = plan_of(model)
    if how == "files":
        report = lifecycle.export_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    else:
        report = lifecycle.export(model, plan, tmp_path / "out")
    assert report.steering is not None and "a beta for 2 of 2 layers" in report.steering
    card = (tmp_path / "out" / "README.md").read_text()
    assert "its routing was governed" in card and "nothing else is needed" not in card
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    chronomoe_hf.wrap(small, state=tmp_path / "out")
    with torch.no_grad(), lifecycle.masked(model, plan):
        want = model(input_ids=torch.arange(1, 17)[None]).logits
    torch.testing.assert_close(small.eval()(input_ids=torch.arange(1, 17)[None]).logits, want, atol=2e-5, rtol=0)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        other.get_parameter("model.layers.1.mlp.gate.weight")[0, 0] += 0.01
    with pytest.raises(chronomoe_hf.errors.WeightMismatchError):
        chronomoe_hf.wrap(other, state=tmp_path / "out")


def test_measure_and_export_say_what_they_leave_out(tmp_path: Path) -> None:
    model = governed(tmp_path / "source", vocab_size=texts.VOCAB)
    texts.tokenizer().save_pretrained(tmp_path / "source")
    plan_of(model).save(tmp_path / "plan.json")
    (tmp_path / "text.txt").write_text("one two three four five six seven eight\n" * 40)
    common = ["measure", str(tmp_path / "source"), "--plan", str(tmp_path / "plan.json"), "--data"]
    common += [str(tmp_path / "text.txt"), "--controls", "0", "--no-worst", "--no-progress", "--json"]
    found = {}
    for option in ("--no-state", "--state"):
        done = CliRunner().invoke(app, [*common, option])
        assert done.exit_code == 0, done.output
        found[option] = json.loads(done.stdout)
    assert found["--no-state"]["loss"] != found["--state"]["loss"]
    assert "is not loaded here (--state does)" in found["--no-state"]["steering"] and found["--state"]["state_loaded"]
    done = CliRunner().invoke(
        app, ["export", str(tmp_path / "source"), "--plan", str(tmp_path / "plan.json"), "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 0 and "its routing was governed" in done.output, done.output
