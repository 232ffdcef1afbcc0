"""A graph of a wrapped model has what steers inside: the way to serve a governed model that no weight can hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import models as tiny
from torch import Tensor, nn

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of

BALANCE = {"law": "balance", "dead_zone": None, "first_layer": "same", "rate": 0.3}
LENS = {"integral_target": 1.0, "integral_gain": 5.0, "min_pressure": 0.0, "lens_spread_max": 1e6}
CONFIGS = {
    "beta": ChronoConfig.from_dict({"beta": BALANCE}),
    "routing": ChronoConfig.from_dict({"beta": {**BALANCE, "scope": "routing"}}),
    "lens": ChronoConfig.from_dict(
        {"interval": 1, "alerts": {"min_window_tokens": 1}, "beta": {"law": "none"}, "control": LENS}
    ),
}


class Logits(nn.Module):
    """Token ids to logits, as a graph takes and gives them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return out


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_beta_and_lens_are_inside_an_exported_graph(kind: str) -> None:
    model = chronomoe_hf.wrap(tiny.tiny_model("mixtral"), CONFIGS[kind]).train()
    for step in range(1, 7):
        model(**tiny.tiny_batch("mixtral", seed=step))
        system_of(model).step(step)
    model.eval()
    model.set_experts_implementation("batched_mm")
    example, other = torch.arange(1, 25).reshape(2, 12), torch.arange(1, 41).flip(0).reshape(2, 20)
    length = torch.export.Dim("length", min=2, max=64)
    with torch.no_grad():
        want = Logits(model)(other)
        program = torch.export.export(Logits(model), (example,), dynamic_shapes=({1: length},))
        got = program.module()(other)
        spaces = {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
        assert "aten" in spaces and spaces <= {"aten", "higher_order"}, (
            "operators that only Transformers or this library know"
        )
        assert system_of(model).take_sums().count_nonzero() == 0, "nothing of a graph is recorded"
        plain = Logits(chronomoe_hf.unwrap(model))(other)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert float((want - plain).abs().max()) > 1e-3, "bad test setup: nothing steers"
