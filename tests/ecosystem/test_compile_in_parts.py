"""A compiled model whose MoE parts run eagerly, between graphs: counted and governed as without compiling."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models as tiny
from torch import Tensor
from transformers import Trainer, TrainingArguments

from chronomoe_hf import ChronoConfig, attach, system_of, wrap

STRONG: dict[str, Any] = {
    "interval": 1,
    "alerts__min_window_tokens": 1,
    "beta__dead_zone": None,
    "beta__first_layer": "same",
    "beta__rate": 0.3,
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def kept_out(model: Any, what: str) -> Any:
    """The model with its MoE blocks, or one of them, out of every graph."""
    if what == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.output_router_logits = True
        return model
    for index, layer in enumerate(model.model.layers):
        if what == "blocks" or index == 0:
            layer.mlp.forward = torch.compiler.disable(layer.mlp.forward)
    return model


def trained(what: str, *, compiled: bool, steps: int = 3) -> tuple[list[Any], Tensor]:
    model = wrap(tiny.tiny_model("mixtral", use_cache=False), ChronoConfig.balance(**STRONG)).train()
    running = torch.compile(kept_out(model, what), backend="aot_eager") if compiled else kept_out(model, what)
    found = []
    for step in range(1, steps + 1):
        for micro in range(2):
            batch = tiny.tiny_batch("mixtral", padded=True, seed=10 * step + micro)
            running(**batch).loss.backward()
        model.eval()
        with torch.no_grad():
            running(**tiny.tiny_batch("mixtral", seed=99))  # is not counted, and leaves nothing behind
        model.train()
        window = system_of(model).step(step)
        found.append([(layer.tokens, layer.n_effective, layer.max_violation, layer.notes) for layer in window.layers])
    return found, system_of(model).step_state.beta_LE.clone()


@pytest.mark.parametrize(
    "what",
    [
        "blocks",
        pytest.param("one block", marks=pytest.mark.slow),
        pytest.param("checkpointing", marks=pytest.mark.slow),
    ],
)
def test_parts_out_of_the_graph_are_counted_and_governed(what: str) -> None:
    got, got_beta = trained(what, compiled=True)
    want, want_beta = trained(what, compiled=False)
    assert [[layer[0] for layer in window] for window in got] == [[layer[0] for layer in window] for window in want]
    assert all(layer[0] > 0 for window in got for layer in window)
    for one, other in zip(got, want, strict=True):
        for mine, its in zip(one, other, strict=True):
            assert mine[1:3] == pytest.approx(its[1:3], rel=0.05) and mine[3] == its[3]
    assert got_beta.any() and torch.allclose(got_beta, want_beta, atol=0.1)


def test_trainer_with_checkpointing_router_loss_and_compile(tmp_path: Path) -> None:
    """What TRL's SFT defaults and ``torch_compile=True`` make together."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 60, (12,), generator=draw) for _ in range(32)]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=True,
        torch_compile=True,
        torch_compile_backend="aot_eager",
    )
    model = tiny.tiny_model("mixtral", output_router_logits=True)
    trainer = Trainer(model, arguments, train_dataset=rows)
    callback = attach(trainer, ChronoConfig.balance(**{**STRONG, "interval": 2}))
    trainer.train()
    assert [layer.tokens for layer in callback.system.last_snapshot.layers] == [192, 192]
    assert callback.system.step_state.beta_LE.any()
