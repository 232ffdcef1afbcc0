"""The telemetry quick start of the original ChronoMoE README runs with the package name replaced."""

from __future__ import annotations

import textwrap

import pytest
import torch

QUICK_START = """
    from chronomoe import RoutingEvent, SystemSnapshot, TelemetryWriter
    from chronomoe.metrics import compute_entropy, compute_n_effective

    # Create telemetry writer
    writer = TelemetryWriter(run_id="my_run", output_dir="outputs")

    # Log routing events from your MoE forward pass
    event = RoutingEvent.from_router_output(
        run_id="my_run",
        step=100,
        mode="TRAIN",
        layer_id=0,
        used_capacity=used_capacity_tensor,  # [n_experts]
        n_experts=8,
        top_k=2,
    )

    # Create periodic snapshots with alert detection
    snapshot = SystemSnapshot.from_events(
        events=events,
        step=100,
        train_loss=2.5,
        val_loss=2.8,
        run_id="my_run",
        model_name="MyMoE",
        n_layers=4,
        alert_history=alert_history,
    )

    # Check for collapse alerts
    if snapshot.alerts:
        print("WARNING:", snapshot.alerts)
"""


def run(counts: torch.Tensor, alert_history: dict) -> dict:
    """The quick start's lines; `events` is what its author had collected: its event, for each of four layers."""
    source = textwrap.dedent(QUICK_START).replace("chronomoe", "chronomoe_hf")
    first, second = source.split("# Create periodic snapshots")
    names: dict = {"used_capacity_tensor": counts, "alert_history": alert_history}
    exec(first, names)
    make = names["RoutingEvent"].from_router_output
    fields = {"run_id": "my_run", "step": 100, "mode": "TRAIN", "used_capacity": counts, "n_experts": 8, "top_k": 2}
    names["events"] = [names["event"], *(make(layer_id=layer_id, **fields) for layer_id in (1, 2, 3))]
    exec("# Create periodic snapshots" + second, names)
    return names


def test_healthy_routing_is_quiet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run(torch.full((8,), 512), {})
    assert names["compute_entropy"](names["event"].shares) == pytest.approx(2.0794415)
    entropy = names["compute_entropy"](names["event"].shares)
    assert names["compute_n_effective"](entropy) == pytest.approx(8.0)
    assert len(names["snapshot"].layers) == 4 and names["snapshot"].train_loss == 2.5
    assert names["snapshot"].alerts == [] and capsys.readouterr().out == ""
    assert (tmp_path / "outputs" / "chronomoe").is_dir()


def test_collapse_is_printed_once_it_persists(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    history: dict = {}
    counts = torch.tensor([2048.0, 2048.0, 0, 0, 0, 0, 0, 0])
    run(counts, history)
    run(counts, history)
    assert capsys.readouterr().out == ""
    snapshot = run(counts, history)["snapshot"]
    printed = capsys.readouterr().out
    assert printed.startswith("WARNING:") and printed.count("PRE_COLLAPSE") == 4
    assert str(snapshot.alerts[0]).startswith("PRE_COLLAPSE raised (layer 0, step 100, as it came)")
