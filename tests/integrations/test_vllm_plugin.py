"""The vLLM plugin without vLLM: what it reads is what acts, and it refuses what it cannot make act.

The engine itself is asked by `make test-clients` (benchmarks/results/serving.json).
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models as tiny
from torch import Tensor, nn

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of
from chronomoe_hf.errors import UnsupportedArchitectureError
from chronomoe_hf.integrations import vllm

BALANCE = {"law": "balance", "dead_zone": None, "first_layer": "same", "rate": 0.3}
LENS = {"integral_target": 1.0, "integral_gain": 5.0, "min_pressure": 0.0, "lens_spread_max": 1e6}


class Router:
    """Chooses as vLLM's softmax router does: the same method, the same fields."""

    def __init__(self, top_k: int, **fields: Any) -> None:
        self.top_k, self.renormalize, self.scoring_func = top_k, True, "softmax"
        self.__dict__.update(fields)

    def _compute_routing(self, hidden_states: Tensor, router_logits: Tensor, indices_type: Any) -> Any:
        value_TK, ids_TK = router_logits.topk(self.top_k, dim=-1)
        return value_TK.softmax(-1), ids_TK.to(torch.int32)


class Experts(nn.Module):
    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router


class Block(nn.Module):
    """Names as vLLM has them: ``layers.N.block_sparse_moe.gate`` and ``.experts``."""

    def __init__(self, weight_ED: Tensor, **fields: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(weight_ED.shape[1], weight_ED.shape[0], bias=False)
        self.gate.weight.data = weight_ED.clone()
        self.experts = Experts(Router(2, **fields))


class Engine(nn.Module):
    def __init__(self, model: Any, **fields: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for layer in model.model.layers:
            holder = nn.Module()
            holder.block_sparse_moe = Block(layer.mlp.gate.weight.detach(), **fields)
            self.layers.append(holder)


def governed(directory: Path, scope: str, lens: bool) -> Any:
    fields: dict[str, Any] = {"interval": 1, "alerts": {"min_window_tokens": 1}, "beta": {**BALANCE, "scope": scope}}
    fields |= {"control": LENS} if lens else {"lens": {"enabled": False}}
    model = chronomoe_hf.wrap(tiny.tiny_model("mixtral"), ChronoConfig.from_dict(fields)).train()
    for step in range(1, 7):
        model(**tiny.tiny_batch("mixtral", seed=step))
        system_of(model).step(step)
    model.eval().save_pretrained(directory)
    return model


def test_it_is_found_by_vllm() -> None:
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    mine = [entry for entry in found if entry.name == "chronomoe"]
    if not mine:
        pytest.skip("this environment was installed before the entry point was added")
    assert mine[0].load() is vllm.register


@pytest.mark.parametrize("scope", ["selection", "routing"])
@pytest.mark.parametrize("lens", [False, True])
def test_a_layer_routes_as_the_wrapped_model(scope: str, lens: bool, tmp_path: Path) -> None:
    model = governed(tmp_path, scope, lens)
    engine = Engine(model)
    assert vllm.steer(engine, tmp_path) == len(system_of(model).layers)
    x_TD = torch.randn(200, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    moved = 0
    for at, layer in enumerate(system_of(model).layers):
        block = engine.layers[at].block_sparse_moe
        with torch.no_grad():
            _, weight_TK, ids_TK = layer.router(x_TD)
            plain_TK = (x_TD @ layer.router.weight.T).topk(2, dim=-1).indices
            got_TK, got_ids_TK = block.experts.router._compute_routing(x_TD, block.gate(x_TD), torch.int32)
        order, got_order = ids_TK.argsort(-1), got_ids_TK.argsort(-1)
        assert torch.equal(ids_TK.gather(1, order), got_ids_TK.gather(1, got_order).long())
        torch.testing.assert_close(weight_TK.gather(1, order), got_TK.gather(1, got_order), atol=1e-5, rtol=0)
        moved += int((plain_TK.sort(-1).values != ids_TK.sort(-1).values).any(-1).sum())
    assert moved > 0, "bad test setup: nothing steers"


def test_nothing_is_read_where_nothing_steers(tmp_path: Path) -> None:
    chronomoe_hf.wrap(tiny.tiny_model("mixtral"), ChronoConfig.observe()).save_pretrained(tmp_path)
    assert (
        vllm.read_steering(tmp_path)
        == []
        == vllm.read_steering(tmp_path / "absent")
        == vllm.read_steering("a/hub-name")
    )


@pytest.mark.parametrize("field", ["use_grouped_topk", "custom_routing_function", "e_score_correction_bias"])
def test_a_router_that_chooses_otherwise_is_refused(field: str, tmp_path: Path) -> None:
    model = governed(tmp_path, "selection", lens=False)
    engine = Engine(model, **{field: True})
    with pytest.raises(UnsupportedArchitectureError, match=f"has {field}; serve it unsteered with CHRONOMOE_STATE=off"):
        vllm.steer(engine, tmp_path)


def test_a_model_without_such_layers_is_refused(tmp_path: Path) -> None:
    governed(tmp_path, "routing", lens=False)
    with pytest.raises(UnsupportedArchitectureError, match="has no gate and experts for model.layers.0.mlp.gate"):
        vllm.steer(nn.Linear(2, 2), tmp_path)
