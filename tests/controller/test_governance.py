"""Real tiny models while beta, veto and lens act: what must hold whatever the numbers are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import models as tiny
from support.guards import NoHost
from support.oracles import softmax
from torch import Tensor

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoSystem
from chronomoe_hf.config import BetaConfig, ControlConfig, LensConfig, VetoConfig

E, K = tiny.NUM_EXPERTS, 2


def govern(family: str, *, backend: str = "eager", steps: int = 4, **fields: Any) -> tuple[Any, ChronoSystem]:
    """A model after a few governed optimizer steps: beta is not zero, the veto is partly closed, a lens is open."""
    model = tiny.tiny_model(family)
    model.set_experts_implementation(backend)
    config = ChronoConfig(**{"interval": 1, "beta": BetaConfig(eta=0.5), **fields})
    chronomoe_hf.wrap(model, config)
    system = chronomoe_hf.system_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        model(**tiny.tiny_batch(family, seed=step, padded=True)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        system.step(step)
    for layer in system.layers:
        open_lens(system, layer.layer_id)
        state = layer.handle.state
        state.relevance.fill_(0.6)
        state.refresh_()
        assert state.beta_on and float(state.beta_applied.abs().max()) > 0.05, "bad test setup: beta does not act"
    return model, system


def open_lens(system: ChronoSystem, layer_id: int, scale: float = 0.5) -> None:
    layer = system.layers[layer_id]
    lens, weight = layer.handle.lens, layer.adapter.weight(layer.router)
    assert lens is not None
    share = torch.arange(1, weight.shape[0] + 1).double()
    note = lens.aim(torch.randn(weight.shape[1]), weight, share / share.sum(), 2.0)
    assert note is None
    lens.set_scale(scale)


# ---- causality ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("batched_mm", torch.float32), ("eager", torch.float64)], ids=["batched_mm", "eager"]
)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_last_token_changes_no_earlier_logit(family: str, backend: str, dtype: torch.dtype, train: bool) -> None:
    """With backends whose rows do not depend on how many rows a matrix has: in fp32 the plain eager model's do."""
    model, _ = govern(family, backend=backend)
    model.to(dtype).train(train)
    for seed in range(4):
        batch = tiny.tiny_batch(family, length=12, seed=seed)
        other = {**batch, "input_ids": batch["input_ids"].clone()}
        other["input_ids"][:, -1] = (other["input_ids"][:, -1] + 7) % tiny.VOCAB
        first, second = (model(**inputs).logits.detach() for inputs in (batch, other))
        assert not torch.equal(first[:, -1], second[:, -1]), "bad test setup: the change has no effect"
        assert torch.equal(first[:, :-1], second[:, :-1])


def test_governance_is_what_those_logits_come_from() -> None:
    """Guard of the tests above: the same weights route differently without it."""
    model, _ = govern("mixtral")
    batch = tiny.tiny_batch("mixtral", length=12)
    governed = model(**batch).logits.detach()
    chronomoe_hf.unwrap(model)
    assert not torch.allclose(governed, model(**batch).logits.detach(), atol=1e-3)


