"""Configs from text and files: strict, typed errors, and every schema that was ever written."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chronomoe_hf.config import (
    CONFIG_NAME,
    CONFIG_SCHEMA,
    AlertConfig,
    BetaConfig,
    ChronoConfig,
    ControlConfig,
    CutConfig,
    DryRunConfig,
    HarmGuardConfig,
    LifecycleConfig,
    MeasuringConfig,
    ReviveConfig,
    TelemetryConfig,
    base,
    files,
)
from chronomoe_hf.config.files import MAX_BYTES
from chronomoe_hf.errors import ConfigError

GOLDEN_1 = Path(__file__).parents[1] / "data" / "config_v1"
"""A config written by the version before the harm guard had a part of its own."""


def test_a_config_of_schema_1_still_loads() -> None:
    text = (GOLDEN_1 / "chronomoe_config.json").read_text()
    assert json.loads(text)["schema_version"] == 1
    assert json.loads(text)["control"]["harm_hold"] == 2
    config = ChronoConfig.from_pretrained(GOLDEN_1)
    assert config == ChronoConfig(
        interval=7,
        alerts=AlertConfig(baseline_windows=3),
        beta=BetaConfig(law="balance", scope="selection", rate=0.1),
        control=ControlConfig(
            gate="pressure",
            harm=HarmGuardConfig(
                threshold=0.02,
                min_scale=0.02,
                factor=0.25,
                floor=0.05,
                recovery=0.3,
                abstain=0.1,
                restart=False,
                hold=2,
            ),
        ),
        telemetry=TelemetryConfig(output_dir="runs/a"),
    )
    assert config.schema_version == CONFIG_SCHEMA
    assert ChronoConfig.from_json(config.to_json()) == config


def test_a_balance_config_of_schema_2_keeps_its_law() -> None:
    """Every field was written out then, but for those that did not exist; a short file left the rate to the preset."""
    plain = {"rate": 0.3, "dead_zone": None, "first_layer": "same"}
    full = ChronoConfig.balance(beta=plain | {"rate": 0.1}).to_dict()
    for name in ("dead_zone", "first_layer", "first_floor"):
        del full["beta"][name]
    short = {"contract": "balance"}
    for data, rate in ((full, 0.1), (short, 0.3), ({**short, "beta": {"balance_cap": 2.0}}, 0.3)):
        for schema in (1, 2):
            config = ChronoConfig.from_dict({**data, "schema_version": schema})
            beta = config.beta
            assert (beta.rate, beta.dead_zone, beta.first_layer) == (rate, None, "same")
            assert config.contract == "balance" and config.schema_version == CONFIG_SCHEMA
            assert ChronoConfig.from_json(config.to_json()) == config, "and keeps it when saved again"
    assert ChronoConfig.from_dict(short) == ChronoConfig.balance(), "written by hand: today's preset"
    observing = {**ChronoConfig.observe().to_dict(), "schema_version": 2}
    assert ChronoConfig.from_dict(observing) == ChronoConfig.observe()


def test_the_cap_that_schemas_below_4_had_without_a_word_is_auto_now() -> None:
    written = {"coherence": {"max_tokens": 256}}
    for schema in (1, 2, 3):
        assert ChronoConfig.from_dict({**written, "schema_version": schema}).coherence.max_tokens == "auto"
        for value in (100, None):
            data = {"coherence": {"max_tokens": value}, "schema_version": schema}
            assert ChronoConfig.from_dict(data).coherence.max_tokens == value
    for data in (written, {**written, "schema_version": CONFIG_SCHEMA}):
        assert ChronoConfig.from_dict(data).coherence.max_tokens == 256, "a number is what was written"


OLD = {
    "enabled": False,
    "prune_threshold": 0.3,
    "starvation_threshold": 0.5,
    "min_tokens": 7,
    "coherence_tokens": 8,
    "after_step": 9,
    "confirmations": 2,
    "measure": True,
    "keep": 0.5,
    "rank": "reap",
    "multiple_of": 2,
    "cut_at": 0.25,
    "measure_batches": 3,
    "measure_controls": 4,
    "split": "start",
    "split_batches": 5,
    "split_idle": 0.4,
    "merge_above": 0.8,
    "split_above": 0.6,
    "router_drift": True,
}
GROUPED = LifecycleConfig(
    dry_run=DryRunConfig(
        enabled=False,
        prune_threshold=0.3,
        starvation_threshold=0.5,
        min_tokens=7,
        coherence_tokens=8,
        after_step=9,
        confirmations=2,
        merge_above=0.8,
        split_above=0.6,
    ),
    measuring=MeasuringConfig(enabled=True, batches=3, controls=4),
    cut=CutConfig(at=0.25, keep=0.5, rank="reap", multiple_of=2),
    revive=ReviveConfig(at="start", batches=5, idle=0.4),
    router_drift=True,
)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What has been logged, in a process that has said nothing yet."""
    monkeypatch.setattr(base, "_TOLD", set())
    monkeypatch.setattr(files, "_SAID", [])
    caplog.set_level(logging.WARNING, "chronomoe_hf")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_file_of_schema_3_loads_into_the_groups_of_today(lines: Callable[[], list[str]], tmp_path: Path) -> None:
    """Every field of the flat lifecycle of 0.2, as ``save_pretrained`` of that version wrote them."""
    data = {**ChronoConfig().to_dict(), "lifecycle": OLD, "schema_version": 3}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(data))
    config = ChronoConfig.from_pretrained(tmp_path)
    assert config == ChronoConfig(lifecycle=GROUPED) and ChronoConfig.from_pretrained(tmp_path) == config
    assert len(lines()) == 1 and "lifecycle.enabled is lifecycle.dry_run.enabled" in lines()[0]
    assert ChronoConfig.from_json(config.to_json()) == config and ChronoConfig.from_dict(config.to_dict()) == config
    assert ChronoConfig.from_dict(data) == config and len(lines()) == 1, "a saved state is upgraded without a word"


