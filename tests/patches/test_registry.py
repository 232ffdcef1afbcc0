"""Finding adapters, refusing strangers, the swapped classes, and the probe of a router's output."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from support import moe_zoo
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from chronomoe_hf import patches
from chronomoe_hf.errors import ContractError, UnsupportedArchitectureError
from chronomoe_hf.router.state import RouterCall
from chronomoe_hf.wrapping.class_swap import router_class


def mixtral_call() -> moe_zoo.Call:
    return moe_zoo.calls_of(moe_zoo.build("mixtral"))[0]


def test_importing_the_adapters_imports_no_model() -> None:
    code = (
        "import sys, chronomoe_hf.patches as p; assert len(p.all_adapters()) > 70; "
        "print([a.module for a in p.all_adapters() if a.module in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_stranger_is_named_with_its_closest_relatives() -> None:
    class MixtralTopkRouter(nn.Module):
        pass

    assert patches.match(MixtralTopkRouter()) is None
    with pytest.raises(UnsupportedArchitectureError, match="MixtralTopkRouter.*closest.*MixtralTopKRouter.*register"):
        patches.find(MixtralTopkRouter())


def test_a_class_of_the_same_name_elsewhere_does_not_match() -> None:
    impostor = type("MixtralTopKRouter", (nn.Module,), {"__module__": "elsewhere"})
    assert patches.match(impostor()) is None


def test_subclasses_and_swapped_routers_match() -> None:
    router = mixtral_call().router
    adapter = patches.find(router)
    router.__class__ = router_class(adapter, type(router))
    assert patches.find(router) is adapter
    assert patches.match_class(type("Sub", (MixtralTopKRouter,), {})) is adapter


def test_register_refuses_a_taken_name_and_unknown_capabilities() -> None:
    adapter = patches.find(mixtral_call().router)
    with pytest.raises(ValueError, match="already has an adapter"):
        patches.register(adapter)
    with pytest.raises(ValueError, match="telepathy"):
        patches.register(dataclasses.replace(adapter, router_class="Other", refuse={"telepathy": "no"}))
    with pytest.raises(ValueError, match="telepathy"):
        adapter.refused("telepathy")


SWAPS: dict[str, Any] = {
    "weights and ids swapped": lambda out: (out[0], out[2], out[1]),
    "logits last": lambda out: (out[1], out[2], out[0]),
    "a part missing": lambda out: out[:2],
    "one expert too few": lambda out: (out[0][:, 1:], out[1], out[2]),
    "ids out of range": lambda out: (out[0], out[1], out[2] + 8),
    "negative ids": lambda out: (out[0], out[1], out[2] - 1 - out[2].max()),
    "another k": lambda out: (out[0], out[1], out[2][:, :1]),
    "not a tuple": lambda out: None,
}


@pytest.mark.parametrize("swap", sorted(SWAPS))
def test_probe_names_family_and_version(swap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = mixtral_call()
    patches.probe(call.adapter, call.router, call.run()[0])
    original = MixtralTopKRouter.forward
    monkeypatch.setattr(MixtralTopKRouter, "forward", lambda self, x: SWAPS[swap](original(self, x)))
    with pytest.raises(ContractError, match=f"mixtral.*transformers {transformers.__version__}"):
        patches.probe(call.adapter, call.router, call.run()[0])


def test_dbrx_learns_its_k_from_its_parent() -> None:
    call = moe_zoo.calls_of(moe_zoo.build("dbrx"))[0]
    assert call.adapter.top_k(call.router) == call.parent.top_k
    call.adapter.unbind(call.router)
    with pytest.raises(ContractError, match="bind"):
        call.adapter.top_k(call.router)
    assert not [name for name in vars(call.router) if name.startswith("_chrono")]


def test_phimoe_without_its_mixin_says_so() -> None:
    call = moe_zoo.calls_of(moe_zoo.build("phimoe"))[0]
    call.router.train()
    output, args, kwargs = call.run()
    with pytest.raises(ContractError, match="wrap its model with chronomoe_hf.wrap"):
        call.adapter.reroute(
            call.router, RouterCall(output, output[0], torch.zeros(output[0].shape[-1]), "routing", args, kwargs)
        )


def test_a_router_from_outside_can_be_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/adding_an_architecture.md tells a user to do, with a router that Transformers does not know."""
    from chronomoe_hf.patches import registry
    from chronomoe_hf.patches.rules import Renorm, ScoreTopK

    class HouseRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.top_k, self.num_experts, self.norm_topk_prob = 2, 6, True
            self.weight = nn.Parameter(torch.randn(6, 16))

        def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits_TE = x_TD @ self.weight.T
            w_TK, index_TK = logits_TE.softmax(-1).topk(2)
            return logits_TE, w_TK / w_TK.sum(-1, keepdim=True), index_TK

    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    rule = ScoreTopK(score="softmax32", renorm=Renorm("sum", when="norm_topk_prob"))
    patches.register(patches.Adapter(family="house", module=__name__, router_class="HouseRouter", rule=rule))
    router = HouseRouter()
    adapter = patches.find(router)
    x_TD = torch.randn(40, 16)
    output = router(x_TD)
    logits_TE = patches.probe(adapter, router, output).logits_TE
    neutral = adapter.reroute(router, RouterCall(output, logits_TE, torch.zeros(6), "routing", (x_TD,), {}))
    assert all(torch.equal(ours, native) for ours, native in zip(neutral, output, strict=True))
    promoted = adapter.reroute(router, RouterCall(output, logits_TE, torch.eye(6)[3] * 100, "routing", (x_TD,), {}))
    assert (promoted[2] == 3).any(dim=-1).all() and not (output[2] == 3).any(dim=-1).all()