# ---- recompute -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_activation_checkpointing_changes_no_gradient_while_governing(
    family: str, reentrant: bool, backend: str
) -> None:
    model, system = govern(family, backend=backend)
    batch = tiny.tiny_batch(family, padded=True)
    model.enable_input_require_grads()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        calls = count_router_calls(system)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append(
            (
                loss.detach(),
                grads,
                calls(),
                int(system.step_state.row.count(system.sums.on("train", torch.device("cpu"))[0]).sum()),
            )
        )
        system.discard()
    (loss, want, plain_calls, counted), (again, got, calls_made, recounted) = results
    assert (plain_calls, calls_made) == (2, 4), "bad test setup: nothing was recomputed"
    assert torch.equal(loss, again)
    assert got.keys() == want.keys() and any("gate" in name for name in want)
    for name, grad in want.items():
        assert torch.equal(got[name], grad), name
    assert counted == recounted == K * (4 * 16 - 6), "a recompute is not counted"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_router_does_not_learn_against_its_lens_unless_asked(family: str) -> None:
    model, system = govern(family)
    batch = tiny.tiny_batch(family, padded=True)
    losses, grads = [], []
    for train_router in (False, True):
        for lens in system.lenses.values():
            lens.train_router = train_router
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append([layer.adapter.weight(layer.router).grad.clone() for layer in system.layers])
        system.discard()
    assert torch.equal(*losses)
    for layer, alone, through in zip(system.layers, *grads, strict=True):
        lens = layer.handle.lens
        assert lens is not None and alone.abs().max() > 0
        # Fed x' = x + s (x V) U, a linear router would have the gradient G'(X + s X V U), G that of its logits.
        want = alone + lens.scale * (alone @ lens.V) @ lens.U
        assert not torch.allclose(want, alone, rtol=1e-2)
        torch.testing.assert_close(through, want, rtol=1e-4, atol=1e-7)


def count_router_calls(system: ChronoSystem) -> Any:
    seen: list[int] = []
    handles = [layer.router.register_forward_hook(lambda *args: seen.append(1)) for layer in system.layers]

    def read() -> int:
        for handle in handles:
            handle.remove()
        return len(seen)

    return read


# ---- disagreement and veto -----------------------------------------------------------------------------------------


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def naive_disagreement(rows: list[list[float]], beta: list[float]) -> tuple[float, float, float]:
    js = flip = overlap = 0.0
    for row in rows:
        clean, biased = softmax(row), softmax([z + b for z, b in zip(row, beta, strict=True)])
        middle = [(a + b) / 2 for a, b in zip(clean, biased, strict=True)]
        js += (kl(clean, middle) + kl(biased, middle)) / 2
        flip += clean.index(max(clean)) != biased.index(max(biased))
        overlap += sum(max(b - a, 0.0) for a, b in zip(clean, biased, strict=True))
    return js / len(rows), flip / len(rows), overlap / len(rows)


