"""A preset is a contract: overrides tune it, and cannot turn it into something else."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from functools import reduce
from typing import Any

import pytest
import torch
from support.models import tiny_model

import chronomoe_hf
from chronomoe_hf.config import (
    PRESETS,
    BetaConfig,
    ChronoConfig,
    ControlConfig,
    HarmGuardConfig,
    LensConfig,
    VetoConfig,
)
from chronomoe_hf.errors import ConfigError


def at(config: ChronoConfig, path: str) -> Any:
    return reduce(getattr, path.split("."), config)


def changed(config: ChronoConfig, base: ChronoConfig) -> dict[str, Any]:
    """Dotted path -> value of every setting in which `config` differs from `base`."""

    def walk(new: dict[str, Any], old: dict[str, Any], prefix: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in new.items():
            if isinstance(value, dict):
                out |= walk(value, old[name], f"{prefix}{name}.")
            elif value != old[name]:
                out[f"{prefix}{name}"] = value
        return out

    return walk(config.to_dict(), base.to_dict(), "")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "overrides",
    [
        {"beta__stale_after": 500},
        {"beta": BetaConfig(stale_after=500)},
        {"beta": {"stale_after": 500}},
    ],
)
def test_an_override_changes_one_setting_and_nothing_else(name: str, overrides: dict[str, Any]) -> None:
    preset = ChronoConfig.preset(name)
    for config in (ChronoConfig.preset(name, **overrides), preset.replace(**overrides)):
        assert changed(config, preset) == {"beta.stale_after": 500}
        assert config.contract == name


def test_overrides_reach_a_part_of_a_part_and_top_level_fields() -> None:
    preset = ChronoConfig.balance()
    config = preset.replace(beta__rate=0.1, interval=50, control__harm__hold=1)
    assert changed(config, preset) == {"beta.rate": 0.1, "interval": 50, "control.harm.hold": 1}
    nested = preset.replace(control=ControlConfig(harm=HarmGuardConfig(hold=1)), beta={"rate": 0.1}, interval=50)
    assert nested == config
    assert config.differences(preset) == ["beta.rate", "control.harm.hold", "interval"]
    assert config.differences(nested) == preset.differences(preset.replace(contract=None)) == []
    assert BetaConfig(rate=0.2).replace(eta=0.5) == BetaConfig(rate=0.2, eta=0.5)


def test_a_value_written_out_counts_even_where_it_is_the_default() -> None:
    config = ChronoConfig.original(control=ControlConfig(scale_max=2.0))
    assert changed(config, ChronoConfig.original()) == {"control.scale_max": 2.0}
    assert ControlConfig().scale_max == 2.0  # that is why it had to be remembered
    with pytest.raises(ConfigError, match=r"beta\.law is 'none'"):
        ChronoConfig.observe(beta=BetaConfig(law="coherence"))
    assert BetaConfig(law="coherence") == BetaConfig()
    for part in (copy.deepcopy(ControlConfig(scale_max=2.0)), pickle.loads(pickle.dumps(ControlConfig(scale_max=2.0)))):
        assert ChronoConfig.original(control=part) == config
    assert ChronoConfig.original(control=ControlConfig().replace(scale_max=2.0)) == config


CONTRADICTIONS = [
    ("observe", {"beta__law": "coherence"}, "beta.law"),
    ("observe", {"control__enabled": True}, "control.enabled"),
    ("observe", {"lens": LensConfig(enabled=True)}, "lens.enabled"),
    ("protect", {"beta__law": "balance"}, "beta.law"),
    ("balance", {"beta": BetaConfig(law="none")}, "beta.law"),
    ("balance", {"beta__scope": "routing"}, "beta.scope"),
    ("balance", {"lens__enabled": True}, "lens.enabled"),
    ("original", {"control__gate": "integral"}, "control.gate"),
    ("original", {"lens__basis": "scaled"}, "lens.basis"),
    ("original", {"control__harm__restart": True}, "control.harm.restart"),
]


@pytest.mark.parametrize(("name", "overrides", "path"), CONTRADICTIONS)
def test_a_contradiction_is_refused_wherever_it_is_tried(name: str, overrides: dict[str, Any], path: str) -> None:
    preset = ChronoConfig.preset(name)
    for build in (lambda: ChronoConfig.preset(name, **overrides), lambda: preset.replace(**overrides)):
        with pytest.raises(ConfigError, match=rf"ChronoConfig\.{name}\(\).*{path}.*Leave {path} out"):
            build()
    free = preset.replace(contract=None).replace(**overrides)  # the way out, said out loud
    with pytest.raises(ConfigError, match=path):
        dataclasses.replace(free, contract=name)
    data = {**free.to_dict(), "contract": name}
    with pytest.raises(ConfigError, match=path):
        ChronoConfig.from_dict(data)


def test_dataclasses_replace_cannot_swap_a_part_silently() -> None:
    with pytest.raises(ConfigError, match=r"beta\.law is 'balance'"):
        dataclasses.replace(ChronoConfig.balance(), beta=BetaConfig(rate=0.1))
    with pytest.raises(ConfigError, match=r"beta\.law is 'none'"):
        dataclasses.replace(ChronoConfig.observe(), beta=BetaConfig(stale_after=500))


def test_protect_may_be_tuned_down() -> None:
    config = ChronoConfig.protect(veto__enabled=False, lens__enabled=False, control__enabled=False)
    assert config == ChronoConfig(
        veto=VetoConfig(enabled=False), lens=LensConfig(enabled=False), control=ControlConfig(enabled=False)
    )
    assert ChronoConfig() == ChronoConfig.protect()
    assert hash(ChronoConfig()) == hash(ChronoConfig.protect())


def test_a_config_file_may_name_a_preset_and_what_differs() -> None:
    config = ChronoConfig.from_json('{"contract": "balance", "beta": {"rate": 0.1}}')
    assert config == ChronoConfig.balance(beta__rate=0.1)
    assert config.contract == "balance"
    assert ChronoConfig.from_json(config.to_json()).contract == "balance"
    assert ChronoConfig.from_json('{"beta": {"rate": 0.1}}').contract is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"beta__rat": 0.1}, "did you mean 'rate'"),
        ({"bta__rate": 0.1}, "did you mean 'beta'"),
        ({"interval__x": 0.1}, "interval is a value"),
        ({"beta": {"rate": 0.1}, "beta__rate": 0.2}, "beta.*given twice|rate is given twice"),
        ({"beta": VetoConfig()}, "beta must be BetaConfig"),
        ({"beta": 3}, "beta must be BetaConfig, got 3"),
        ({"beta": None}, "beta must be BetaConfig, got None"),
        ({"contract": "observe"}, "contract is set by the preset"),
        ({"beta__law": "balanc"}, "did you mean 'balance'"),
    ],
)
def test_overrides_that_name_nothing_are_refused(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ChronoConfig.balance(**overrides)


@pytest.mark.parametrize(("bad", "words"), [("guard", "known: observe, protect"), ("Observ", "did you mean 'observe'")])
def test_unknown_presets_are_named(bad: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ChronoConfig.preset(bad)


@pytest.mark.parametrize("bad", [["x"], None, 3, {}])
def test_a_preset_is_named_by_a_string(bad: Any) -> None:
    with pytest.raises(ConfigError, match="no preset"):
        ChronoConfig.preset(bad)


def test_original_has_the_laws_and_constants_of_the_documents() -> None:
    """Written from the seed documents and SPEC sections 4 to 6, not from the preset table."""
    expected = {
        "beta.law": "coherence",
        "beta.scope": "routing",
        "beta.centred": False,
        "beta.eta": 0.01,
        "beta.tau": 0.5,
        "beta.k_max": 0.3,
        "veto.enabled": True,
        "veto.signal": "js",
        "veto.threshold": 0.2,
        "control.gate": "pressure",
        "control.c1": 1.0,
        "control.c2": 0.0,
        "control.pressure_decay": 0.8,
        "control.pressure_cap": 0.5,
        "control.scale_max": 0.5,
        "control.warmup_steps": 100,
        "control.warmup_scale_max": 0.02,
        "control.forget_base": 0.02,
        "control.forget_gain": 0.10,
        "control.min_pressure": 0.01,
        "control.harm.threshold": 0.02,
        "control.harm.min_scale": 0.01,
        "control.harm.factor": 0.5,
        "control.harm.floor": 0.1,
        "control.harm.recovery": 0.2,
        "control.harm.abstain": 0.15,
        "control.harm.restart": False,
        "control.harm.hold": 0,
        "control.quota_top2": 0.90,
        "lens.basis": "router",
        "lens.reader": "mean",
        "lens.memory": 0.0,
        "lens.train_router": True,
        "alerts.neff_floor": 0.6,
        "alerts.top2_pre": 0.75,
        "alerts.top2_confirmed": 0.85,
        "alerts.pre_after": 3,
        "alerts.confirmed_after": 5,
        "lifecycle.dry_run.prune_threshold": 0.3,
        "lifecycle.dry_run.starvation_threshold": 0.5,
        "lifecycle.dry_run.min_tokens": 100,
        "lifecycle.dry_run.after_step": 1000,
        "lifecycle.dry_run.coherence_tokens": 1000,
        "lifecycle.dry_run.confirmations": 1,
    }
    config = ChronoConfig.original()
    assert {path: at(config, path) for path in expected} == expected
    assert ChronoConfig.original(lens__memory=0.5).lens.basis == "router"


def test_a_tuned_observe_still_leaves_the_model_alone() -> None:
    """The reproduction of the defect: one changed field of beta made `observe` steer after three steps."""
    torch.manual_seed(0)
    model = tiny_model("mixtral").eval()
    ids = torch.randint(4, 60, (4, 12))
    native = model(input_ids=ids).logits
    config = ChronoConfig.observe(beta=BetaConfig(stale_after=500), interval=1)
    model = chronomoe_hf.wrap(model, config).train()
    system = chronomoe_hf.system_of(model)
    for step in range(1, 4):
        model(input_ids=ids)
        system.step(step)
    model.eval()
    assert all(layer.tokens for layer in system.last_snapshot.layers)  # type: ignore[union-attr]
    assert torch.equal(model(input_ids=ids).logits, native)


def test_original_runs_by_its_own_laws() -> None:
    """Beta is not centred, and its first move is the plan's: eta (phi_slow - 0.5) for every expert that was seen."""
    torch.manual_seed(0)
    ids = torch.randint(4, 60, (8, 16))
    model = chronomoe_hf.wrap(tiny_model("mixtral").train(), ChronoConfig.original(interval=1))
    system = chronomoe_hf.system_of(model)
    model(input_ids=ids)
    system.step(1)
    for layer_id in range(2):
        states = system.coherence(layer_id).snapshot(1)
        want = [0.0 if s.phi_slow is None else 0.01 * (s.phi_slow - 0.5) for s in states.values()]
        beta = system.router_state(layer_id).beta_coeff.tolist()
        assert beta == pytest.approx(want, abs=1e-7)
        assert abs(sum(beta)) > 0.01, "a centred law would pass too"
    model(input_ids=ids)
    assert system.step(2) is not None
