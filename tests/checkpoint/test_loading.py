"""Loading a state: all or nothing, every field checked, and config decides what acts."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.models import tiny_batch, tiny_model
from torch import Tensor

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoSystem
from chronomoe_hf.checkpoint.fingerprint import compare_fingerprints
from chronomoe_hf.checkpoint.state_file import read_state, write_state
from chronomoe_hf.errors import StateCorruptError, StateError, StateMismatchError, StateMissingError, StateWriteError

NAN = float("nan")


def governed(config: ChronoConfig, steps: int = 3, **model: Any) -> ChronoSystem:
    """A wrapped tiny Mixtral after some steps in training mode."""
    wrapped = chronomoe_hf.wrap(tiny_model("mixtral", **model), config)
    system = chronomoe_hf.system_of(wrapped)
    wrapped.train()
    for step in range(1, steps + 1):
        wrapped(**tiny_batch("mixtral", seed=step))
        system.step(step)
    return system


def lens_config(**fields: Any) -> ChronoConfig:
    """protect, with a lens that opens at the first evaluation."""
    control = {"integral_target": 1.0, "integral_gain": 5.0, "min_pressure": 0.0, "lens_spread_max": 1e6}
    return ChronoConfig.from_dict(
        {"interval": 1, "alerts": {"min_window_tokens": 1}, "beta": {"eta": 0.2}, "control": control, **fields}
    )


def logits(system: ChronoSystem) -> Tensor:
    system.model.eval()
    with torch.no_grad():
        return system.model(**tiny_batch("mixtral", seed=9)).logits


def native_logits(system: ChronoSystem) -> Tensor:
    plain = chronomoe_hf.unwrap(copy.deepcopy(system.model)).eval()
    with torch.no_grad():
        return plain(**tiny_batch("mixtral", seed=9)).logits


def assert_unchanged(system: ChronoSystem, before: dict[str, Any]) -> None:
    after = system.state_dict()
    assert after["meta"] == before["meta"]
    assert set(after["tensors"]) == set(before["tensors"])
    for name, value in before["tensors"].items():
        assert torch.equal(after["tensors"][name], value), name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    system = governed(lens_config())
    state = system.state_dict()
    assert state["tensors"]["beta_LE"].any() and any(lens.scale > 0 for lens in system.lenses.values())
    assert system.save(tmp_path / "saved")
    return tmp_path / "saved"


# ---- all or nothing -------------------------------------------------------------------------------------------------


def set_tensor(name: str, change: Any) -> Any:
    def apply(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name])

    return apply


def drop_tensor(name: str) -> Any:
    return lambda tensors, meta: tensors.pop(name)


def set_meta(name: str, value: Any) -> Any:
    return lambda tensors, meta: meta.update({name: value})


def drop_meta(name: str) -> Any:
    return lambda tensors, meta: meta.pop(name)


def first_number(value: float) -> Any:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


FAULTS = {
    "beta broadcast": (set_tensor("beta_LE", lambda t: torch.full((1, 1), NAN)), r"beta_LE must be of shape \(2, 8\)"),
    "beta narrow": (set_tensor("beta_LE", lambda t: t[:, :4].clone()), r"beta_LE must be of shape"),
    "beta of one rank more": (set_tensor("beta_LE", lambda t: t[None]), r"beta_LE must be of shape"),
    "beta int32": (set_tensor("beta_LE", lambda t: t.int()), r"beta_LE must be torch\.float32"),
    "beta bf16": (set_tensor("beta_LE", lambda t: t.bfloat16()), r"beta_LE must be torch\.float32"),
    "ema fp32": (set_tensor("ema_CLE", lambda t: t.float()), r"ema_CLE must be torch\.float64"),
    "beta NaN": (set_tensor("beta_LE", first_number(NAN)), r"beta_LE must be finite, got '1 NaN"),
    "clock infinite": (set_tensor("ema_CLE", first_number(float("inf"))), r"ema_CLE must be finite"),
    "two clocks": (set_tensor("ema_CLE", lambda t: t[:2].clone()), r"ema_CLE must be of shape \(3, 2, 8\)"),
    "negative tokens": (set_tensor("tokens_LE", first_number(-5)), r"tokens_LE must be within"),
    "relevance above 1": (set_tensor("relevance_L", first_number(2.0)), r"relevance_L must be within \[0, 1\]"),
    "no clocks": (drop_tensor("ema_CLE"), "lacks ema_CLE"),
    "a stranger": (lambda tensors, meta: tensors.update(extra=torch.zeros(1)), "holds tensors that no state has"),
    "lens without U": (drop_tensor("lens.0.U"), "lens of layer 0 lacks U"),
    "lens transposed": (set_tensor("lens.0.V", lambda t: t.T.contiguous()), r"lens\.0\.U must be of shape"),
    "lens fp64": (set_tensor("lens.1.V", lambda t: t.double()), r"lens\.1\.V must be torch\.float32"),
    "lens NaN": (set_tensor("lens.1.U", first_number(NAN)), r"lens\.1\.U must be finite"),
    "lens scale below 0": (set_tensor("lens.1.scale", lambda t: t - 9), r"lens\.1\.scale must be at least 0"),
    "lens of no layer": (
        lambda tensors, meta: tensors.update({"lens.7.V": tensors["lens.0.V"].clone()}),
        r"lens\.7\.V for 2 layers",
    ),
    **{
        f"no {name}": (drop_meta(name), rf"lacks {name} \(")
        for name in ("controller", "lifecycle", "alerts", "window_steps", "steering", "governed", "run_id")
    },
    "short steering": (set_meta("steering", [True]), "steering must be a list of 2 entries"),
    "steering of numbers": (set_meta("steering", [1, 0]), "steering must be a list of true or false"),
    "alerts 5": (set_meta("alerts", 5), "alerts must be a table, got 5"),
    "alerts empty": (set_meta("alerts", {}), r"alerts\.streak must be"),
    "alert of strings": (
        set_meta("alerts", {"streak": {}, "active": ["x"], "baseline": {}, "governed": False}),
        r"alerts\.active must be",
    ),
    "run_id of escapes": (set_meta("run_id", "\x1b[31m" * 1000), "run_id must be 1 to 64 letters"),
    "window_steps -1": (set_meta("window_steps", -1), "window_steps must be a non-negative integer"),
    "governed 1": (set_meta("governed", 1), "governed must be true or false"),
    "controller of others": (set_meta("controller", {"layers": []}), "controller state must have exactly"),
    "controller of no layers": (
        lambda tensors, meta: meta["controller"].update(layers=5),
        "controller must be what a controller saves",
    ),
    "controller NaN": (
        lambda tensors, meta: meta["controller"]["layers"][0].update(pressure="high"),
        "pressure must be a finite float",
    ),
    "lifecycle of strings": (set_meta("lifecycle", {"layers": ["x", "y"]}), "lifecycle state is malformed"),
    "disagreement 7": (set_meta("topk_disagreement", [7, None]), r"topk_disagreement must be .*\[0, 1\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_state_changes_nothing(saved: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    system = governed(ChronoConfig(interval=2), steps=5)
    before = system.state_dict()
    before_logits = logits(system)
    tensors, meta = read_state(saved)
    damage(tensors, meta)
    with pytest.raises(StateCorruptError, match=message) as caught:
        system.load_state_dict({"tensors": tensors, "meta": meta})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert_unchanged(system, before)
    assert torch.equal(logits(system), before_logits)


def test_a_sealed_faulty_file_is_refused_too(saved: Path, tmp_path: Path) -> None:
    """The reproduction: a NaN of shape (1, 1) in a file pair whose every checksum is right."""
    tensors, meta = read_state(saved)
    tensors["beta_LE"] = torch.full((1, 1), NAN)
    assert write_state(tmp_path / "forged", tensors, meta)
    system = governed(lens_config(), steps=1)
    before = system.state_dict()
    with pytest.raises(StateCorruptError, match="beta_LE must be of shape"):
        system.load(tmp_path / "forged")
    assert_unchanged(system, before)


def test_a_lens_of_another_model_changes_nothing(saved: Path) -> None:
    system = governed(lens_config(), steps=1)
    before = system.state_dict()
    tensors, meta = read_state(saved)
    tensors["lens.1.V"], tensors["lens.1.U"] = torch.zeros(16, 1), torch.zeros(1, 16)
    with pytest.raises(StateMismatchError, match="layer 1: lens state has shapes"):
        system.load_state_dict({"tensors": tensors, "meta": meta})
    assert_unchanged(system, before)


def test_a_sound_state_comes_back_bit_for_bit(saved: Path) -> None:
    """The checks are no alarm on everything."""
    system = governed(lens_config(), steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        system.load(saved)
    tensors, meta = read_state(saved)
    state = system.state_dict()
    assert {name: state["meta"][name] for name in ("step", "run_id", "governed", "steering")} == {
        name: meta[name] for name in ("step", "run_id", "governed", "steering")
    }
    for name, value in tensors.items():
        assert torch.equal(state["tensors"][name], value), name
    assert not torch.equal(logits(system), native_logits(system)), "nothing steers"


def test_columns_of_another_version_start_the_open_window_afresh(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    system = governed(lens_config(), steps=1)
    tensors, meta = read_state(saved)
    tensors["window_LR"] = torch.ones(2, 7, dtype=torch.float64)
    meta["window_steps"] = 3
    system.load_state_dict({"tensors": tensors, "meta": meta})
    assert "open window" in caplog.text
    assert system.window_steps == 0 and not system.step_state.window_LR.any()
    assert torch.equal(system.step_state.beta_LE, tensors["beta_LE"])


def test_a_state_that_could_not_be_loaded_is_not_written(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    for strict in (False, True):
        system = governed(lens_config(checkpoint={"strict_save": strict}))
        system.step_state.ema_CLE[0, 0, 0] = NAN
        if strict:
            with pytest.raises(StateWriteError, match=r"ema_CLE must be finite"):
                system.save(saved)
        else:
            assert system.save(saved) is False
            assert "ema_CLE must be finite" in caplog.text
        assert read_state(saved)[1]["step"] == 3, "the good state is still there"


# ---- golden files of whole systems ----------------------------------------------------------------------------------

DATA = Path(__file__).resolve().parent.parent / "data"


def test_a_system_saved_by_0_1_0_beside_its_weights_steers_as_it_did() -> None:
    """Written by chronomoe_hf 0.1.0 (schema 1): protect after 5 steps of interval 2, with open lenses."""
    tensors, meta = read_state(DATA / "state_v1_system")
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(tiny_model("mixtral"), lens_config(interval=2)))
    system.load(DATA / "state_v1_system")
    assert (system.global_step, system.window_steps, system.run_id, system.governed) == (5, 1, "6c3c48ccdec2", True)
    assert system.lenses[0].scale == 0.2515001097695864 and system.lenses[1].scale == 0.398
    assert torch.equal(system.step_state.beta_LE, tensors["beta_LE"])
    expected = [-0.0241, -0.0143, -0.0240, 0.0197, 0.0560, -0.0430, -0.0276, 0.0573]
    assert system.router_state(0).beta_coeff.tolist() == pytest.approx(expected, abs=1e-4)
    assert not torch.equal(logits(system), native_logits(system))
    names, live = dict.fromkeys(meta["fingerprint"], "x"), dict.fromkeys(system.fingerprint(), "x")
    assert names != live and compare_fingerprints(names, live) == [], "its names of expert tensors are understood"


def test_a_system_of_schema_2_comes_back() -> None:
    """Of schema 2.0: balance after 5 steps of interval 4."""
    tensors, _ = read_state(DATA / "state_v2_system")
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(tiny_model("mixtral"), ChronoConfig.balance(interval=4)))
    system.load(DATA / "state_v2_system")
    assert (system.global_step, system.window_steps, system.run_id, system.governed) == (5, 1, "d44bca8defb9", True)
    assert torch.equal(system.step_state.gain_LE, tensors["gain_LE"]) and tensors["gain_LE"].all()
    raw = safetensors.torch.load_file(DATA / "state_v2_system" / "chronomoe" / "state.safetensors")["window_LR"]
    row, window = system.step_state.row, system.step_state.window_LR
    assert raw.shape[1] == row.size - 3 * 8, "bad test setup: it knows gates, norms and first choices"
    assert torch.equal(window[:, : 8 + 4 + 8], raw[:, : 8 + 4 + 8]) and row.count(window).sum() > 0, "counts, scores"
    assert torch.equal(window[:, -7:], raw[:, -7:]) and not window[:, row.outputs].any()
    expected = [-0.3358, -0.0809, 0.1511, 0.1722, -0.0305, 0.0219, 0.1734, -0.0715]
    assert system.router_state(0).beta_coeff.tolist() == pytest.approx(expected, abs=1e-4)
    assert not torch.equal(logits(system), native_logits(system))


# ---- a directory without state --------------------------------------------------------------------------------------


def test_an_explicit_load_of_nothing_raises(tmp_path: Path) -> None:
    system = governed(ChronoConfig.observe(), steps=1)
    before = system.state_dict()
    for place in (tmp_path, tmp_path / "typo", tmp_path / "typo" / "deeper"):
        with pytest.raises(StateMissingError, match=r"no chronomoe state in .*pass the directory of a checkpoint"):
            system.load(place)
    assert_unchanged(system, before)
    with pytest.warns(UserWarning, match="starting with fresh statistics"):
        assert system.load(tmp_path, on_missing="fresh") is None


def test_a_state_of_another_step_changes_nothing(saved: Path) -> None:
    system = governed(lens_config(), steps=1)
    before = system.state_dict()
    with pytest.raises(StateError, match="holds chronomoe state of step 3, but .* step 4"):
        system.load(saved, step=4)
    assert_unchanged(system, before)
    assert system.load(saved, step=3) is not None


# ---- config decides what acts ---------------------------------------------------------------------------------------

PRESETS = {
    "observe": ChronoConfig.observe(interval=1),
    "protect": lens_config(),
    "balance": ChronoConfig.balance(interval=1),
}


@pytest.mark.parametrize("now", PRESETS)
@pytest.mark.parametrize("before", PRESETS)
def test_every_preset_into_every_preset(before: str, now: str, tmp_path: Path) -> None:
    old = governed(PRESETS[before], steps=6)
    assert old.save(tmp_path)
    tensors, _ = read_state(tmp_path)
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(tiny_model("mixtral"), PRESETS[now]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        system.load(tmp_path)
    said = [str(item.message) for item in caught if "left unused" in str(item.message)]
    open_lens = any(float(value) > 0 for name, value in tensors.items() if name.endswith(".scale"))
    assert open_lens is (before == "protect"), "bad test setup"
    expected = now != before and before != "observe"
    assert bool(said) is expected, said
    if expected:
        assert "the beta of layers 0, 1" in said[0]
        assert ("the open lens of layer" in said[0]) is (before == "protect")
    assert torch.equal(system.step_state.ema_CLE, tensors["ema_CLE"]), "the statistics come in any case"
    assert torch.equal(system.step_state.tokens_LE, tensors["tokens_LE"])
    if now == before:
        assert torch.equal(system.step_state.beta_LE, tensors["beta_LE"])
        same_governor = logits(system)
        assert torch.equal(same_governor, logits(old))
        assert torch.equal(same_governor, native_logits(system)) is (now == "observe")
    else:
        assert not system.step_state.beta_LE.any()
        assert torch.equal(logits(system), native_logits(system)), "something steers that was saved by another law"


def test_observe_is_bit_identical_after_loading_a_governed_state_and_goes_on_so(tmp_path: Path) -> None:
    governed(PRESETS["balance"], steps=30).save(tmp_path)
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(tiny_model("mixtral"), PRESETS["observe"]))
    with pytest.warns(UserWarning, match="left unused"):
        meta = system.load(tmp_path)
    assert meta is not None and meta["step"] == 30 and meta["governed"]
    system.model.train()
    for step in range(31, 35):
        system.model(**tiny_batch("mixtral", seed=step))
        system.step(step)
        assert torch.equal(logits(system), native_logits(system))
        system.model.train()
    assert not system.governed and not any(system.state_dict()["meta"]["steering"])


def test_scope_and_cap_are_of_the_config(tmp_path: Path) -> None:
    old = governed(ChronoConfig.from_dict({"interval": 1, "beta": {"eta": 5.0, "scope": "routing"}}), steps=6)
    assert old.step_state.beta_LE.abs().max() > 0.2
    old.save(tmp_path)
    config = ChronoConfig.from_dict({"interval": 1, "beta": {"scope": "selection", "k_max": 0.05}})
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(tiny_model("mixtral"), config))
    with pytest.warns(UserWarning, match="other chronomoe settings.*beta"):
        system.load(tmp_path)
    state = system.router_state(0)
    assert state.scope == "selection" and state.beta_on
    assert state.beta_full.abs().max() <= 0.05 * state.logit_std_ema * (1 + 1e-6)


def test_a_veto_that_is_off_means_relevance_1(saved: Path) -> None:
    tensors, meta = read_state(saved)
    tensors["relevance_L"] = torch.tensor([0.5, 0.25])
    for enabled, expected in ((True, [0.5, 0.25]), (False, [1.0, 1.0])):
        system = governed(lens_config(veto={"enabled": enabled}), steps=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            system.load_state_dict({"tensors": tensors, "meta": meta})
        assert system.step_state.relevance_L.tolist() == expected
        assert [float(system.router_state(layer).relevance) for layer in (0, 1)] == expected


def test_a_lens_the_model_cannot_take_is_named(saved: Path) -> None:
    system = governed(lens_config(lens={"enabled": False}), steps=1)
    with pytest.warns(UserWarning, match="left unused: the open lens of layer"):
        system.load(saved)
    assert system.router_state(0).beta_on, "beta acts under both settings"


def test_a_state_whose_config_is_unreadable_says_so(saved: Path) -> None:
    tensors, meta = read_state(saved)
    del meta["config"]
    system = governed(lens_config(), steps=1)
    with pytest.warns(UserWarning, match="moved by an unknown law"):
        system.load_state_dict({"tensors": tensors, "meta": meta})
    assert not system.step_state.beta_LE.any()
