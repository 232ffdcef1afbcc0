"""ChronoConfig: exact through JSON, strict about names, types and ranges."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chronomoe_hf.config import (
    CONFIG_NAME,
    AlertConfig,
    BetaConfig,
    CheckpointConfig,
    ChronoConfig,
    CoherenceConfig,
    ControlConfig,
    HarmGuardConfig,
    LensConfig,
    LifecycleConfig,
    ReplayConfig,
    TelemetryConfig,
    VetoConfig,
)
from chronomoe_hf.errors import ChronoError, ConfigError

PRESETS = ("observe", "protect", "balance", "original")
PARTS: dict[str, type[Any]] = {
    "coherence": CoherenceConfig,
    "alerts": AlertConfig,
    "beta": BetaConfig,
    "veto": VetoConfig,
    "control": ControlConfig,
    "lens": LensConfig,
    "lifecycle": LifecycleConfig,
    "telemetry": TelemetryConfig,
    "checkpoint": CheckpointConfig,
    "replay": ReplayConfig,
}


def leaves(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value, of a nested dictionary."""
    out: dict[str, Any] = {}
    for name, value in data.items():
        path = f"{prefix}{name}"
        out |= leaves(value, path + ".") if isinstance(value, dict) else {path: value}
    return out


def test_the_table_of_parts_is_complete() -> None:
    names = {item.name for item in dataclasses.fields(ChronoConfig)} - {"interval", "contract", "schema_version"}
    assert names == set(PARTS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name: str, tmp_path: Path) -> None:
    config = ChronoConfig.preset(name, interval=7)
    assert config.interval == 7
    assert ChronoConfig.from_json(config.to_json()) == config
    assert ChronoConfig.from_dict(config.to_dict()) == config
    path = config.save_pretrained(tmp_path / "new")
    assert path == tmp_path / "new" / CONFIG_NAME
    assert ChronoConfig.from_pretrained(tmp_path / "new") == config
    assert ChronoConfig.from_pretrained(path) == config
    assert ChronoConfig.from_json(config.to_json()).to_json() == config.to_json()


def test_presets_differ_where_they_should() -> None:
    observe, protect, balance, original = (ChronoConfig.preset(name) for name in PRESETS)
    assert protect == ChronoConfig()
    assert len({observe, protect, balance, original}) == 4
    assert (observe.beta.law, observe.control.enabled, observe.lens.enabled) == ("none", False, False)
    assert (protect.beta.law, protect.veto.enabled, protect.lens.enabled) == ("coherence", True, True)
    assert (balance.beta.law, balance.beta.scope, balance.lens.enabled) == ("balance", "selection", False)
    assert (balance.beta.dead_zone, balance.beta.rate, balance.beta.first_layer) == ((0.7, 2.0), 0.05, "floor")


def test_a_dead_zone_may_be_a_list_and_is_kept_as_a_tuple() -> None:
    config = ChronoConfig.balance(beta__dead_zone=[0, 3])
    assert config.beta.dead_zone == (0.0, 3.0) and hash(config)
    assert json.loads(config.to_json())["beta"]["dead_zone"] == [0.0, 3.0] == config.to_dict()["beta"]["dead_zone"]
    assert ChronoConfig.from_json(config.to_json()) == config
    assert ChronoConfig.balance(beta__dead_zone=None).beta.dead_zone is None
    floor = ChronoConfig.balance(beta__dead_zone=(0.3, None))
    assert ChronoConfig.from_json(floor.to_json()) == floor and floor.beta.dead_zone == (0.3, None)
    with pytest.raises(ConfigError, match=r"dead_zone\[1\] must be a finite number, got 'two'"):
        BetaConfig(dead_zone=(0.7, "two"))  # type: ignore[arg-type]


def test_veto_threshold_follows_the_signal() -> None:
    assert VetoConfig(signal="js").threshold == 0.2
    assert VetoConfig(signal="overlap").threshold == 0.1
    assert VetoConfig(signal="overlap", theta=0.3).threshold == 0.3


@pytest.mark.parametrize("part", sorted(PARTS))
def test_unknown_keys_are_named(part: str) -> None:
    data = ChronoConfig().to_dict()
    data[part]["tua"] = 1
    with pytest.raises(ConfigError, match=r"tua.*known"):
        ChronoConfig.from_dict(data)
    with pytest.raises(ConfigError, match="tua"):
        PARTS[part](tua=1)


def test_unknown_top_level_keys_are_named() -> None:
    with pytest.raises(ConfigError, match=r"intervall.*known: .*interval"):
        ChronoConfig.from_dict({"intervall": 3})


def test_everything_is_keyword_only_and_frozen() -> None:
    for part in (ChronoConfig, *PARTS.values()):
        with pytest.raises(TypeError):
            part(1)
        instance = part()
        field = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(instance, field, getattr(instance, field))
        assert hash(instance) == hash(part())