def test_the_lifecycle_takes_and_shows_the_names_it_had_without_groups(lines: Callable[[], list[str]]) -> None:
    assert LifecycleConfig(**OLD) == GROUPED and set(OLD) == {*LifecycleConfig.renamed, "router_drift"}
    assert len(lines()) == 1 and "cut_at is cut.at now" in lines()[0] and "keep is cut.keep now" in lines()[0]
    assert {name: getattr(GROUPED, name) for name in OLD} == OLD
    flat = ChronoConfig(lifecycle=LifecycleConfig(**OLD))
    assert flat == ChronoConfig().replace(**{f"lifecycle__{name}": value for name, value in OLD.items()})
    assert flat == ChronoConfig().replace(lifecycle=OLD) == ChronoConfig.from_dict({"lifecycle": OLD})
    assert len(lines()) == 1, "each is told once"
    tuned = ChronoConfig.observe(lifecycle__keep=0.5, lifecycle__cut__at=3, lifecycle=LifecycleConfig(rank="phi"))
    assert tuned.lifecycle.cut == CutConfig(at=3, keep=0.5, rank="phi")
    assert dataclasses.replace(ChronoConfig().lifecycle, keep=0.5).cut.keep == 0.5
    written = ChronoConfig.observe().to_dict()
    written["lifecycle"]["keep"] = 0.5
    assert ChronoConfig.from_dict(written) == ChronoConfig.observe(lifecycle__cut__keep=0.5)


def test_a_name_of_the_flat_lifecycle_is_checked_as_that_of_today() -> None:
    with pytest.raises(ConfigError, match=r"both keep and cut\.keep"):
        LifecycleConfig(keep=0.5, cut=CutConfig(keep=0.6))
    with pytest.raises(ConfigError, match=r"CutConfig\.keep is given twice"):
        ChronoConfig.observe(lifecycle__keep=0.5, lifecycle__cut__keep=0.6)
    with pytest.raises(ConfigError, match=r"lifecycle\.cut\.keep must be in"):
        LifecycleConfig(keep=1.5)
    with pytest.raises(ConfigError, match=r"lifecycle\.revive\.at is 'off' there"):
        ChronoConfig.observe(lifecycle__split="start")
    with pytest.raises(ConfigError, match="did you mean lifecycle__cut__keep"):
        ChronoConfig(keep=0.5)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="did you mean lifecycle__cut__at"):
        ChronoConfig.observe(lifecycle_cut_at=0.5)
    with pytest.raises(ConfigError, match="CutConfig"):
        ChronoConfig.from_dict({"lifecycle": {"cut": 3}})
    with pytest.raises(ConfigError, match="cut is a part"):
        ChronoConfig.from_dict({"lifecycle": {"cut": 3, "keep": 0.5}})


