"""Using a governed model again: `wrap(model, state=directory)`, and a word where the state is left behind."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from support import moe_zoo
from support.models import tiny_batch, tiny_model
from transformers import AutoModelForCausalLM

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.errors import AlreadyWrappedError, NotWrappedError, StateCorruptError, StateMissingError

BALANCE = ChronoConfig.balance(interval=1)


def governed(config: ChronoConfig = BALANCE, steps: int = 6) -> torch.nn.Module:
    model = chronomoe_hf.wrap(tiny_model("mixtral"), config).train()
    for step in range(1, steps + 1):
        model(**tiny_batch("mixtral", seed=step))
        chronomoe_hf.system_of(model).step(step)
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A directory of `save_pretrained`; its logits as governed, and as plain."""
    model = governed()
    model.save_pretrained(tmp_path / "final")
    batch = tiny_batch("mixtral", seed=9)
    with torch.no_grad():
        with_state = model(**batch).logits
        plain = chronomoe_hf.unwrap(copy.deepcopy(model))(**batch).logits
    assert not torch.equal(with_state, plain), "bad test setup: nothing steers"
    return tmp_path / "final", with_state, plain


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_batch("mixtral", seed=9)).logits


def test_one_line_gives_the_governed_model_back(saved) -> None:
    directory, with_state, _ = saved
    model = AutoModelForCausalLM.from_pretrained(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chronomoe_hf.wrap(model, BALANCE, state=directory) is model
    assert torch.equal(logits(model), with_state)
    assert chronomoe_hf.system_of(model).global_step == 6


def test_a_wrapped_model_takes_a_state_too(saved) -> None:
    directory, with_state, _ = saved
    model = chronomoe_hf.wrap(tiny_model("mixtral"), BALANCE)
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(directory).state_dict())
    assert not torch.equal(logits(model), with_state)
    chronomoe_hf.wrap(model, state=str(directory))
    assert torch.equal(logits(model), with_state)
    with pytest.raises(AlreadyWrappedError):
        chronomoe_hf.wrap(model, ChronoConfig.observe(), state=directory)


def test_a_state_that_cannot_be_loaded_leaves_the_model_as_it_was(saved, tmp_path: Path) -> None:
    directory, _, plain = saved
    (directory / "chronomoe" / "state.tensors").write_bytes(b"torn")
    for place, error in ((tmp_path / "typo", StateMissingError), (directory, StateCorruptError)):
        model = AutoModelForCausalLM.from_pretrained(directory)
        classes = [type(module) for module in model.modules()]
        with pytest.raises(error):
            chronomoe_hf.wrap(model, BALANCE, state=place)
        with pytest.raises(NotWrappedError):
            chronomoe_hf.system_of(model)
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(logits(model), plain)


def test_weights_without_their_state_are_warned_of(saved) -> None:
    directory, _, plain = saved
    model = AutoModelForCausalLM.from_pretrained(directory)
    with pytest.warns(UserWarning, match=r"routing was governed.*wrap\(model, state=directory\)"):
        chronomoe_hf.wrap(model, BALANCE)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("case", ["observe", "no state", "native bias", "another place"])
def test_no_word_where_nothing_is_left_behind(case: str, tmp_path: Path) -> None:
    if case == "native bias":  # the balance is in the weights
        model = chronomoe_hf.wrap(moe_zoo.build("deepseek_v3"), BALANCE).train()
        for step in (1, 2):
            model(input_ids=torch.randint(3, 100, (2, 8)))
            chronomoe_hf.system_of(model).step(step)
        assert chronomoe_hf.system_of(model).governed
    else:
        model = governed(ChronoConfig.observe(interval=1) if case == "observe" else BALANCE)
    model.save_pretrained(tmp_path / "final")
    if case == "no state":
        shutil.rmtree(tmp_path / "final" / "chronomoe")
    plain = type(chronomoe_hf.unwrap(model)).from_pretrained(tmp_path / "final")
    if case == "another place":
        plain = type(plain)(plain.config)
        plain.name_or_path = plain.config._name_or_path = "somebody/on-the-hub"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chronomoe_hf.wrap(plain, ChronoConfig.observe())