@pytest.mark.parametrize(
    ("part", "field", "bad"),
    [
        ("beta", "eta", 0.0),
        ("beta", "eta", -0.01),
        ("beta", "tau", 1.5),
        ("beta", "tau", "mean"),
        ("beta", "law", "loss_free"),
        ("beta", "scope", "weights"),
        ("beta", "k_max", 0.0),
        ("beta", "rate", "fast"),
        ("beta", "native", 1),
        ("beta", "dead_zone", (1.2, 2.0)),
        ("beta", "dead_zone", (0.5, 0.9)),
        ("beta", "dead_zone", (-0.1, 2.0)),
        ("beta", "dead_zone", (0.7,)),
        ("beta", "dead_zone", (0.7, 2.0, 3.0)),
        ("beta", "dead_zone", 0.7),
        ("beta", "first_layer", "none"),
        ("beta", "first_floor", 1.5),
        ("veto", "theta", 0.0),
        ("veto", "signal", "kl"),
        ("alerts", "neff_floor", 1.2),
        ("alerts", "top2_pre", -0.1),
        ("alerts", "pre_after", 0),
        ("alerts", "pre_after", 2.5),
        ("alerts", "min_window_tokens", -1),
        ("control", "pressure_decay", 1.1),
        ("control", "scale_max", -0.5),
        ("control", "gate", "heat"),
        ("control", "enabled", "yes"),
        ("control", "warmup_steps", True),
        ("lens", "basis", "random"),
        ("lifecycle", "prune_threshold", "none"),
        ("lifecycle", "prune_threshold", 2.0),
        ("lifecycle", "confirmations", 0),
        ("coherence", "max_tokens", 0),
        ("coherence", "max_tokens", 1.5),
        ("coherence", "max_tokens", "all"),
        ("coherence", "reference", "own"),
        ("telemetry", "on_error", "ignore"),
        ("telemetry", "output_dir", 3),
        ("checkpoint", "on_missing", "skip"),
        ("checkpoint", "repair", True),
    ],
)
def test_bad_values_name_the_field_and_the_value(part: str, field: str, bad: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        PARTS[part](**{field: bad})
    message = str(caught.value)
    assert field in message
    assert str(bad) in message
    with pytest.raises(ConfigError):
        ChronoConfig.from_dict({part: {field: bad}})


@pytest.mark.parametrize("bad", [0, -1, 2.5, "100", True])
def test_interval_is_a_positive_integer(bad: Any) -> None:
    with pytest.raises(ConfigError, match="interval"):
        ChronoConfig(interval=bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_field_takes_a_number_that_json_cannot_hold(bad: float) -> None:
    tried = 0
    for part in (*PARTS.values(), HarmGuardConfig):
        hints = typing.get_type_hints(part)
        for item in dataclasses.fields(part):
            if float in (hints[item.name], *typing.get_args(hints[item.name])):
                tried += 1
                with pytest.raises(ConfigError):
                    part(**{item.name: bad})
    assert tried > 20


def test_an_integer_is_accepted_for_a_number_and_equals_it() -> None:
    assert ChronoConfig(beta=BetaConfig(eta=1)) == ChronoConfig(beta=BetaConfig(eta=1.0))
    assert isinstance(BetaConfig(eta=1).eta, float)


def test_a_part_must_be_a_part() -> None:
    with pytest.raises(ConfigError, match="beta"):
        ChronoConfig(beta={"law": "none"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="beta"):
        ChronoConfig.from_dict({"beta": "none"})


def test_config_errors_are_both_ours_and_value_errors() -> None:
    assert issubclass(ConfigError, ChronoError)
    assert issubclass(ConfigError, ValueError)


@given(
    interval=st.integers(1, 10**6),
    eta=st.floats(1e-9, 10, allow_nan=False),
    tau=st.one_of(st.just("layer_mean"), st.floats(-1, 1)),
    floor=st.floats(0, 1),
    max_tokens=st.one_of(st.none(), st.just("auto"), st.integers(1, 10**6)),
    law=st.sampled_from(["none", "coherence", "balance"]),
)
def test_any_valid_config_survives_json_exactly(
    interval: int, eta: float, tau: Any, floor: float, max_tokens: Any, law: Any
) -> None:
    config = ChronoConfig(
        interval=interval,
        beta=BetaConfig(eta=eta, tau=tau, law=law),
        alerts=AlertConfig(neff_floor=floor),
        coherence=CoherenceConfig(max_tokens=max_tokens),
    )
    text = config.to_json()
    assert ChronoConfig.from_json(text) == config
    assert json.loads(text)["beta"]["eta"] == eta
