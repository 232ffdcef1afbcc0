"""The controller on real snapshots: closed loops, abstention, records, state."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from support.laws import HAND

from chronomoe_hf.controller import ControlConfig, ControlDecision, Controller
from chronomoe_hf.errors import ConfigError, StateCorruptError, StateMismatchError
from chronomoe_hf.lens.lens import ChronoLens, IdentityLens
from chronomoe_hf.telemetry import AlertHistory, RoutingEvent, SystemSnapshot, TelemetryWriter

D_MODEL = 4


def snapshot_of(
    counts_LE: Sequence[Sequence[int]], step: int, top_k: int = 2, history: AlertHistory | None = None
) -> SystemSnapshot:
    events = [
        RoutingEvent.from_router_output(
            run_id="run", step=step, mode="TRAIN", layer_id=i, used_capacity=counts, n_experts=len(counts), top_k=top_k
        )
        for i, counts in enumerate(counts_LE)
    ]
    return SystemSnapshot.from_events(
        events=events,
        step=step,
        run_id="run",
        model_name="toy",
        n_layers=len(counts_LE),
        alert_history=AlertHistory() if history is None else history,
    )


def controller_of(n_experts: int, config: ControlConfig | None = None) -> tuple[Controller, ChronoLens]:
    controller = Controller(n_layers=1, n_experts_per_layer=[n_experts], config=config).initialize(run_id="run")
    return controller, ChronoLens(d_model=D_MODEL, rank=1, layer_id=0)


def skewed(dominance: float, n_experts: int = 8, total: int = 80_000) -> list[int]:
    """Counts in which `dominance` of the assignments goes to two experts."""
    rest = total * (1 - dominance) / (n_experts - 2)
    return [round(total * dominance / 2)] * 2 + [round(rest)] * (n_experts - 2)


HEALTHY = [1000] * 8
COLLAPSED = [4000, 4000, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("gate", ["integral", "pressure"])
@pytest.mark.parametrize("counts", [HEALTHY, [1100, 900, 1000, 950, 1050, 700, 1300, 1000]])
def test_a_healthy_run_abstains_every_time(gate, counts):
    controller, lens = controller_of(8, ControlConfig(gate=gate))
    for evaluation in range(1, 21):
        (decision,) = controller.update(snapshot_of([counts], 100 * evaluation), {0: lens})
        assert decision.abstain_reason == "no_pressure"
        assert (decision.pressure, decision.integral, decision.scale, lens.scale) == (0.0, 0.0, 0.0, 0.0)
        assert decision.beta_multiplier == 1.0
    assert controller.layer_state(0).num_abstained == 20


def evaluations(reference, windows):
    """Debts of a run's windows; the first ones are its baseline."""
    history = AlertHistory()
    controller, lens = controller_of(8, ControlConfig(reference=reference))
    found = []
    for step, counts in enumerate(windows, 1):
        (decision,) = controller.update(snapshot_of([counts], step, history=history), {0: lens})
        found.append(decision.debt.total)
    return found


NARROW = [6000, 5000, 300, 300, 200, 100, 100, 0]  # n_effective 3, one expert dead


def test_against_its_baseline_a_layer_owes_only_what_the_run_lost():
    assert min(evaluations("level", [NARROW] * 5)) > 0.2
    assert evaluations("baseline", [NARROW] * 5) == [0.0] * 5, "it came like that"
    got_worse = evaluations("baseline", [NARROW] * 2 + [COLLAPSED] * 3)
    assert got_worse[:2] == [0.0, 0.0] and min(got_worse[2:]) > 0.0
    healthy = evaluations("baseline", [HEALTHY] * 2 + [COLLAPSED] * 2)
    assert healthy == evaluations("level", [HEALTHY] * 2 + [COLLAPSED] * 2), "from an even start both are the same"


def test_first_evaluation_of_a_collapsed_layer_by_hand():
    """E = 8, k = 2, everything on two experts: Neff 2, t 1, six dead."""
    controller, lens = controller_of(8, ControlConfig(**HAND))
    (decision,) = controller.update(snapshot_of([COLLAPSED], step=200), {0: lens})
    debt = 0.4 * (4.8 - 2) / 4.8 + 0.4 * 1 + 0.2 * 6 / 7
    assert decision.debt is not None
    assert decision.debt.total == pytest.approx(debt, abs=1e-9)
    assert decision.pressure == pytest.approx(0.2 * debt, abs=1e-9)
    assert decision.heat == decision.pressure
    assert decision.forgetting == pytest.approx(0.02 + 0.1 * 0.2 * debt, abs=1e-9)
    assert decision.beta_multiplier == pytest.approx(1 - decision.forgetting, abs=1e-15)
    assert decision.integral == pytest.approx(0.5 * (0.65 - 0.25), abs=1e-9)
    assert decision.scale == pytest.approx(0.2, abs=1e-9)
    assert lens.scale == decision.scale
    assert decision.abstain_reason is None
    assert decision.quota is not None
    assert decision.quota.dominant == (0, 1)


