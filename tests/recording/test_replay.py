"""Experts that are run a second time to read their outputs draw no random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import models as tiny
from torch import nn

import chronomoe_hf
from chronomoe_hf import ChronoConfig


def with_dropout() -> Any:
    model = tiny.tiny_model("mixtral")
    model.set_experts_implementation("eager")  # offers no place to look at the rows: they are computed again
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.3))
    return model.train()


def run(model: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(4)
    output = model(**tiny.tiny_batch("mixtral"))
    output.loss.backward()
    return output.logits.detach(), torch.get_rng_state(), [p.grad for p in model.parameters() if p.grad is not None]


def test_dropout_inside_the_experts_draws_the_numbers_it_would_draw_alone() -> None:
    plain, model = with_dropout(), with_dropout()
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    want, got = run(plain), run(model)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert all(torch.equal(a, b) for a, b in zip(got[2], want[2], strict=True))
    assert all(module.training for module in model.modules()), "training mode is as before"
    snapshot = chronomoe_hf.system_of(model).step(1)
    assert any(v is not None for v in snapshot.layers[0].phi_slow), "bad test setup: nothing was read"


def test_phi_does_not_depend_on_the_dropout() -> None:
    read = []
    for p in (0.3, 0.0):
        model = with_dropout()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
        chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
        layers = model.model.layers
        del layers[1:]  # the second layer's input depends on the dropout of the first
        run(model)
        system = chronomoe_hf.system_of(model)
        system.step(1)
        read.append([state.phi_raw for state in system.coherence(0).snapshot(1).values()])
    assert read[0] == pytest.approx(read[1], abs=1e-6)
