"""Large shapes on a pretend device: launches and memory within their bounds, and the same numbers as on a CPU."""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models as tiny
from support import phantom

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.recording import tape

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from shapes import widths

A_LAYER = {"observe": 10, "protect, lens open": 25, "balance": 16}


def test_a_layer_of_qwen3_30b_at_8192_tokens_stays_within_the_budget_and_the_bound() -> None:
    width = next(each for each in widths.WIDTHS if each.name.startswith("Qwen3-30B"))
    for row in widths.table(width):
        assert 3 < row["a_layer"] <= A_LAYER[row["case"]], row
        assert row["memory_mb"] <= row["bound_mb"] and row["reads"] == 0, row


def forward(numbers: bool) -> dict[str, Any]:
    """Launches, reads, allocated and most bytes of a recorded forward, with numbers or without."""
    with phantom.device():
        model = phantom.to_device(tiny.tiny_model("qwen3_moe").bfloat16())
        model.set_experts_implementation("grouped_mm")
        batch = phantom.to_device(tiny.tiny_batch("qwen3_moe", padded=True, batch=64, length=64))
        chronomoe_hf.wrap(model, ChronoConfig.observe())
        model(**batch).loss.backward()
        without = contextlib.nullcontext() if numbers else phantom.shapes_only()
        with torch.no_grad(), chronomoe_hf.system_of(model).recording_eval(), without, phantom.counting() as seen:
            model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    gc.collect()
    return {"launches": dict(seen.launches), "reads": dict(seen.reads), "allocated": seen.allocated, "peak": seen.peak}


def test_counts_without_numbers_are_those_with_them() -> None:
    assert forward(numbers=True) == forward(numbers=False)


def test_a_value_without_a_number_is_not_read() -> None:
    with phantom.device(), phantom.shapes_only():
        large = torch.zeros(2**17, device="phantom") + 1.0
        with pytest.raises(RuntimeError):
            large.sum().item()


@pytest.mark.parametrize("limit", [None, 200_000])
def test_the_effect_of_beta_is_that_of_the_cpu(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device compares when the forward ends, a CPU as it goes along: padded batches, in one chunk and in many."""
    monkeypatch.setattr(tape, "LIMIT", limit)
    found = []
    with phantom.device():
        for place in (phantom.to_device, lambda value: value):
            model = tiny.tiny_model("qwen3_moe", num_hidden_layers=4)
            model.set_experts_implementation("grouped_mm")
            chronomoe_hf.wrap(place(model), ChronoConfig.protect(interval=2))
            system = chronomoe_hf.system_of(model)
            for step in range(1, 6):
                model(
                    **place(tiny.tiny_batch("qwen3_moe", seed=step, padded=True, batch=24, length=64))
                ).loss.backward()
                system.step(step)
            found.append({name: value.cpu() for name, value in system.state_dict()["tensors"].items()})
    device, cpu = found
    assert device.keys() == cpu.keys() and device["js_L"].all(), "bad test setup: nothing was compared"
    for name, value in device.items():
        assert torch.allclose(value.double(), cpu[name].double(), rtol=1e-4, atol=1e-6), name


def test_logits_that_were_summed_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each router call fills a chunk of its own: when the last router runs, the first one's logits are gone."""
    monkeypatch.setattr(tape, "LIMIT", 1)
    with phantom.device():
        model = phantom.to_device(tiny.tiny_model("qwen3_moe", num_hidden_layers=4)).eval()
        chronomoe_hf.wrap(model, ChronoConfig.observe())
        system, logits, alive = chronomoe_hf.system_of(model), [], []

        def keep(router: Any, given: Any, output: Any) -> None:
            logits.append(weakref.ref(output[0]))
            alive.append([each() is not None for each in logits])

        for layer in system.layers:
            layer.router.register_forward_hook(keep)
        batch = phantom.to_device(tiny.tiny_batch("qwen3_moe", batch=8, length=64))
        with torch.no_grad(), system.recording_eval():
            model.model(input_ids=batch["input_ids"])
    assert alive[-1][-1] and not any(alive[-1][:2]), alive