def test_old_and_new_names_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="both given"):
        ChronoConfig.from_dict({"control": {"harm_hold": 1, "harm": {"hold": 2}}})
    with pytest.raises(ConfigError, match="harm_hold"):
        ChronoConfig.from_dict({"schema_version": 2, "control": {"harm_hold": 1}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a chronomoe config"),
        ("{", "not a chronomoe config"),
        ("[]", "a config is a JSON object"),
        ("null", "a config is a JSON object, got None"),
        ('"protect"', "a config is a JSON object, got 'protect'"),
        ('{"interval": NaN}', "NaN"),
        ('{"interval": -Infinity}', "Infinity"),
        ('{"interval": 3, "interval": 4}', "'interval' twice"),
        ('{"beta": {"rate": 0.1, "rate": 0.2}}', "'rate' twice"),
        ('{"interval": ' + "9" * 5000 + "}", "not a chronomoe config"),
        ('{"interval": ' + "9" * 4000 + "}", "interval must be an integer"),
        ('{"beta": {"eta": ' + "9" * 4000 + "}}", "eta must be a finite number"),
        ('{"interval": 1e400}', "interval must be an integer"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (" " * (MAX_BYTES + 1), "at most"),
        ('{"intervall": 3}', "did you mean 'interval'"),
        ('{"schema_version": 5, "newkey": 3}', "newer"),
        ('{"schema_version": 0}', "from 1 to"),
        ('{"schema_version": "2"}', "from 1 to"),
        ('{"schema_version": true}', "from 1 to"),
        ('{"contract": "obsrve"}', "did you mean 'observe'"),
        ('{"contract": ["observe"]}', "no preset"),
        ('{"beta": []}', "beta must be BetaConfig"),
        ('{"control": {"harm": 1}}', "harm must be HarmGuardConfig"),
        ('{"control": {"harm_hold": 1, "harm": 1}}', "both given"),
    ],
    ids=lambda value: value[:20],
)
def test_other_json_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        ChronoConfig.from_json(text)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("bad", [None, 3, b"{}", ["{}"], {}])
def test_json_is_a_string(bad: Any) -> None:
    with pytest.raises(ConfigError, match="JSON string"):
        ChronoConfig.from_json(bad)


@pytest.mark.parametrize("bad", [{1: 2}, {None: 2}, {("a",): 2}, {"beta": {1: 2}}, None, [], "interval"])
def test_dictionaries_have_our_names(bad: Any) -> None:
    with pytest.raises(ConfigError):
        ChronoConfig.from_dict(bad)


@pytest.mark.parametrize(
    ("part", "field", "words"),
    [
        (ChronoConfig, "intervall", "did you mean 'interval'"),
        (BetaConfig, "Rate", "did you mean 'rate'"),
        (ControlConfig, "harm_threshold", r"harm=HarmGuardConfig\(threshold=...\)"),
        (ChronoConfig, "beta__rate", r"beta=BetaConfig\(rate=...\)"),
        (ChronoConfig, "zzzzzz", "known: alerts"),
    ],
)
def test_unknown_names_say_what_may_have_been_meant(part: type[Any], field: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        part(**{field: 3})


class _Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


ODD = {"no repr": _Unprintable(), "digits": 10**5000, "string": "x" * 10_000, "list": [[0] * 10_000]}


@pytest.mark.parametrize("bad", list(ODD.values()), ids=list(ODD))
def test_no_value_is_too_odd_for_a_message(bad: Any) -> None:
    for build in (lambda: ChronoConfig(interval=bad), lambda: BetaConfig(law=bad), lambda: ChronoConfig(beta=bad)):
        with pytest.raises(ConfigError) as caught:
            build()
        assert len(str(caught.value)) < 400


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_pretrained"):
        ChronoConfig.from_pretrained(tmp_path)
    binary = tmp_path / "weights.bin"
    binary.write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match="not UTF-8"):
        ChronoConfig.from_pretrained(binary)
    large = tmp_path / "large.json"
    large.write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        ChronoConfig.from_pretrained(large)
    with pytest.raises(ConfigError, match="path"):
        ChronoConfig.from_pretrained(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        ChronoConfig.from_pretrained("no\0such")


def test_output_dir_may_be_a_path(tmp_path: Path) -> None:
    config = ChronoConfig(telemetry=TelemetryConfig(output_dir=tmp_path))
    assert config.telemetry.output_dir == str(tmp_path)
    assert config == ChronoConfig(telemetry=TelemetryConfig(output_dir=str(tmp_path)))
    assert ChronoConfig.from_json(config.to_json()) == config
    assert ChronoConfig.observe(telemetry__output_dir=tmp_path).telemetry.output_dir == str(tmp_path)