def test_original_gate_follows_pressure_and_the_warm_up_cap():
    controller, lens = controller_of(8, ControlConfig(**HAND, gate="pressure"))
    (decision,) = controller.update(snapshot_of([COLLAPSED], step=99), {0: lens})
    assert decision.scale == 0.02
    (decision,) = controller.update(snapshot_of([COLLAPSED], step=100), {0: lens})
    assert decision.scale == pytest.approx(min(decision.pressure, 0.5), abs=1e-15)
    assert decision.scale > 0.02


def test_integral_holds_the_floor_where_pressure_fades():
    """Neff/E between 0.6 and 0.65: no debt at all, and still a standing shortfall."""
    counts = [3400, 1900, 1300, 500, 300, 250, 200, 150]
    fraction = snapshot_of([counts], 100).layers[0].n_effective / 8
    assert 0.6 < fraction < 0.65, "bad test setup"
    scales = {}
    for gate in ("integral", "pressure"):
        controller, lens = controller_of(8, ControlConfig(gate=gate))
        for evaluation in range(1, 60):
            controller.update(snapshot_of([counts], 100 * evaluation), {0: lens})
        scales[gate] = lens.scale
    assert scales["pressure"] == 0.0
    assert scales["integral"] > 0.05


def test_a_draining_integral_keeps_acting_until_it_is_small():
    controller, lens = controller_of(8, ControlConfig(**HAND))
    controller.update(snapshot_of([COLLAPSED], 100), {0: lens})
    scales, step = [], 100
    while True:
        step += 100
        (decision,) = controller.update(snapshot_of([HEALTHY], step), {0: lens})
        if decision.abstain_reason == "no_pressure":
            break
        scales.append(decision.scale)
    assert len(scales) > 50, "0.2 * 0.98^n passes 0.01 after 148 evaluations"
    assert scales == sorted(scales, reverse=True)
    assert max(decision.integral, decision.pressure) < 0.01 <= scales[-1] + 1e-3


def wrong_way(config: ControlConfig, num: int, n_experts: int = 8, start: float = 0.8) -> list[ControlDecision]:
    """Closed loop: the top-2 share rises by 0.03 whenever the lens acts above 0.01, and falls back while it rests."""
    controller, lens = controller_of(n_experts, config)
    dominance, decisions = start, []
    for evaluation in range(1, num + 1):
        decisions += controller.update(snapshot_of([skewed(dominance, n_experts)], 100 * evaluation), {0: lens})
        assert lens.scale == decisions[-1].scale
        dominance = min(0.999, dominance + 0.03) if lens.scale > 0.01 else max(start, dominance - 0.03)
    return decisions


@pytest.mark.parametrize("gate", ["integral", "pressure"])
@pytest.mark.parametrize("n_experts", [8, 64])
@pytest.mark.parametrize(("start", "restart"), [(0.80, False), (0.86, False), (0.80, True)])
def test_a_lens_that_pushes_the_wrong_way_ends_in_abstention(gate, n_experts, start, restart):
    decisions = wrong_way(ControlConfig(**HAND, gate=gate).replace(harm__restart=restart), 10, n_experts, start)
    reasons = [decision.abstain_reason for decision in decisions]
    assert reasons[:3] == [None] * 3, "bad test setup: the lens hardly acted"
    assert sum(decision.harmed for decision in decisions) >= 3
    assert reasons[-1] == "harm_backoff"
    assert decisions[-1].scale == 0.0


@pytest.mark.parametrize("gate", ["integral", "pressure"])
def test_an_abstaining_lens_is_probed_again_gently_and_rarely(gate):
    held = wrong_way(ControlConfig(**HAND, gate=gate), 60)
    original = wrong_way(ControlConfig(**HAND, gate=gate).replace(harm__hold=0), 60)
    acting = [sum(not decision.abstained for decision in each) / 60 for each in (held, original)]
    assert 0.1 < acting[0] < 0.3, "probed, but rarely"
    assert acting[1] > 0.5, "the rule without a hold acts most of the time"
    # Every probe stays below a third of what the gate asked for without the guard.
    assert all(decision.scale < 0.33 * decision.scale_requested / decision.harm_backoff for decision in held[4:])


