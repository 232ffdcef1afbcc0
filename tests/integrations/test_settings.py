"""What a tool's configuration says about us: a preset, a file, a mapping; a wrong word is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chronomoe_hf import ChronoConfig
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.integrations.settings import read_settings


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("balance", ChronoConfig.balance()),
        (True, ChronoConfig.observe()),
        ({"preset": "balance", "interval": 7, "beta": {"rate": 0.1}}, ChronoConfig.balance(interval=7, beta__rate=0.1)),
        ({"interval": 7}, ChronoConfig.observe(interval=7)),
        (ChronoConfig.protect(interval=3), ChronoConfig.protect(interval=3)),
        (None, None),
        (False, None),
    ],
)
def test_every_form_gives_its_config(value: Any, expected: ChronoConfig | None) -> None:
    read = read_settings(value, "here")
    assert read == expected
    assert read is None or expected is None or read.contract == expected.contract


def test_a_file_and_its_folder_are_read(tmp_path: Path) -> None:
    config = ChronoConfig.balance(interval=9)
    file = config.save_pretrained(tmp_path)
    assert read_settings(str(file), "here") == config == read_settings(tmp_path, "here")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("balanse", "did you mean 'balance'"),
        ("/no/such/file.json", "nor a file"),
        ({"preset": "watch"}, "known: observe, protect, balance"),
        ({"preset": "observe", "intervall": 3}, "interval"),
        ({"preset": "observe", "beta": {"law": "balance"}}, "never steers"),
        (7, "a int; give the name of a preset"),
    ],
)
def test_a_wrong_word_is_named_with_the_way_out(value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_settings(value, "train.yaml")
    assert str(error.value).startswith("train.yaml: ") and said in str(error.value)
