"""The wrapped classes: one for each native class, made again by pickle, copied with what they point to."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models as tiny
from support import moe_zoo
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoRouter, patches
from chronomoe_hf.wrapping.class_swap import experts_class, router_class


def test_one_class_for_each_native_class() -> None:
    adapter = patches.match_class(MixtralTopKRouter)
    assert adapter is not None
    router, experts = router_class(adapter, MixtralTopKRouter), experts_class(adapter.experts_call, MixtralExperts)
    assert router is router_class(adapter, MixtralTopKRouter) is router_class(adapter, router)
    assert experts is experts_class(adapter.experts_call, MixtralExperts)
    assert experts is not experts_class("direct", MixtralExperts), "another reader is another class"
    assert issubclass(router, ChronoRouter) and issubclass(router, MixtralTopKRouter)
    assert (router.__name__, experts.__name__) == ("ChronoMixtralTopKRouter", "ChronoMixtralExperts")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_brings_the_class_back(protocol: int) -> None:
    model = tiny.tiny_model("mixtral")
    chronomoe_hf.wrap(model)
    gate, experts = model.model.layers[0].mlp.gate, model.model.layers[0].mlp.experts
    for module in (gate, experts):
        again = pickle.loads(pickle.dumps(module, protocol))
        assert type(again) is type(module) and again.state_dict().keys() == module.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))
    assert type(copy.copy(gate)) is type(gate)


@pytest.mark.parametrize("family", ["mixtral", "phimoe", "step3p7", "switch_transformers"])
def test_a_wrapped_model_of_any_kind_unpickles_in_a_fresh_process(family: str, tmp_path: Path) -> None:
    model = moe_zoo.build(family)
    chronomoe_hf.wrap(model, ChronoConfig.observe())
    want = sorted(type(m).__name__ for m in model.modules() if type(m).__name__.startswith("Chrono"))
    assert want, "bad test setup"
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(sorted(type(m).__name__ for m in model.modules() if type(m).__name__.startswith('Chrono')))\n"
    )
    args = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(want)


@pytest.mark.parametrize("steering", [False, True])
def test_a_router_called_by_keyword_is_recorded_and_steered(steering: bool) -> None:
    """Some blocks write ``self.gate(hidden_states=x)``."""
    outputs: list[Any] = []
    for keyword in (False, True):
        model = tiny.tiny_model("mixtral")
        if keyword:
            for layer in model.model.layers:
                call_by_keyword(layer.mlp)
        chronomoe_hf.wrap(model, ChronoConfig(interval=1))
        system = chronomoe_hf.system_of(model)
        if steering:
            for layer in system.layers:
                layer.handle.state.beta_applied[0] = 5.0
                layer.handle.state.beta_on = True
                layer.handle.lens.V.fill_(0.01)
                layer.handle.lens.U.fill_(0.02)
                layer.handle.lens.set_scale(0.5)
                assert layer.handle.lens_open
        logits = model(**tiny.tiny_batch("mixtral")).logits.detach()
        snapshot = system.step(1)
        assert snapshot is not None
        outputs.append((logits, [layer.expert_token_counts for layer in snapshot.layers]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert outputs[0][1] == outputs[1][1] and sum(outputs[0][1][0]) == 4 * 16 * 2


def call_by_keyword(block: Any) -> None:
    gate = block.gate

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden_states.shape
        rows = hidden_states.view(-1, width)
        _, weights, index = gate(hidden_states=rows)
        return block.experts(rows, index, weights).reshape(batch, length, width)

    block.forward = forward
