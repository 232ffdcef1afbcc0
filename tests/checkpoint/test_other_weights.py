"""A state is of the weights it was saved with: others are refused, a rounding is no other weight, a fold removes it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, PreTrainedModel

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of
from chronomoe_hf.checkpoint.fingerprint import foreign_weights, live_fingerprint, rounded_fingerprint
from chronomoe_hf.checkpoint.state_file import MANIFEST_FILE, STATE_FOLDER, TENSOR_FILE, has_state, read_manifest
from chronomoe_hf.config import BetaConfig, CheckpointConfig
from chronomoe_hf.errors import StateMissingError, WeightMismatchError
from tests.support import moe_zoo
from tests.support.models import tiny_model

BALANCE = ChronoConfig.balance(beta__dead_zone=None, beta__first_layer="same", beta__rate=0.3)
ROUTING = ChronoConfig(beta=BetaConfig(law="balance", scope="routing", dead_zone=None, first_layer="same", rate=0.3))
IDS = torch.arange(1, 33).reshape(2, 16)
# Transformers loads their correction biases in the dtype of the model.
ROUNDED = ("afmoe", "kimi_linear", "laguna", "longcat_flash", "minimax_m2", "minimax_m3_vl", "step3p7")


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def governed(model: PreTrainedModel, config: ChronoConfig = BALANCE, steps: int = 8) -> PreTrainedModel:
    chronomoe_hf.wrap(model, config).train()
    for step in range(1, steps + 1):
        model(input_ids=torch.randint(1, 60, (4, 16), generator=torch.Generator().manual_seed(step)))
        system_of(model).step(step)
    return model.eval()


def gpt_oss() -> GptOssForCausalLM:
    """Its router has a bias, into which a beta of scope "routing" folds."""
    torch.manual_seed(0)
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_local_experts=8,
            num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.5,
            pad_token_id=0,
        )
    )  # fmt: skip


# ---- other weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["router", "expert"])
def test_one_changed_number_is_refused(what: str, tmp_path: Path) -> None:
    governed(tiny_model("mixtral")).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    names = [name for name, _ in model.named_parameters() if (".gate." in name if what == "router" else "down" in name)]
    with torch.no_grad():
        model.get_parameter(names[-1]).view(-1)[0].add_(1e-3)
    plain = logits(model)
    with pytest.raises(WeightMismatchError, match=f"1 router and expert weights differ.*{names[-1]}"):
        chronomoe_hf.wrap(model, BALANCE, state=tmp_path)
    assert torch.equal(logits(model), plain), "the model is left as it was"
    with pytest.raises(WeightMismatchError):
        system_of(chronomoe_hf.wrap(model, BALANCE)).load(tmp_path)


def test_a_warning_where_it_is_asked_for(tmp_path: Path) -> None:
    first = governed(tiny_model("mixtral"))
    first.save_pretrained(tmp_path)
    torch.manual_seed(9)
    other = type(first)(first.config)
    config = BALANCE.replace(checkpoint=CheckpointConfig(other_weights="warn"))
    with pytest.warns(UserWarning, match="is of other weights"):
        chronomoe_hf.wrap(other, config, state=tmp_path)
    assert torch.equal(system_of(other).step_state.beta_LE, system_of(first).step_state.beta_LE)


def test_a_reload_in_another_dtype_is_the_same_weights(tmp_path: Path) -> None:
    """fp32 files in bf16, bf16 files in fp32, and fp32 through bf16: the rounding lies between them, nothing else."""
    for saved in (torch.float32, torch.bfloat16):
        governed(tiny_model("mixtral").to(saved)).save_pretrained(tmp_path / str(saved))
        for loaded in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / str(saved), dtype=loaded)
            chronomoe_hf.wrap(model, BALANCE, state=tmp_path / str(saved))
            chronomoe_hf.unwrap(model)
    through = AutoModelForCausalLM.from_pretrained(tmp_path / "torch.float32", dtype=torch.bfloat16).float()
    chronomoe_hf.wrap(through, BALANCE, state=tmp_path / "torch.float32")
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "torch.float32", dtype=torch.bfloat16)
    with torch.no_grad():
        weight = rounded.model.layers[0].mlp.gate.weight.view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0, dtype=weight.dtype))  # one step of bf16
    with pytest.raises(WeightMismatchError, match="1 router and expert weights differ"):
        chronomoe_hf.wrap(rounded, BALANCE, state=tmp_path / "torch.float32")


def test_what_cannot_be_compared_is_not_named() -> None:
    model = chronomoe_hf.wrap(tiny_model("mixtral"))
    layers = system_of(model).layers
    lines = live_fingerprint(layers)
    name = next(iter(lines))
    rounded = rounded_fingerprint(layers)
    assert set(rounded) == set(lines) and foreign_weights(layers, lines, rounded) == []
    for line in ("sharded", "uint8 4 abc", "int8 4 abc", "float8_e4m3fn 4 abc"):
        assert foreign_weights(layers, {**lines, name: line}, {}) == [], line
    assert foreign_weights(layers, {**lines, "of.an.adapter": "float32 4 abc"}, {}) == []
    assert foreign_weights(layers, {**lines, name: "float32 4 abc"}, {}) == [name]


# ---- settings of the state ------------------------------------------------------------------------------------------


def test_without_a_config_the_saved_settings_act(tmp_path: Path) -> None:
    model = governed(tiny_model("mixtral"))
    want = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(logits(again), want), "bad test setup: nothing steers"
    chronomoe_hf.wrap(again, state=tmp_path)
    assert system_of(again).config == BALANCE and torch.equal(logits(again), want)
    with pytest.raises(StateMissingError, match="no chronomoe state"):
        chronomoe_hf.wrap(tiny_model("mixtral"), state=tmp_path / "elsewhere")


# ---- folding --------------------------------------------------------------------------------------------------------


def test_a_save_after_a_fold_removes_the_state(tmp_path: Path) -> None:
    model = governed(gpt_oss(), ROUTING)
    want = logits(model)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "kept")
    chronomoe_hf.unwrap(model, fold=True)
    (tmp_path / STATE_FOLDER / "snapshots.jsonl").write_text("{}\n")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in (tmp_path / STATE_FOLDER).iterdir()) == ["folded.json", "snapshots.jsonl"]
    plain = GptOssForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain), want, atol=2e-5, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chronomoe_hf.wrap(plain, ChronoConfig.observe())
    chronomoe_hf.unwrap(plain)
    with pytest.raises(StateMissingError, match="was folded into the weights there"):
        chronomoe_hf.wrap(plain, ROUTING, state=tmp_path)
    with pytest.raises(WeightMismatchError):  # the state before the fold, for weights after it
        chronomoe_hf.wrap(plain, ROUTING, state=tmp_path / "kept")
    chronomoe_hf.wrap(model, ROUTING)
    model.save_pretrained(tmp_path)  # wrapped again: a state of today's weights
    assert has_state(tmp_path) and not (tmp_path / STATE_FOLDER / "folded.json").exists()
    chronomoe_hf.wrap(GptOssForCausalLM.from_pretrained(tmp_path), state=tmp_path)


def test_where_nothing_folds_nothing_is_removed(tmp_path: Path) -> None:
    model = governed(tiny_model("mixtral"))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="does not survive"):
        chronomoe_hf.unwrap(model, fold=True)
    assert "save_pretrained" not in model.__dict__
    model.save_pretrained(tmp_path)
    chronomoe_hf.wrap(model, state=tmp_path)


# ---- names of the files ---------------------------------------------------------------------------------------------


def test_no_file_of_ours_is_taken_for_weights(tmp_path: Path) -> None:
    """compressed-tensors and llmcompressor take every ``*.safetensors`` below a model for a shard of it."""
    governed(tiny_model("mixtral")).save_pretrained(tmp_path)
    assert (tmp_path / STATE_FOLDER / TENSOR_FILE).is_file()
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["model.safetensors"]
    assert not list((tmp_path / STATE_FOLDER).glob("*.bin"))


def test_a_save_replaces_a_state_of_schema_2(tmp_path: Path) -> None:
    folder = tmp_path / STATE_FOLDER
    folder.mkdir()
    source = Path(__file__).parents[1] / "data" / "state_v2_system" / STATE_FOLDER
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert read_manifest(tmp_path)["schema_version"] == 2
    model = chronomoe_hf.wrap(tiny_model("mixtral"), ChronoConfig.balance(interval=4), state=tmp_path)
    system_of(model).save(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST_FILE, TENSOR_FILE]
    assert read_manifest(tmp_path)["schema_version"] == 3


# ---- biases that bf16 rounds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ROUNDED)
def test_a_bias_that_a_bf16_reload_rounds_is_read_again(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file has fp32."""
    model = moe_zoo.build(family).bfloat16()
    model.save_pretrained(tmp_path / "start")
    model = governed(type(model).from_pretrained(tmp_path / "start"), steps=30)
    model.save_pretrained(tmp_path / "final")
    assert "is saved in fp32, but Transformers loads it in bfloat16" in caplog.text
    names = [layer.name for layer in system_of(model).layers]
    assert read_manifest(tmp_path / "final")["rounded_biases"] == names
    biases = [layer.adapter.native_bias(layer.router, layer.parent).clone() for layer in system_of(model).layers]
    again = type(model).from_pretrained(tmp_path / "final")
    plain = {name: value.clone() for name, value in again.state_dict().items()}
    chronomoe_hf.wrap(again, state=tmp_path / "final")
    repaired = [name for name, value in again.state_dict().items() if value.dtype == torch.float32]
    assert len(repaired) >= len(names)
    for layer, want in zip(system_of(again).layers, biases, strict=True):
        found = layer.adapter.native_bias(layer.router, layer.parent)
        assert found.dtype == torch.float32 and torch.equal(found, want)
        assert not torch.equal(want.bfloat16().float(), want), "bad test setup: nothing is rounded"
    chronomoe_hf.unwrap(again)
    assert all(torch.equal(value, plain[name]) for name, value in again.state_dict().items())
    moved = type(model).from_pretrained(tmp_path / "final")
    with torch.no_grad():
        for name, value in moved.state_dict().items():
            if name in repaired:
                value.add_(1.0)
    here = {name: value.float() for name, value in moved.state_dict().items() if name in repaired}
    chronomoe_hf.wrap(moved, BALANCE)  # trained since: the file's value is not its own
    assert here and all(torch.equal(moved.state_dict()[name], value) for name, value in here.items())
