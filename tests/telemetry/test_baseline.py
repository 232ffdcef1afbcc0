"""The baseline: what a window's numbers may be wrong by, against a bootstrap; what changed, against plain numpy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from chronomoe_hf import metrics
from chronomoe_hf.config import AlertConfig
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.telemetry import AlertHistory, RoutingEvent, SystemSnapshot
from chronomoe_hf.telemetry.baseline import CHANGES, sampling_errors, share_errors, small_sample_bias

SHARES = np.array([0.22, 0.16, 0.15, 0.12, 0.1, 0.08, 0.07, 0.05, 0.03, 0.02])


def choices(tokens: int, top_k: int, generator: np.random.Generator) -> np.ndarray:
    """Which expert every token takes, ``[T, E]`` of 0 and 1: k different ones, by Gumbel noise on the logits."""
    noise_TE = generator.gumbel(size=(tokens, len(SHARES)))
    order_TE = np.argsort(-(np.log(SHARES) + noise_TE), axis=1)
    chosen_TE = np.zeros((tokens, len(SHARES)))
    np.put_along_axis(chosen_TE, order_TE[:, :top_k], 1.0, axis=1)
    return chosen_TE


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_errors_are_those_of_a_bootstrap_over_tokens(top_k: int) -> None:
    generator = np.random.default_rng(top_k)
    tokens = 3000
    chosen_TE = choices(tokens, top_k, generator)
    counts = chosen_TE.sum(axis=0).astype(int).tolist()
    drawn = []
    for _ in range(1500):
        weight_T = np.bincount(generator.integers(0, tokens, tokens), minlength=tokens)
        load = metrics.load_metrics((weight_T @ chosen_TE).astype(int).tolist(), top_k)
        drawn.append((load.n_effective, load.top2_share, load.max_violation, load.gini))
    found = sampling_errors(counts, top_k)[:4]
    for name, ours, theirs in zip(("neff", "top2", "violation", "gini"), found, np.std(drawn, axis=0), strict=True):
        assert ours == pytest.approx(theirs, rel=0.2), name
    shares = [(np.bincount(generator.integers(0, tokens, tokens), minlength=tokens) @ chosen_TE) for _ in range(1500)]
    expected_E = np.std(np.array(shares) / (tokens * top_k), axis=0)
    assert np.allclose(share_errors(counts, top_k), expected_E, rtol=0.15)


def test_a_small_sample_understates_the_effective_experts_by_what_is_said() -> None:
    generator = np.random.default_rng(0)
    true = metrics.effective_experts(SHARES)
    drawn = [generator.multinomial(200, SHARES).tolist() for _ in range(3000)]
    short = true - np.mean([metrics.effective_experts(counts) for counts in drawn])
    assert short == pytest.approx(np.mean([small_sample_bias(counts) for counts in drawn]), rel=0.25)


def snapshot(counts: list[int], step: int, history: AlertHistory, config: AlertConfig | None = None) -> SystemSnapshot:
    event = RoutingEvent.from_router_output(
        run_id="r",
        step=step,
        mode="TRAIN",
        layer_id=0,
        used_capacity=counts,
        n_experts=len(counts),
        top_k=2,
        phi_slow=[0.5 + 0.01 * step] * len(counts),
    )
    return SystemSnapshot.from_events(
        events=[event],
        step=step,
        run_id="r",
        model_name="m",
        n_layers=1,
        alert_history=history,
        config=config or AlertConfig(),
    )


def test_every_number_is_given_as_a_change_since_the_first_windows() -> None:
    history = AlertHistory()
    windows = [[30, 20, 5, 1], [50, 40, 30, 100], [900, 300, 200, 50], [1000, 200, 100, 20]]
    seen = [snapshot(counts, step, history).layers[0] for step, counts in enumerate(windows, 1)]
    assert seen[0].change == {}, "56 assignments are fewer than 50 an expert"
    base = [80, 60, 35, 101]  # two windows: 276 assignments
    for layer, counts in zip(seen[1:], windows[1:], strict=True):
        for name in set(CHANGES) - {"coherence_mean"}:
            now, then = (getattr(metrics.load_metrics(each, 2), name) for each in (counts, base))
            assert layer.change[name] == pytest.approx(now - then), name
    assert [round(layer.change["coherence_mean"], 6) for layer in seen[1:]] == [0.0, 0.01, 0.02]
    assert seen[3].error["n_effective"] >= sampling_errors(windows[3], 2).n_effective > 0
    record = seen[3].to_record()
    assert json.loads(json.dumps(record))["change"]["n_effective"] == pytest.approx(
        seen[3].change["n_effective"], rel=1e-5
    )
    (row,) = history.reference.to_record([seen[3]], 4)["layers"]
    assert row["expert_token_counts"] == base and row["windows"] == 2 and row["step"] == 2
    assert row["n_effective"] == pytest.approx(metrics.effective_experts(base))


def test_the_baseline_and_what_it_watches_survive_json() -> None:
    first, second = AlertHistory(), AlertHistory()
    story = [[500, 400, 300, 200], [480, 420, 310, 190], [900, 80, 10, 0], [910, 90, 0, 0], [950, 50, 0, 0]]
    for step, counts in enumerate(story, 1):
        one = snapshot(counts, step, first)
        state = json.loads(json.dumps(second.state_dict()))
        second = AlertHistory()
        second.load_state_dict(state)
        two = snapshot(counts, step, second)
        assert two.to_record()["layers"] == one.to_record()["layers"]
        assert [a.to_record() for a in two.active_alerts] == [a.to_record() for a in one.active_alerts]


def test_a_given_baseline_is_not_added_to() -> None:
    history = AlertHistory()
    history.reference.set_counts("profile", {0: {"expert_token_counts": [100, 100, 100, 100]}})
    layer = snapshot([400, 0, 0, 0], 1, history).layers[0]
    assert layer.change["n_effective"] == pytest.approx(1.0 - 4.0)
    assert history.baseline(0) == pytest.approx(4.0) and history.reference.source == "profile"
    history.restart()
    assert history.baseline(0) is None and history.reference.source == "windows"


def test_the_history_of_another_model_is_refused() -> None:
    history = AlertHistory()
    snapshot([1, 1, 1, 1], 1, history)
    with pytest.raises(ConfigError, match="4"):
        snapshot([1, 1, 1], 2, history)


def test_no_tokens_have_no_error() -> None:
    assert sampling_errors([0, 0], 1) == (None,) * 5 and share_errors([0, 0], 1) == [math.inf] * 2
