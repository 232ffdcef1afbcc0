"""Router-row drift: known by construction, kept in the state, and unknown where it cannot be read."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from support.plans import keeping
from torch import nn

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import LifecycleConfig
from chronomoe_hf.errors import StateCorruptError
from chronomoe_hf.export.cut_state import cut_state
from chronomoe_hf.lifecycle import Evidence
from chronomoe_hf.telemetry import read_jsonl

ON = LifecycleConfig(router_drift=True)


def wrapped(model: Any = None, *, on: bool = True, interval: int = 1) -> tuple[Any, Any]:
    config = ChronoConfig.observe(interval=interval, lifecycle=ON if on else LifecycleConfig())
    model = chronomoe_hf.wrap(models.tiny_model("mixtral") if model is None else model, config)
    return model, chronomoe_hf.system_of(model)


def stepped(model: Any, system: Any, step: int, optimizer: Any = None) -> Any:
    """One step; without an optimizer no weight moves."""
    model(**models.tiny_batch("mixtral", seed=step)).loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return system.step(step)


def gate(model: Any, layer: int) -> Any:
    return model.model.layers[layer].mlp.gate.weight


def drifts(snapshot: Any) -> list[Any]:
    return [layer.router_drift for layer in snapshot.layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_moved_by_a_known_vector(dtype: torch.dtype, tmp_path: Path) -> None:
    model, system = wrapped(models.tiny_model("mixtral", dtype=dtype))
    system.begin()
    system.open_telemetry(tmp_path)
    assert drifts(stepped(model, system, 1)) == [[0.0] * 8] * 2
    before = gate(model, 1)[2].double().tolist()
    with torch.no_grad():
        gate(model, 1)[2] += torch.linspace(0.5, 1.0, len(before)).to(dtype)
    moved = [new - old for new, old in zip(gate(model, 1)[2].double().tolist(), before, strict=True)]
    want = math.sqrt(sum(v * v for v in moved)) / math.sqrt(sum(v * v for v in before))
    expected = [[0.0] * 8, [0.0, 0.0, pytest.approx(want, rel=1e-6), 0.0, 0.0, 0.0, 0.0, 0.0]]
    assert want > 1.0 and drifts(system.snapshot()) == expected, "the open window too"
    assert drifts(stepped(model, system, 2)) == expected
    for known in (Evidence.from_system(system), Evidence.from_directory(tmp_path)):
        assert [list(layer.router_drift) for layer in known.layers] == expected, "the newest reading"
    events, _ = read_jsonl(tmp_path / "chronomoe" / "routing_events.jsonl")
    assert [event["router_drift"][2] for event in events if event["layer_id"] == 1] == [
        0.0,
        pytest.approx(want, rel=1e-6),
    ]


def test_a_row_that_was_zero_has_no_drift() -> None:
    model = models.tiny_model("mixtral")
    with torch.no_grad():
        gate(model, 0)[5] = 0.0
    model, system = wrapped(model)
    with torch.no_grad():
        gate(model, 0)[5] += 1.0
    assert drifts(stepped(model, system, 1))[0] == [0.0] * 5 + [None] + [0.0] * 2


def test_off_keeps_and_says_nothing() -> None:
    model, system = wrapped(on=False)
    assert drifts(stepped(model, system, 1)) == [None, None] and system.drift.start == {}
    assert not any(name.startswith("router.") for name in system.state_dict()["tensors"])
    assert Evidence.from_system(system).layers[0].router_drift is None


def test_a_resumed_run_measures_from_where_the_first_one_began(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, system = wrapped(interval=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in (1, 2, 3):
        stepped(model, system, step, optimizer)
    system.save(tmp_path)
    resumed, other = wrapped(copy.deepcopy(chronomoe_hf.unwrap(copy.deepcopy(model))), interval=2)
    other.load(tmp_path)
    second = torch.optim.SGD(resumed.parameters(), lr=0.5)
    want, got = stepped(model, system, 4, optimizer), stepped(resumed, other, 4, second)
    assert drifts(got) == drifts(want) and min(drifts(want)[0]) > 0.0
    for layer_id, rows in system.drift.start.items():
        assert torch.equal(rows, other.drift.start[layer_id]) and rows is not other.drift.start[layer_id]
        assert torch.equal(rows, gate(models.tiny_model("mixtral"), layer_id))
    _, off = wrapped(on=False, interval=2)
    with pytest.warns(UserWarning, match="router rows that drift is measured from"):
        off.load(tmp_path, check_weights=False)
    off.save(tmp_path / "without")
    fresh, blank = wrapped(interval=2)
    with pytest.warns(UserWarning, match="router_drift"):  # other settings than were saved
        blank.load(tmp_path / "without", check_weights=False)
    assert "holds no router rows" in caplog.text
    assert drifts(stepped(fresh, blank, 4)) == [None, None], "where it began is not known"


@pytest.mark.parametrize(
    "wrong", [torch.zeros(7, 32), torch.zeros(8), torch.zeros(8, 32, dtype=torch.int64), torch.full((8, 32), math.nan)]
)
def test_broken_rows_are_refused(wrong: Any) -> None:
    _, system = wrapped()
    state = system.state_dict()
    for name in ("router.1.start", "router.2.start"):
        with pytest.raises(StateCorruptError, match=name):
            system.load_state_dict({**state, "tensors": {**state["tensors"], name: wrong}})


def test_a_cut_state_takes_the_survivors_rows_along() -> None:
    model, system = wrapped()
    stepped(model, system, 1)
    state = system.state_dict()
    kept = [[0, 2, 3, 7], [1, 4, 5, 6]]
    tensors, _ = cut_state(state["tensors"], state["meta"], keeping(model, kept))
    for layer_id, ids in enumerate(kept):
        assert torch.equal(tensors[f"router.{layer_id}.start"], gate(model, layer_id)[ids])


def test_unknown_where_an_adapter_acts_and_measured_in_the_copy_that_trains() -> None:
    peft = pytest.importorskip("peft")
    model, system = wrapped()
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_parameters=["mlp.gate.weight"]))
    assert drifts(stepped(model, system, 1)) == [None, None], "the weight is not all that acts"
    model, system = wrapped()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    assert all(drift > 0.0 for row in drifts(stepped(model, system, 1, optimizer)) for drift in row)


def test_unknown_where_the_weight_is_not_whole_here() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    model, system = wrapped()
    snapshot = stepped(model, system, 1)
    assert drifts(snapshot)[0] is not None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        router = model.model.layers[0].mlp.gate
        router.weight = nn.Parameter(distribute_tensor(router.weight.detach(), mesh, [Shard(0)]))
        assert [row is None for row in drifts(system.snapshot())] == [True, False]
    finally:
        dist.destroy_process_group()
    partitioned = nn.Parameter(torch.empty(0))
    partitioned.ds_shape = torch.Size((8, 32))  # type: ignore[attr-defined]  # as DeepSpeed ZeRO-3 leaves it
    for parameter in (partitioned, nn.Parameter(torch.empty(8, 32, device="meta"))):
        router.weight = parameter
        assert [row is None for row in drifts(system.snapshot())] == [True, False]
