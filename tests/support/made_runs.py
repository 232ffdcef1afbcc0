"""Runs on disk: real ones (a Trainer on a tiny model), and large ones made of random counts through the real writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from support.jobs import Job, make_trainer

from chronomoe_hf.telemetry import AlertHistory, RoutingEvent, SystemSnapshot, TelemetryWriter, run_manifest


def train_into(directory: Path, *, steps: int = 6, interval: int = 1, preset: str = "protect", **job: Any) -> Any:
    """Train a tiny model into `directory`, a window every `interval` steps; returns the Trainer."""
    config = {"interval": interval, "alerts": {"min_window_tokens": 0}, **job.pop("config", {})}
    arguments = {"max_steps": steps, **job.pop("arguments", {})}
    resume = job.pop("resume", None)
    trainer = make_trainer(Job(output_dir=str(directory), preset=preset, config=config, arguments=arguments, **job))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def run_with_roles(directory: Path, **arguments: Any) -> Any:
    """A run whose roles are kept, whose every pair may be merged, and whose proposals are measured at evaluations."""
    config = {
        "coherence": {"roles": True, "max_tokens": None},
        "lifecycle": {"merge_above": -1.0, "confirmations": 2, "measure": True, "measure_batches": 2, "keep": 0.5},
    }
    arguments = {"eval_strategy": "steps", "eval_steps": 4, "per_device_train_batch_size": 16, **arguments}
    return train_into(directory, steps=8, interval=2, config=config, arguments=arguments, examples=128)


def random_run(
    directory: Path,
    *,
    layers: int = 2,
    experts: int = 4,
    top_k: int = 1,
    windows: int = 9,
    run_id: str = "run",
    dying: bool = True,
) -> None:
    """A run of random counts, one window every 10 steps; if `dying`, expert E - 1 of layer 0 ends half way."""
    generator = np.random.default_rng(0)
    death = windows / 2 if dying else windows
    history = AlertHistory()
    size = {"num_experts": experts, "top_k": top_k}
    table = [{"layer_id": i, "name": f"model.layers.{i}.mlp.gate", **size} for i in range(layers)]
    with TelemetryWriter(run_id, directory) as writer:
        writer.write_manifest(run_manifest(run_id=run_id, config={}, layers=table, model_class="RandomModel"))
        for window in range(1, windows + 1):
            events = [_event(run_id, 10 * window, i, experts, top_k, window, death, generator) for i in range(layers)]
            snapshot = SystemSnapshot.from_events(
                events=events,
                step=10 * window,
                run_id=run_id,
                model_name="RandomModel",
                n_layers=layers,
                alert_history=history,
            )
            writer.write_many("routing_events", events)
            writer.write("snapshots", snapshot)
            writer.write_many("alerts", snapshot.alerts)


def _event(
    run_id: str, step: int, layer: int, experts: int, top_k: int, window: int, death: float, generator: Any
) -> RoutingEvent:
    counts = generator.integers(1000, 10000, experts)
    if layer == 0 and window > death:
        counts[-1] = 0
    vectors = {name: generator.uniform(-1, 1, experts) for name in ("phi_fast", "phi_mid", "phi_slow", "beta")}
    return RoutingEvent.from_router_output(
        run_id=run_id,
        step=step,
        mode="TRAIN",
        layer_id=layer,
        layer_name=f"model.layers.{layer}.mlp.gate",
        used_capacity=counts,
        n_experts=experts,
        top_k=top_k,
        window_steps=10,
        tokens=int(counts.sum()) // top_k,
        calls=10,
        prob_mean=counts / counts.sum(),
        contribution=generator.uniform(0, 100, experts),
        saliency=generator.uniform(0, 1, experts),
        total_tokens_seen=counts * window,
        phi_rows=counts // 10,
        logit_std=1.0,
        relevance=1.0,
        **vectors,
    )
