"""What must hold for a whole model of any family: used by the tests of all families and of their variants."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from support import moe_zoo
from torch import Tensor, nn

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoRouter
from chronomoe_hf.config import CoherenceConfig
from chronomoe_hf.errors import UnsupportedArchitectureError

# What cannot be done, and the words with which wrap says so. Everything else must work.
NO_COHERENCE = {
    "jetmoe": "no experts module",
    "llama4": "no unweighted output",
    "zaya": "cannot tell its own tokens apart",
    "nllb_moe": "only experts 0 and 1",
}
NO_BETA = {"dbrx": "chooses in its block", "nllb_moe": "only experts 0 and 1"}
OBSERVE = ChronoConfig.observe(coherence=CoherenceConfig(max_tokens=None))


def build(family: str, **overrides: Any) -> Any:
    """A tiny model in training mode whose routers tell tokens apart; nothing in it is random but jitter."""
    model = moe_zoo.build(family, **overrides)
    moe_zoo.randomise(model)
    for adapter, router, _ in moe_zoo.routers_of(model):
        adapter.unbind(router)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def inputs(model: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 100, (2, 16), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return batch


def output_and_grads(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    output = model(**inputs(model))
    value = output.get("logits", output.get("last_hidden_state"))
    value.float().pow(2).mean().backward()
    grads = {f"grad.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": value.detach(), **grads}


def wrapped(model: Any, config: ChronoConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a supported family leaves no layer alone
        chronomoe_hf.wrap(model, config)
    return chronomoe_hf.system_of(model)


def assert_identical(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def recount(model: Any, routers: list[ChronoRouter]) -> list[Counter[int]]:
    """Assignments of real tokens per router in one forward, token by token, from the routers' own outputs."""
    counts = [Counter() for _ in routers]
    real = [bool(v) for v in inputs(model)["attention_mask"].flatten().tolist()]

    def watch(position: int, router: ChronoRouter) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            routing = router.adapter.read(router, output)
            kept = routing.kept_TK
            for t, ids in enumerate(routing.index_TK.tolist()):
                if real[t]:
                    counts[position].update(e for j, e in enumerate(ids) if kept is None or bool(kept[t, j]))

        return router.register_forward_hook(hook)

    handles = [watch(i, router) for i, router in enumerate(routers)]
    torch.manual_seed(3)  # jitter and dropout as in `output_and_grads`
    with torch.no_grad():
        model(**inputs(model))
    for handle in handles:
        handle.remove()
    return counts


def library_outputs(experts: nn.Module, hidden: Tensor, expert: int) -> Tensor:
    """[T, D] unweighted outputs of one expert for every token, from the native module."""
    native = next(c for c in type(experts).__mro__ if not c.__module__.startswith("chronomoe_hf"))
    index = torch.full((hidden.shape[0], 1), expert)
    if native.__name__ == "SwitchTransformersExperts":
        one_hot = nn.functional.one_hot(index, experts.num_experts)
        return native.forward(experts, hidden, one_hot, torch.ones(hidden.shape[0], 1))
    if native.__name__ == "LongcatFlashExperts":
        weights = torch.tensor([[1.0, 0.0]]).expand(hidden.shape[0], 2)
        return native.forward(experts, hidden, index.expand(-1, 2), weights)
    if native.__name__ == "DbrxExperts":
        return native.forward(experts, hidden[None], index, torch.ones(hidden.shape[0], 1))[0]
    return native.forward(experts, hidden, index, torch.ones(hidden.shape[0], 1))


def check_observing(family: str, model: Any) -> None:
    """Observing changes no number; counts equal a recount; unwrap leaves no trace."""
    want = output_and_grads(model)
    attributes = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    system = wrapped(model, OBSERVE)
    assert_identical(output_and_grads(model), want)
    system.step(1)
    layers = system.snapshot().layers
    counted = recount(model, [layer.router for layer in system.layers])
    assert any(layer.calls for layer in layers), "bad test setup: no router was reached"
    for layer, counts in zip(layers, counted, strict=True):
        if not layer.calls:
            assert "vision" in layer.layer_name, "a router of the text path was never reached"
            continue
        assert layer.tokens == 2 * 16 - 3
        assert layer.expert_token_counts == [counts[e] for e in range(layer.n_experts)]
    chronomoe_hf.unwrap(model)
    assert {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()} == attributes
    assert_identical(output_and_grads(model), want)


