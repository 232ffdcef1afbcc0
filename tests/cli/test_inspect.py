"""The chronomoe command: what inspect says is what wrap does, errors help, and tables are in step with the code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support import models as tiny
from support import moe_zoo
from transformers import LlamaConfig
from typer.testing import CliRunner

import chronomoe_hf
from chronomoe_hf import ChronoConfig, patches
from chronomoe_hf.cli.inspect import print_model, span
from chronomoe_hf.cli.main import app
from chronomoe_hf.cli.output import ranges
from chronomoe_hf.errors import NoMoELayersError, UnsupportedArchitectureError, WrapError
from chronomoe_hf.patches.registry import CAPABILITIES
from chronomoe_hf.wrapping.support import build_on_meta, inspect_model, support_table

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def compare_with_wrap(directory: Path, model: Any, mode: str | None = None) -> None:
    support = inspect_model(str(directory))
    chronomoe_hf.wrap(model, ChronoConfig.observe())
    system = chronomoe_hf.system_of(model)
    assert support.model_class == type(model).__name__
    assert [(s.name, s.router_class, s.num_experts, s.top_k) for s in support.layers] == [
        (layer.name, layer.adapter.router_class, layer.num_experts, layer.top_k) for layer in system.layers
    ]
    for said, layer in zip(support.layers, system.layers, strict=True):
        assert ("coherence" in said.capabilities) == (layer.experts is not None)
        assert said.native_bias == (layer.adapter.native_bias(layer.router, layer.parent) is not None)
        assert set(said.capabilities) | set(said.refused) == set(CAPABILITIES)
        assert mode is None or said.capabilities["coherence"] == mode


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_inspect_says_what_wrap_does(family: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(family)
    model.save_pretrained(tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()  # the config is all it reads
    compare_with_wrap(tmp_path, model, "division" if family == "switch_transformers" else "rows")


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "gemma4", "jetmoe", "dbrx", "zaya", "llama4", "lfm2_moe", "nllb_moe"]
)
def test_inspect_says_what_wrap_does_elsewhere(family: str, tmp_path: Path) -> None:
    model = moe_zoo.build(family)
    model.config.save_pretrained(tmp_path)
    compare_with_wrap(tmp_path, model)


def test_one_expert_a_token_is_read_by_division(tmp_path: Path) -> None:
    tiny.tiny_config("mixtral", num_experts_per_tok=1).save_pretrained(tmp_path)
    assert {layer.capabilities["coherence"] for layer in inspect_model(str(tmp_path)).layers} == {"division"}


def test_a_model_too_large_for_this_machine_is_inspected_without_memory() -> None:
    from transformers import DeepseekV3Config

    model = build_on_meta(DeepseekV3Config())
    assert sum(p.numel() for p in model.parameters()) > 600e9
    assert {p.device for p in model.parameters()} == {torch.device("meta")}


def test_the_command_prints_tables_and_json(tmp_path: Path) -> None:
    tiny.tiny_config("mixtral").save_pretrained(tmp_path)
    done = run("inspect", str(tmp_path))
    assert done.exit_code == 0
    for word in ("MixtralForCausalLM", "2 MoE layers", "model.layers.0-1.mlp.gate", "8, 2 per token", "softmax, top-k"):
        assert word in done.output
    record = json.loads(run("inspect", str(tmp_path), "--json").output)
    assert record["model_type"] == "mixtral" and record["refused"] == []
    assert [(layer["num_experts"], layer["top_k"]) for layer in record["layers"]] == [(8, 2), (8, 2)]
    assert record["layers"][0]["capabilities"]["coherence"] == "rows"


def test_what_is_not_supported_is_printed_with_its_reason(tmp_path: Path) -> None:
    moe_zoo.build("dbrx").config.save_pretrained(tmp_path)
    console = Console(width=200, record=True, file=io.StringIO())
    support = inspect_model(str(tmp_path))
    print_model(support, console)
    reason = support.layers[0].refused["beta"]
    assert f"no: {reason}" in console.export_text()


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WrapError, match=r"no config\.json.*save_pretrained"):
        inspect_model(str(tmp_path))
    with pytest.raises(WrapError, match=r"no config can be read from 'no/such-model'.*network"):
        inspect_model("no/such-model")
    (tmp_path / "config.json").write_text('{"model_type": "made_up"}')
    with pytest.raises(WrapError, match="made_up.*newer one"):
        inspect_model(str(tmp_path))
    LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(NoMoELayersError, match="LlamaForCausalLM.*chronomoe support"):
        inspect_model(str(tmp_path))
    moe_zoo.build("doge").config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match="product keys"):
        inspect_model(str(tmp_path))


def test_an_error_is_one_message_and_exit_code_one(tmp_path: Path) -> None:
    code = "import sys; from chronomoe_hf.cli.main import main; sys.argv[0] = 'chronomoe'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no config.json" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


# ---- support -------------------------------------------------------------------------------------------------------


def test_the_support_table_has_a_row_for_every_adapter_and_a_reason_for_every_no() -> None:
    table = run("support").output
    assert table == support_table()
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(patches.all_adapters()) + len(patches.refused_classes())
    for adapter in patches.all_adapters():
        (row,) = [r for r in rows if f"| `{adapter.router_class}` |" in r and r.startswith(f"| {adapter.family} |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert [cell == "yes" for cell in cells[-len(CAPABILITIES) :]] == [
            adapter.refused(name) is None for name in CAPABILITIES
        ]
        for name in CAPABILITIES:
            reason = adapter.refused(name)
            assert reason is None or reason in table


def test_the_page_of_families_holds_this_table() -> None:
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert text.count("<!-- support:start -->") == text.count("<!-- support:end -->") == 1
    inside = text.split("<!-- support:start -->")[1].split("<!-- support:end -->")[0]
    assert inside.strip() == support_table().strip(), "paste the output of `chronomoe support` between the markers"


def test_names_in_one_line() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert span(["a.1.b", "a.2.b", "a.4.b"]) == "a.1-2,4.b"
    assert span(["a.1.b"]) == "a.1.b"
    assert span(["a.1.b.2", "a.2.b.3"]) == "a.1.b.2 .. a.2.b.3"


# ---- a config of a stranger ----------------------------------------------------------------------------------------


def deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": [5]},
        {"architectures": ["AutoTokenizer"]},
        {"architectures": ["pipeline", "Trainer", "logging", "__file__"]},
        {"architectures": "MixtralForCausalLM"},
    ],
)
def test_only_model_classes_of_transformers_are_called(change: dict[str, Any], tmp_path: Path) -> None:
    tiny.tiny_config("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    done = run("inspect", str(tmp_path), "--json")
    if done.exit_code == 0:  # what is no model class is passed over, the Auto classes find the model
        assert json.loads(done.output)["model_class"] == "MixtralForCausalLM"
    else:
        assert isinstance(done.exception, WrapError), done.exception


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "x"},
        {"hidden_size": -1},
        {"num_local_experts": 0},
        {"num_experts_per_tok": 99},
        {"num_experts_per_tok": 0},
        {"num_local_experts": "many"},
        {"num_hidden_layers": None},
    ],
)
def test_impossible_numbers_are_one_message(change: dict[str, Any], tmp_path: Path) -> None:
    tiny.tiny_config("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert isinstance(run("inspect", str(tmp_path)).exception, WrapError | NoMoELayersError)


@pytest.mark.parametrize(
    "text", ["", "[]", "5", "{", '{"model_type": 5}', '{"model_type": "mixtral", "a": NaN}', deep(5000)]
)
def test_a_config_that_is_none_is_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    done = run("inspect", str(tmp_path))
    assert done.exit_code == 0 or isinstance(done.exception, WrapError | NoMoELayersError), done.exception


@pytest.mark.parametrize("name", ["", " ", "a" * 5000, "a\x1b[2Jb", "a\0b", "../" * 400])
def test_an_impossible_name_is_one_message(name: str) -> None:
    assert isinstance(run("inspect", "--", name).exception, WrapError)


def test_code_beside_a_config_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    record = {"model_type": "evil", "architectures": ["Evil"], "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    code = "from chronomoe_hf.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tmp_path)], input="y\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert not canary.exists() and "[y/N]" not in done.stdout + done.stderr


def test_support_as_json_is_the_table() -> None:
    rows = json.loads(run("support", "--json").output)
    assert len(rows) == len(patches.all_adapters()) + len(patches.refused_classes())
    table = support_table()
    assert all(f"`{row['router']}`" in table for row in rows)