def test_a_lens_that_helps_is_left_alone():
    controller, lens = controller_of(8)
    dominance = 0.95
    for evaluation in range(1, 31):
        (decision,) = controller.update(snapshot_of([skewed(dominance)], 100 * evaluation), {0: lens})
        assert not decision.harmed
        assert decision.harm_backoff == 1.0
        dominance = max(0.25, dominance - 0.1 * lens.scale)
    assert dominance < 0.6, "the loop must actually close"


def test_the_guard_sees_concentration_at_k_8_that_the_plain_share_hides():
    controller, lens = controller_of(64, ControlConfig(**HAND))
    base = [800, 800] + [100] * 6 + [10] * 56
    worse = [900, 900] + [100] * 6 + [10] * 56
    before, after = (snapshot_of([counts], 200, top_k=8).layers[0] for counts in (base, worse))
    assert 0 < after.top2_share - before.top2_share < 0.08
    controller.update(snapshot_of([base], 200, top_k=8), {0: lens})
    (decision,) = controller.update(snapshot_of([worse], 300, top_k=8), {0: lens})
    assert decision.harmed
    assert decision.harm_backoff == 0.5


def test_a_thin_window_holds_the_state_and_closes_the_lens():
    controller, lens = controller_of(8)
    controller.update(snapshot_of([COLLAPSED], 200), {0: lens})
    before = controller.layer_state(0).state_dict()
    for thin in ([2, 1, 0, 0, 0, 0, 0, 0], [0] * 8):
        (decision,) = controller.update(snapshot_of([thin], 300), {0: lens})
        assert decision.abstain_reason == "insufficient_evidence"
        assert (decision.debt, decision.quota, decision.beta_multiplier, lens.scale) == (None, None, 1.0, 0.0)
        json.dumps(decision.to_record(), allow_nan=False)
    after = controller.layer_state(0).state_dict()
    for name in ("pressure", "integral", "harm_backoff", "last_top2"):
        assert after[name] == before[name]
    # The lens was closed meanwhile, so what happened next is not blamed on it.
    (decision,) = controller.update(snapshot_of([[8000, 0, 0, 0, 0, 0, 0, 0]], 400), {0: lens})
    assert not decision.harmed


def test_a_lens_that_would_scatter_tokens_stays_closed_and_starts_small_when_it_no_longer_would():
    controller, lens = controller_of(8)
    config = controller.config
    spread = config.lens_spread_max + 0.01

    def seen(step: int, spread: float):
        snapshot = snapshot_of([COLLAPSED], step)
        snapshot.layers[0].lens_spread = spread
        return snapshot

    for step in range(1, 6):
        (decision,) = controller.update(seen(step, spread), {0: lens})
        assert decision.abstain_reason == "lens_unfit"
        assert decision.scale == lens.scale == 0.0
        assert decision.to_record()["lens"]["spread"] == spread
    assert controller.layer_state(0).integral == config.integral_step, "it must not wind up meanwhile"
    (decision,) = controller.update(seen(6, config.lens_spread_max), {0: lens})
    assert not decision.abstained
    assert 0.0 < lens.scale <= config.integral_leak * config.integral_step + config.pressure_cap


@pytest.mark.parametrize("lenses", [None, {}, [], {0: IdentityLens(0, reason="not linear")}])
def test_without_a_lens_pressure_is_tracked_and_the_request_is_logged(lenses):
    controller, _ = controller_of(8)
    (decision,) = controller.update(snapshot_of([COLLAPSED], 200), lenses)
    assert decision.abstain_reason == "lens_unsupported"
    assert decision.scale == 0.0
    assert decision.scale_requested > 0.1
    assert decision.pressure > 0.1
    assert decision.beta_multiplier < 1.0


def test_lenses_may_be_a_list_and_layers_do_not_mix():
    controller = Controller(n_layers=2, n_experts_per_layer=[8, 4]).initialize(run_id="run")
    lenses = [ChronoLens(D_MODEL, 1, layer_id=1), ChronoLens(D_MODEL, 1, layer_id=0)]
    decisions = controller.update(snapshot_of([HEALTHY, [4000, 4000, 0, 0]], 200), lenses)
    assert [decision.layer_id for decision in decisions] == [0, 1]
    assert lenses[1].scale == 0.0
    assert lenses[0].scale > 0.0


def test_disabled_controller_closes_the_lens_and_says_nothing():
    controller, lens = controller_of(8, ControlConfig(enabled=False))
    lens.set_scale(0.3)
    assert controller.update(snapshot_of([COLLAPSED], 200), {0: lens}) == []
    assert lens.scale == 0.0