def check_phi(family: str, model: Any) -> None:
    """phi, contribution, gates and norms equal their definition, from the outputs of the native experts."""
    system = wrapped(model, OBSERVE)
    # deepseek_v4's first layer routes by a table of token ids, with few experts in a small batch.
    layer = system.layers[1 if family == "deepseek_v4" else 0]
    if family in NO_COHERENCE:
        assert layer.experts is None and NO_COHERENCE[family] in " ".join(layer.notes)
        return
    seen: dict[str, Any] = {}
    layer.experts.register_forward_pre_hook(lambda module, args: seen.update(args=args))
    model(**inputs(model))
    system.step(1)
    hidden, index, weights = (t.detach() for t in seen["args"])
    hidden = hidden.reshape(-1, hidden.shape[-1])
    real = inputs(model)["attention_mask"].flatten().bool()
    if family == "switch_transformers":
        real = real & (index[:, 0].sum(-1) > 0)
        index = index[:, 0].argmax(-1, keepdim=True)
    with torch.no_grad():
        outputs = {e: library_outputs(layer.experts, hidden, e) for e in sorted(set(index[real].flatten().tolist()))}
    states = system.coherence(layer.layer_id).snapshot(1)
    seen_layer = system.snapshot().layers[layer.layer_id]
    tokens = [t for t in range(len(real)) if real[t]]
    if family == "switch_transformers":  # a token that capacity drops has no expert here, and a first choice there
        assert sum(seen_layer.first_choices) == seen_layer.tokens
    else:
        ordered = getattr(layer.adapter.rule, "sort", True)
        first = Counter(int(index[t, 0 if ordered else int(weights[t].argmax())]) for t in tokens)
        assert seen_layer.first_choices == [first[e] for e in range(seen_layer.n_experts)]
    mixture = {t: sum(weights[t, j] * outputs[e][t] for j, e in enumerate(index[t].tolist())) for t in tokens}
    compared = 0
    for e, out in outputs.items():
        mine = [(t, j) for t in tokens for j, chosen in enumerate(index[t].tolist()) if chosen == e]
        mean = sum(out[t] for t, _ in mine).double()
        if index.shape[1] == 1:
            other = sum(mixture.values()).double()
        else:
            other = sum(mixture[t] - weights[t, j] * out[t] for t, j in mine).double()
        saliency = sum(float(weights[t, j]) * float(out[t].norm()) for t, j in mine)
        assert seen_layer.contribution[e] == pytest.approx(saliency, rel=1e-4, abs=1e-7)
        assert seen_layer.gate_sum[e] == pytest.approx(sum(float(weights[t, j]) for t, j in mine), rel=1e-4)
        norms = [float(out[t].norm()) for t, _ in mine]
        assert seen_layer.mean_norm[e] == pytest.approx(sum(norms) / len(norms), rel=1e-4, abs=1e-7)
        if float(mean.norm()) * float(other.norm()) < 1e-12:
            continue
        phi = float(mean @ other) / (float(mean.norm()) * float(other.norm()))
        assert states[e].phi_raw == pytest.approx(phi, abs=1e-4), e
        compared += 1
    assert compared >= 2, "bad test setup: too few experts used"


def check_beta(family: str, model: Any) -> None:
    """A bias on one expert raises its count; layers that take no beta stay at zero."""
    if family in NO_BETA:
        with pytest.raises(UnsupportedArchitectureError, match=NO_BETA[family]):
            chronomoe_hf.wrap(model, ChronoConfig())
        return
    system = wrapped(model, ChronoConfig(interval=1))
    chosen = next(layer for layer in system.layers if layer.can_steer).layer_id
    assert (chosen != 0) == (family == "deepseek_v4"), "its hash layers are only observed"
    model(**inputs(model))
    before = system.step(1)
    assert before is not None
    counts = before.layers[chosen].expert_token_counts
    # The least used expert has the most to gain; a large bias because the tiny batch has 29 tokens.
    target = min(range(len(counts)), key=lambda e: counts[e])
    state = system.router_state(chosen)
    state.beta_full.zero_()
    state.beta_full[target] = 3.0 * float(state.logit_std_ema)
    state.beta_applied.copy_(state.beta_full)
    model(**inputs(model))
    after = system.step(2)
    assert after is not None
    assert after.layers[chosen].expert_token_counts[target] > counts[target]
    assert after.layers[chosen].disagreement_js > 0
    for layer in system.layers:
        if not layer.can_steer:
            assert not system.step_state.beta_LE[layer.layer_id].any() and "no beta" in layer.notes[0]
    assert all(math.isfinite(v) for v in system.step_state.beta_LE.flatten().tolist())
