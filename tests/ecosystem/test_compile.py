"""torch.compile(fullgraph=True): no graph break, exact counts, no recompilation while beta, veto and lenses move."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import models as tiny
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments
from transformers.utils.output_capturing import maybe_install_capturing_hooks

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoSystem
from chronomoe_hf.config import BetaConfig, LensConfig

# Plain forward, then the same with steering: a Python switch that flips costs one graph, a step costs none.
GRAPHS = 2


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert sum(counters["graph_break"].values()) == 0
    return int(counters["stats"]["unique_graphs"])


def build(family: str = "mixtral", **overrides: Any) -> Any:
    model = tiny.tiny_model(family, use_cache=False, **overrides)
    maybe_install_capturing_hooks(model.model)  # installs behind a lock, which the compiler cannot trace
    return model


def strong(**fields: Any) -> ChronoConfig:
    """Protect, with a gain that makes beta change choices within a few steps."""
    return ChronoConfig(**{"interval": 1, "beta": BetaConfig(eta=0.5), **fields})


NO_LENS = LensConfig(enabled=False)  # where choices are recounted from logits and beta alone


def recount(router_logits: Any, system: ChronoSystem, mask: torch.Tensor, top_k: int = 2) -> list[list[int]]:
    """Counts from the recorded clean logits and the beta in force, token by token."""
    table = []
    for layer_id, logits_TE in enumerate(router_logits):
        beta = system.router_state(layer_id).beta_applied.tolist()
        counts = [0] * len(beta)
        for row, real in zip(logits_TE.tolist(), mask.flatten().tolist(), strict=True):
            biased = [z + b for z, b in zip(row, beta, strict=True)]
            for expert in sorted(range(len(beta)), key=lambda e: -biased[e])[:top_k] if real else []:
                counts[expert] += 1
        table.append(counts)
    return table


def train_step(model: Any, batch: dict[str, Any]) -> Any:
    out = model(**batch, output_router_logits=True)
    out.loss.backward()
    return out


@pytest.mark.parametrize(
    ("family", "order"),
    [
        ("mixtral", "wrap-compile"),
        ("qwen3_moe", "compile-run-wrap"),
        pytest.param("mixtral", "compile-wrap", marks=pytest.mark.slow),
        pytest.param("mixtral", "compile-run-wrap", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "wrap-compile", marks=pytest.mark.slow),
    ],
)
def test_counts_are_exact_while_beta_changes(family: str, order: str) -> None:
    model = build(family)
    if order == "wrap-compile":
        chronomoe_hf.wrap(model, strong(lens=NO_LENS))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = 0
    if order == "compile-run-wrap":
        train_step(compiled, tiny.tiny_batch(family, padded=True))
        before = graphs()
    if order != "wrap-compile":
        assert chronomoe_hf.wrap(compiled, strong(lens=NO_LENS)) is compiled
    system = chronomoe_hf.system_of(compiled)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen_graphs, betas, moved = [], [], 0
    for step in range(1, 7):
        batch = tiny.tiny_batch(family, seed=step, padded=True)
        out = train_step(compiled, batch)
        want = recount(out.router_logits, system, batch["attention_mask"])
        plain = [sum(row) for row in want]
        optimizer.step()
        optimizer.zero_grad()
        snapshot = system.step(step)
        assert snapshot is not None
        assert [layer.expert_token_counts for layer in snapshot.layers] == want
        assert plain == [(4 * 16 - 6) * 2] * 2
        moved += any((layer.overlap_only or 0.0) > 0.0 for layer in snapshot.layers)
        betas.append(system.step_state.beta_LE.clone())
        seen_graphs.append(graphs() - before)
    assert moved >= 3 and not torch.equal(betas[-1], betas[-2]), "bad test setup: beta does not change"
    assert seen_graphs[0] == 1 and seen_graphs[1:] == [GRAPHS] * 5, seen_graphs


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ac", "ac-reentrant"])
def test_activation_checkpointing_counts_once_and_changes_no_gradient(reentrant: bool) -> None:
    model = build()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    chronomoe_hf.wrap(model, strong(interval=2))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    system, other = chronomoe_hf.system_of(compiled), chronomoe_hf.system_of(twin)
    seen_graphs = []
    for step in range(1, 7):
        batch = tiny.tiny_batch("mixtral", seed=step, padded=True)
        for one in (compiled, twin):
            one.zero_grad()
            one(**batch).loss.backward()
        for (name, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad, atol=2e-5, rtol=1e-4, msg=name)
        closed, expected = system.step(step), other.step(step)
        if step % 2 == 0:
            assert closed is not None and expected is not None
            assert [layer.expert_token_counts for layer in closed.layers] == [
                layer.expert_token_counts for layer in expected.layers
            ]
            assert [sum(layer.expert_token_counts) for layer in closed.layers] == [2 * (4 * 16 - 6) * 2] * 2
            assert [layer.calls for layer in closed.layers] == [2, 2]
        seen_graphs.append(graphs())
    assert system.switches.any_steering and float(system.step_state.beta_LE.abs().max()) > 0, "bad test setup"
    assert seen_graphs == [1, 1, GRAPHS, GRAPHS, GRAPHS, GRAPHS], seen_graphs


def test_lenses_that_open_one_by_one_share_a_graph() -> None:
    model = build(num_hidden_layers=3)
    chronomoe_hf.wrap(model, strong())
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    systems = [chronomoe_hf.system_of(one) for one in (model, twin)]
    patterns = [(0, 0, 0), (0, 0, 0), (0.3, 0, 0), (0, 0.5, 0), (0.5, 0.2, 0.1), (0, 0, 0.4), (0, 0, 0)]
    seen_graphs = []
    for step, scales in enumerate(patterns, start=1):
        for system in systems:
            for layer, scale in zip(system.layers, scales, strict=True):
                if scale:
                    weight = layer.adapter.weight(layer.router)
                    generator = torch.Generator().manual_seed(layer.layer_id)
                    share = torch.arange(1, 9).double() / 36
                    layer.handle.lens.aim(torch.randn(weight.shape[1], generator=generator), weight, share, 2.0)
                layer.handle.lens.set_scale(scale)
                layer.handle.lens.is_open = scale > 0
        batch = tiny.tiny_batch("mixtral", seed=step, padded=True)
        got, want = compiled(**batch), twin(**batch)
        torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
        for output in (got, want):
            output.loss.backward()
        closed, expected = (system.step(step) for system in systems)
        assert [layer.expert_token_counts for layer in closed.layers] == [
            layer.expert_token_counts for layer in expected.layers
        ]
        seen_graphs.append(graphs())
        if scales == (0.5, 0.2, 0.1):
            for layer in systems[1].layers:
                layer.handle.lens.is_open = False
            with torch.no_grad():
                assert not torch.allclose(twin(**batch).logits, want.logits, atol=1e-2), "bad test setup: idle lenses"
    assert seen_graphs == [1, *[GRAPHS] * 6], seen_graphs


def test_evaluation_in_between_recompiles_once_and_is_recorded_apart() -> None:
    model = build()
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    system = chronomoe_hf.system_of(compiled)
    batch = tiny.tiny_batch("mixtral", padded=True)
    seen_graphs = []
    for step in range(1, 4):
        compiled(**batch).loss.backward()
        compiled.eval()
        with torch.no_grad(), system.recording_eval():
            compiled(**batch)
        compiled.train()
        with torch.no_grad():
            compiled(**batch)
        evaluation, snapshot = system.take_evaluation(), system.step(step)
        assert evaluation is not None and snapshot is not None
        assert [layer.expert_token_counts for layer in evaluation.layers] == [
            layer.expert_token_counts for layer in snapshot.layers
        ]
        assert [layer.tokens for layer in snapshot.layers] == [58, 58]
        seen_graphs.append(graphs())
    assert seen_graphs == [3, 3, 3], seen_graphs


def test_a_compiled_trainer_run_counts_every_token(tmp_path: Any) -> None:
    rows = [{key: value[0] for key, value in tiny.tiny_batch("mixtral", batch=1, seed=i).items()} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        torch_compile=True,
        torch_compile_backend="aot_eager",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    model = build()
    trainer = Trainer(model, arguments, train_dataset=rows)
    callback = chronomoe_hf.attach(trainer, ChronoConfig(interval=2))
    trainer.train()
    assert counters["stats"]["unique_graphs"] > 0, "bad test setup: nothing was compiled"
    snapshot = callback.system.last_snapshot
    assert [(layer.tokens, sum(layer.expert_token_counts)) for layer in snapshot.layers] == [
        (2 * 4 * 16, 2 * 2 * 4 * 16)
    ] * 2


@pytest.mark.slow
def test_inductor() -> None:
    model = build("qwen3_moe")
    chronomoe_hf.wrap(model, strong(lens=NO_LENS))
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    system = chronomoe_hf.system_of(compiled)
    seen_graphs = []
    for step in range(1, 5):
        batch = tiny.tiny_batch("qwen3_moe", seed=step, padded=True)
        out = train_step(compiled, batch)
        want = recount(out.router_logits, system, batch["attention_mask"])
        snapshot = system.step(step)
        assert snapshot is not None and [layer.expert_token_counts for layer in snapshot.layers] == want
        phi = [value for value in snapshot.layers[0].phi_slow or [] if value is not None]
        assert len(phi) >= 4 and all(-1.0001 <= value <= 1.0001 for value in phi)
        seen_graphs.append(graphs())
    assert seen_graphs == [1, GRAPHS, GRAPHS, GRAPHS], seen_graphs


@pytest.mark.slow
def test_inductor_with_activation_checkpointing_counts_once() -> None:
    # Without output_router_logits: the library's own capture hooks cannot be compiled inside a checkpoint.
    model = build("qwen3_moe")
    model.gradient_checkpointing_enable()
    chronomoe_hf.wrap(model, strong())
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    system = chronomoe_hf.system_of(compiled)
    for step in range(1, 4):
        compiled(**tiny.tiny_batch("qwen3_moe", seed=step, padded=True)).loss.backward()
        snapshot = system.step(step)
        assert snapshot is not None
        assert [(layer.calls, layer.tokens, sum(layer.expert_token_counts)) for layer in snapshot.layers] == [
            (1, 58, 116)
        ] * 2
        assert graphs() == min(step, GRAPHS)


@pytest.mark.slow
def test_a_cut_costs_one_graph_and_counts_go_on() -> None:
    config = ChronoConfig.balance(interval=1, lifecycle__cut__at=2, lifecycle__cut__keep=0.5)
    model = chronomoe_hf.wrap(build(), config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    system = chronomoe_hf.system_of(compiled)
    seen_graphs = []
    for step in range(1, 6):
        batch = tiny.tiny_batch("mixtral", seed=step, padded=True)
        out = train_step(compiled, batch)
        want = recount(out.router_logits, system, batch["attention_mask"])  # the logits of what is cut are -inf
        snapshot = system.step(step)
        assert snapshot is not None and [layer.expert_token_counts for layer in snapshot.layers] == want
        seen_graphs.append(graphs())
    assert system.cut.plan is not None and system.cut.step == 2
    for counts, planned in zip(want, system.cut.plan.layers, strict=True):
        assert not any(counts[expert] for expert in planned.dropped) and sum(counts) == (4 * 16 - 6) * 2
    assert seen_graphs == [1, GRAPHS, GRAPHS + 1, GRAPHS + 1, GRAPHS + 1], seen_graphs