def test_record_is_strict_json_with_the_active_alerts(tmp_path):
    controller, lens = controller_of(8)
    writer = TelemetryWriter(run_id="run", output_dir=tmp_path)
    controller.initialize(run_id="run", writer=writer)
    history = AlertHistory()
    for evaluation in range(1, 4):
        snapshot = snapshot_of([COLLAPSED], 100 * evaluation, history=history)
        (decision,) = controller.update(snapshot, {0: lens})
    writer.close()
    record = json.loads(json.dumps(decision.to_record(), allow_nan=False))
    assert record["alerts"] == ["PRE_COLLAPSE"]
    assert record["debt_parts"]["top2"] == 1.0
    assert record["debt"] == decision.debt.total
    assert record["quota"] == {"dominant": [0, 1], "share": [0.125, 0.125] + [1.0] * 6, "enforced": False}
    assert record["observed"]["n_effective"] == pytest.approx(2.0)
    assert record["lens"]["rank"] == 1
    (path,) = tmp_path.rglob("control_decisions.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [100, 200, 300]
    assert lines[-1]["layer_id"] == 0


def test_state_returns_bit_for_bit_and_the_run_continues_identically():
    windows = [skewed(0.55 + 0.043 * math.sin(3.1 * n) ** 2 + 0.011 * n) for n in range(1, 25)]
    straight, lens = controller_of(8)
    expected = [
        straight.update(snapshot_of([counts], 100 * n), {0: lens})[0].to_record() for n, counts in enumerate(windows, 1)
    ]
    first, lens = controller_of(8)
    for n, counts in enumerate(windows[:11], 1):
        first.update(snapshot_of([counts], 100 * n), {0: lens})
    saved = json.dumps(first.state_dict(), allow_nan=False)
    second, _ = controller_of(8)
    second.load_state_dict(json.loads(saved))
    assert second.state_dict() == first.state_dict()
    assert json.dumps(second.state_dict(), allow_nan=False) == saved
    resumed = [
        second.update(snapshot_of([counts], 100 * n), {0: lens})[0].to_record()
        for n, counts in enumerate(windows[11:], 12)
    ]
    assert resumed == expected[11:]
    assert len({record["scale"] for record in resumed}) > 3, "bad test setup: the run did not move"


def test_foreign_and_torn_state_is_refused_and_leaves_the_controller_alone():
    controller, lens = controller_of(8)
    controller.update(snapshot_of([COLLAPSED], 200), {0: lens})
    good = controller.state_dict()
    other = Controller(n_layers=2, n_experts_per_layer=[8, 8]).state_dict()
    with pytest.raises(StateMismatchError, match=r"\[8, 8\]"):
        controller.load_state_dict(other)
    with pytest.raises(StateCorruptError, match="layers"):
        controller.load_state_dict({})
    for name, value in (("pressure", None), ("pressure", "0.1"), ("integral", float("nan")), ("last_step", 1.5)):
        bad = json.loads(json.dumps(good))
        bad["layers"][0][name] = value
        with pytest.raises(StateCorruptError, match=name):
            controller.load_state_dict(bad)
    bad = json.loads(json.dumps(good))
    del bad["layers"][0]["pressure"]
    with pytest.raises(StateCorruptError, match="fields"):
        controller.load_state_dict(bad)
    assert controller.state_dict() == good


def test_snapshots_of_another_model_are_refused_before_anything_changes():
    controller, lens = controller_of(8)
    before = controller.state_dict()
    with pytest.raises(ConfigError, match="layer 1"):
        controller.update(snapshot_of([COLLAPSED, COLLAPSED], 200), {0: lens})
    with pytest.raises(ConfigError, match="4 experts"):
        controller.update(snapshot_of([[1000] * 4], 200), {0: lens})
    assert controller.state_dict() == before
    assert lens.scale == 0.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_layers": 0, "n_experts_per_layer": []},
        {"n_layers": 2, "n_experts_per_layer": [8]},
        {"n_layers": 1, "n_experts_per_layer": [0]},
        {"n_layers": 1, "n_experts_per_layer": [8], "top_k_per_layer": [2, 2]},
    ],
)
def test_impossible_controllers_are_refused(arguments):
    with pytest.raises(ConfigError):
        Controller(**arguments)


def test_top_k_per_layer_overrides_the_snapshot():
    controller = Controller(n_layers=1, n_experts_per_layer=[64], top_k_per_layer=[8])
    (decision,) = controller.update(snapshot_of([[500] * 8 + [0] * 56], 200, top_k=2))
    assert decision.observed["top2_relative"] == pytest.approx(1.0)
    assert decision.run_id == "run"
