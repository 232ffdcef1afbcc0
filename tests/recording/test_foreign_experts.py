"""Experts modules that libraries put in the place of Transformers' own: observed, bit for bit the native model's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import models as tiny
from support.family_checks import assert_identical
from support.oracles import naive_phi
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, use_experts_implementation

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of
from chronomoe_hf.config import CoherenceConfig

OBSERVE = ChronoConfig.observe(interval=1, coherence=CoherenceConfig(max_tokens=None))


class WithoutConfig(nn.Module):
    """As Liger's and experts4bit's: the same call, no ``config``, no decorator; computed in plain torch."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        experts, inner, hidden = config.num_local_experts, config.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        gate, up = torch.einsum("td,tkod->tko", x, self.gate_up_proj[index]).chunk(2, -1)
        inner = nn.functional.silu(gate) * up
        return torch.einsum("tki,tkdi,tk->td", inner, self.down_proj[index], weight.to(x.dtype))


class Scaled(nn.Module):
    """As FP8's: packed weights with scales, and a table of backends of its own, which knows of the scales."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        experts, inner, hidden = config.num_local_experts, config.intermediate_size, config.hidden_size
        make = {"gate_up_proj": (experts, 2 * inner, hidden), "down_proj": (experts, hidden, inner)}
        for name, shape in make.items():
            values = (torch.randn(shape) * 0.3).to(torch.float8_e4m3fn)
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))
            self.register_parameter(f"{name}_scale_inv", nn.Parameter(torch.full((experts,), 0.5), requires_grad=False))

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return scaled(self, x, index, weight)


def scaled(self: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """What every backend of the table computes; rows are sorted by expert, as grouped kernels do."""
    num_k = index.shape[-1]
    order = torch.sort(index.reshape(-1))[1]
    weights = weight.reshape(-1)[order]
    out = torch.zeros_like(x)
    for at, slot in enumerate(order.tolist()):
        expert, token = int(index.reshape(-1)[slot]), slot // num_k
        up = self.gate_up_proj[expert].to(x.dtype) * self.gate_up_proj_scale_inv[expert]
        down = self.down_proj[expert].to(x.dtype) * self.down_proj_scale_inv[expert]
        a, b = (up @ x[token]).chunk(2, -1)
        out = out.index_add(0, torch.tensor([token]), (down @ (nn.functional.silu(a) * b) * weights[at])[None])
    return out


class OwnTable(ExpertsInterface):
    _global_mapping = {"grouped_mm": scaled, "batched_mm": scaled}  # noqa: RUF012


DECORATED = use_experts_implementation(Scaled, experts_interface=OwnTable())


@pytest.fixture(params=["without config", "own table"])
def model(request: pytest.FixtureRequest) -> Any:
    kind = {"without config": WithoutConfig, "own table": DECORATED}[request.param]
    made = tiny.tiny_model("mixtral")
    torch.manual_seed(0)
    for layer in made.model.layers:
        layer.mlp.experts = kind(made.config)
        for parameter in layer.mlp.experts.parameters():
            if parameter.dtype == torch.float32 and parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    assert made.config._experts_implementation == "grouped_mm", "bad test setup: another backend would run"
    return made.train()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def result(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(**batch())
    output.loss.backward()
    grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return {"logits": output.logits.detach(), **grads}


def test_observing_changes_no_bit_and_counts(model: Any) -> None:
    want = result(copy.deepcopy(model))
    chronomoe_hf.wrap(model, OBSERVE)
    seen: list[Tensor] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda m, a, out: seen.append(out[-1]))
    assert_identical(result(model), want)
    snapshot = system_of(model).step(1)
    assert snapshot is not None and not snapshot.alerts
    counted = torch.bincount(seen[0].flatten(), minlength=8).tolist()
    assert snapshot.layers[0].expert_token_counts == counted and sum(counted) == 2 * 9 * 2


def test_coherence_is_read_by_replay(model: Any) -> None:
    chronomoe_hf.wrap(model, OBSERVE)
    experts = model.model.layers[0].mlp.experts
    calls: list[tuple[Tensor, ...]] = []
    experts.register_forward_pre_hook(lambda m, args: calls.append(tuple(a.detach().clone() for a in args)))
    result(model)
    system_of(model).step(1)
    hidden, index, weight = calls[0]
    native = type(experts).chrono_native_class.forward
    ones = torch.ones(len(hidden), 1)
    rows = torch.stack([native(experts, hidden, index[:, k : k + 1], ones) for k in range(2)], 1).detach()
    real = [True] * len(hidden)
    want, _ = naive_phi(rows.tolist(), weight.tolist(), index.tolist(), real, "leave_one_out")
    states = system_of(model).coherence(0).snapshot(1)
    assert len(want) >= 4, "bad test setup: too few experts used"
    for expert, phi in want.items():
        assert states[expert].phi_raw == pytest.approx(phi, abs=1e-4), expert


def test_the_librarys_own_backends_are_still_tapped() -> None:
    model = chronomoe_hf.wrap(tiny.tiny_model("mixtral"), OBSERVE)
    experts = model.model.layers[0].mlp.experts
    assert type(experts).plain_dispatch and ALL_EXPERTS_FUNCTIONS is not None
    from chronomoe_hf.recording.experts import reading_mode

    assert reading_mode(experts, "interface", 2) == "rows"