@pytest.mark.parametrize("relevance", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("signal", ["js", "overlap"])
def test_disagreement_is_measured_for_the_full_beta_however_much_of_it_is_vetoed(signal: str, relevance: float) -> None:
    model = tiny.tiny_model("mixtral")
    chronomoe_hf.wrap(model, ChronoConfig(interval=100, veto=VetoConfig(signal=signal)))
    system = chronomoe_hf.system_of(model)
    state = system.router_state(0)
    beta = [0.3, -0.3, 0.2, -0.2, 0.1, -0.1, 0.05, -0.05]
    state.beta_coeff.copy_(torch.tensor(beta))
    state.logit_std_ema.fill_(4.0)
    state.relevance.fill_(relevance)
    state.refresh_()
    system.switch_beta_on()
    batch = tiny.tiny_batch("mixtral", padded=True)
    out = model(**batch, output_router_logits=True)
    real = batch["attention_mask"].flatten().bool()
    rows = out.router_logits[0].detach().view(-1, E)[real].tolist()
    js, flip, overlap = naive_disagreement(rows, [4.0 * b for b in beta])
    assert js > 0.01 and flip > 0.05, "bad test setup: this beta does nothing"
    system.step(1)
    assert float(state.disagreement_js) == pytest.approx(js, rel=1e-4)
    assert float(state.disagreement_flip) == pytest.approx(flip, abs=1e-6)
    assert float(state.overlap_only) == pytest.approx(overlap, rel=1e-4)
    theta, measured = (0.2, js) if signal == "js" else (0.1, overlap)
    want = min(1.0, max(0.0, 1 - (measured - theta) / (2 * theta)))
    assert float(state.relevance) == pytest.approx(want, abs=1e-5), "from the measurement, not from the last relevance"
    layer = system.snapshot().layers[0]
    assert layer.disagreement_js == pytest.approx(js, rel=1e-4)
    assert layer.disagreement_flip == pytest.approx(flip, abs=1e-6)
    assert layer.overlap_only == pytest.approx(overlap, rel=1e-4)


def test_a_veto_does_not_flip_flop() -> None:
    """The same batch again and again, with a beta far beyond theta: relevance falls to 0 once and stays."""
    model = tiny.tiny_model("mixtral")
    chronomoe_hf.wrap(model, ChronoConfig(interval=100, beta=BetaConfig(k_max=30.0), veto=VetoConfig(theta=0.1)))
    system = chronomoe_hf.system_of(model)
    state = system.router_state(0)
    state.beta_coeff.copy_(torch.tensor([21.0] + [-3.0] * 7))
    system.switch_beta_on()
    state.refresh_()
    series, logits = [], []
    batch = tiny.tiny_batch("mixtral")
    for step in range(1, 7):
        logits.append(model(**batch).logits.detach())
        system.step(step)
        series.append(float(state.relevance))
    assert series == [0.0] * 6
    assert state.beta_applied.eq(0).all() and state.beta_full.abs().min() > 1
    assert not torch.equal(logits[0], logits[1]), "the first step ran with the full beta"
    assert all(torch.equal(later, logits[1]) for later in logits[2:])


def test_topk_disagreement_counts_real_tokens_with_other_experts_than_the_plain_router() -> None:
    model, system = govern("mixtral")
    system.step_state.close_window()
    system.step_state.close_window()
    chosen: dict[int, Tensor] = {}
    handles = [
        layer.router.register_forward_hook(lambda m, a, out, at=layer.layer_id: chosen.update({at: out[2]}))
        for layer in system.layers
    ]
    batch = tiny.tiny_batch("mixtral", padded=True)
    out = model(**batch, output_router_logits=True)
    for handle in handles:
        handle.remove()
    real = batch["attention_mask"].flatten().tolist()
    want = []
    for layer in (0, 1):
        plain = out.router_logits[layer].view(-1, E).topk(K, dim=-1).indices.tolist()
        differs = [set(a) != set(b) for a, b in zip(plain, chosen[layer].tolist(), strict=True)]
        want.append(sum(d for d, ok in zip(differs, real, strict=True) if ok) / sum(real))
    assert all(0.05 < share < 1.0 for share in want), "bad test setup"
    system.window_steps = 0
    system.step_state.update(system.take_sums(), 99, system.config.veto)
    assert system.step_state.topk_disagreement() == pytest.approx(want)


# ---- devices -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", ["observe", "protect", "balance"])
def test_a_step_without_a_snapshot_never_waits_for_the_gpu(preset: str) -> None:
    """The driver itself raises on any synchronising call of ours: forward, backward and step of one MoE block."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    overrides = {"hidden_size": 128, "intermediate_size": 128}
    model = tiny.tiny_model("mixtral", dtype=dtype, **overrides).to(device)
    model.set_experts_implementation("grouped_mm")
    block = model.model.layers[0].mlp
    hidden = torch.randn(4, 16, 128, device=device, dtype=dtype, requires_grad=True)
    block(hidden).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block(hidden).sum().backward()
    except RuntimeError as error:
        pytest.skip(f"the library's own block waits for the GPU here: {error}")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    chronomoe_hf.wrap(model, ChronoConfig.preset(preset, interval=4))
    system = chronomoe_hf.system_of(model)
    batch = {name: value.to(device) for name, value in tiny.tiny_batch("mixtral", padded=True).items()}
    for step in range(1, 5):
        model(**batch).loss.backward()
        system.step(step)
    if preset == "protect":
        open_lens(system, 0)
    window = system.layers[0].recorder.scope
    for step in (5, 6, 7):
        torch.cuda.set_sync_debug_mode("error")
        try:
            window.open(True, (), {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
            block(hidden).sum().backward()
            window.close()
            assert system.step(step) is None
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert system.step_state.device.type == "cuda"
    assert sum(system.snapshot().layers[0].expert_token_counts) == 3 * K * (4 * 16 - 6)


def test_an_open_lens_and_a_veto_read_nothing_on_the_host() -> None:
    """The same on any device: no operation between snapshots hands a value to Python, lens and veto included."""
    model, system = govern("mixtral", backend="grouped_mm", interval=4)
    batch = tiny.tiny_batch("mixtral", padded=True)
    hidden = torch.randn(4, 16, 32, requires_grad=True)
    window = system.layers[0].recorder.scope
    for step in (5, 6, 7):
        with NoHost() as guard:
            window.open(True, (), {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
            model.model.layers[0].mlp(hidden).sum().backward()
            window.close()
            assert system.step(step) is None
        assert guard.calls > 100, "bad test setup: the guard saw nothing"
    assert system.step_state.topk_disagreement()[0] is not None


# ---- lenses that would scatter tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "reason"), [(0.0, "lens_unfit"), (1e6, None)])
@pytest.mark.parametrize("reader", ["ridge", "mean"])
def test_every_lens_is_measured_before_it_may_act(reader: Any, limit: float, reason: str | None) -> None:
    control = ControlConfig(integral_target=1.0, lens_spread_max=limit)
    model, system = watch(ChronoConfig(interval=2, control=control, lens=LensConfig(reader=reader)), steps=2)
    assert [decision.abstain_reason for decision in system.decisions] == [reason] * len(system.layers)
    for layer, decision in zip(system.layers, system.decisions, strict=True):
        lens = layer.handle.lens
        assert lens is not None and decision.lens is not None
        assert 0.0 < decision.lens["spread"] < math.inf
        assert layer.handle.lens_open is (reason is None) is (lens.scale > 0.0) is bool(lens.V.any())
    first = system.layers[0].handle.lens
    if reason is None and first is not None:
        mean_D = router_inputs(model, system, 0).mean(0)
        assert float(mean_D @ first.V[:, 0]) == pytest.approx(1.0, abs=1e-4)
        along = torch.cosine_similarity(mean_D, first.V[:, 0], dim=0)
        assert (float(along) == pytest.approx(1.0, abs=1e-5)) is (reader == "mean"), "the original: V = mu / |mu|^2"


def test_the_spread_is_that_of_the_router_inputs() -> None:
    """Against the definition: two folds of every other token, each one's direction tried on the other."""
    control = ControlConfig(integral_target=1.0, lens_spread_max=1e6)
    model, system = watch(ChronoConfig(interval=2, control=control, lens=LensConfig(reader="mean")), steps=2)
    x = router_inputs(model, system, 0)
    readings = [
        x[1 - side :: 2] @ (fold.mean(0) / fold.mean(0).square().sum()) for side in (0, 1) for fold in [x[side::2]]
    ]
    reading = torch.cat(readings).double()
    snapshot = system.last_snapshot
    assert snapshot is not None
    assert snapshot.layers[0].lens_spread == pytest.approx(
        float(reading.std(unbiased=False) / reading.mean()), rel=1e-3
    )


def watch(config: ChronoConfig, steps: int) -> tuple[Any, ChronoSystem]:
    """A model that stays as it is while its windows close."""
    model = tiny.tiny_model("mixtral")
    chronomoe_hf.wrap(model, config)
    system = chronomoe_hf.system_of(model)
    for step in range(1, steps + 1):
        model(**tiny.tiny_batch("mixtral", seed=1)).loss.backward()
        system.step(step)
    return model, system


def router_inputs(model: Any, system: ChronoSystem, layer_id: int) -> Tensor:
    """The plain model's router inputs for the batch of `watch`, one row per token; beta and lenses closed for it."""
    seen: list[Tensor] = []
    for layer in system.layers:
        assert layer.handle.lens is not None
        layer.handle.lens.is_open = layer.handle.state.beta_on = False
    handle = system.layers[layer_id].router.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).float())
    )
    with torch.no_grad():
        model(**tiny.tiny_batch("mixtral", seed=1))
    handle.remove()
    return seen[0]
