"""`inspect` reads foreign configs: whatever is in them, it runs no code of theirs and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import models as tiny

from chronomoe_hf.errors import WrapError
from chronomoe_hf.wrapping.support import build_on_meta, inspect_model


def directory(tmp_path: Path, family: str = "mixtral", **changes: Any) -> str:
    config = json.loads(tiny.tiny_config(family).to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    return str(tmp_path)


def test_a_sound_config_is_read(tmp_path: Path) -> None:
    found = inspect_model(directory(tmp_path))
    assert found.model_class == "MixtralForCausalLM" and len(found.layers) == 2
    assert (found.layers[0].num_experts, found.layers[0].top_k) == (8, 2)
    named = inspect_model(directory(tmp_path, architectures=["MixtralForSequenceClassification"]))
    assert named.model_class == "MixtralForSequenceClassification"


@pytest.mark.parametrize("architectures", [[5], ["a.b"], [""], ["\x1b[31m"]])
def test_architectures_that_are_no_class_names_are_not_looked_at(tmp_path: Path, architectures: Any) -> None:
    assert inspect_model(directory(tmp_path, architectures=architectures)).model_class == "MixtralForCausalLM"


@pytest.mark.parametrize("architectures", ["MixtralForCausalLM", [["x"]], {"a": 1}])
def test_architectures_that_are_no_list_of_strings(tmp_path: Path, architectures: Any) -> None:
    try:
        found = inspect_model(directory(tmp_path, architectures=architectures))
    except WrapError as error:
        assert "no config can be read" in str(error)
    else:
        assert found.model_class == "MixtralForCausalLM"


@pytest.mark.parametrize(
    "name", ["AutoTokenizer", "AutoConfig", "Trainer", "pipeline", "logging", "set_seed", "LlamaForCausalLM", "__doc__"]
)
def test_only_a_model_class_of_this_config_is_built(tmp_path: Path, name: str) -> None:
    """`getattr(transformers, name)(config)` would call anything; the Auto class that fits is used instead."""
    assert inspect_model(directory(tmp_path, architectures=[name])).model_class == "MixtralForCausalLM"


def test_an_attribute_of_the_library_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    called: list[Any] = []
    monkeypatch.setattr(transformers, "set_seed", called.append)
    config = tiny.tiny_config("mixtral")
    config.architectures = ["set_seed"]
    build_on_meta(config)
    assert not called


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"},
        {"num_hidden_layers": "two"},
        {"hidden_size": -8},
        {"num_attention_heads": 0},
        {"num_experts_per_tok": None},
        {"num_local_experts": "8"},
        {"rope_parameters": 7},
        {"model_type": 5},
        {"model_type": "not_a_model"},
    ],
    ids=str,
)
def test_fields_of_a_wrong_type_or_size(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(WrapError) as raised:
        inspect_model(directory(tmp_path, **changes))
    assert len(str(raised.value)) < 4000


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_local_experts": 0}, "2 of 0 experts"),
        ({"num_experts_per_tok": 99}, "99 of 8 experts"),
        ({"num_experts_per_tok": 0}, "0 of 8 experts"),
    ],
)
def test_impossible_numbers_of_experts(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(WrapError, match=rf"layers\.0\.mlp\.gate: the config asks for {says} per token.*between 1 and"):
        inspect_model(directory(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"\x00\xff\xfe binary", b"[1, 2]", b"{", b'{"a": ' * 100_000, b""])
def test_files_that_are_no_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WrapError, match="no config can be read"):
        inspect_model(str(tmp_path))


@pytest.mark.parametrize("name", ["x" * 5000, "", None, 7, Path(".")])
def test_names_that_are_no_names(name: Any) -> None:
    with pytest.raises(WrapError, match="a directory or a Hub name of 1 to") as raised:
        inspect_model(name)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("model_type", ["mixtral", "homemade"])
def test_code_that_came_with_the_weights_does_not_run(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*args: Any) -> str:
        raise AssertionError("the user was asked whether to run remote code")

    monkeypatch.setattr("builtins.input", asked)
    (tmp_path / "own.py").write_text("raise SystemExit('remote code ran')\n")
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    path = directory(tmp_path, auto_map=auto_map, model_type=model_type)
    if model_type == "mixtral":
        assert inspect_model(path).model_class == "MixtralForCausalLM"
    else:
        with pytest.raises(WrapError, match="no config can be read"):
            inspect_model(path)
