"""PEFT wrappers that copy modules (modules_to_save, LN tuning, layer replication): the copy that runs is the one that
is counted and governed, in both orders, and unwrap leaves nothing behind.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from support import models as tiny
from support.laws import full_balance
from support.oracles import Recount
from torch import nn
from transformers import Trainer, TrainingArguments

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoRouter
from chronomoe_hf.config import CoherenceConfig
from chronomoe_hf.errors import WrapError

PARTS = ("gate", "experts", "mlp")
ORDERS = ("peft-wrap", "wrap-peft")
OBSERVE = ChronoConfig.observe(coherence=CoherenceConfig(max_tokens=None))
NAMES = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
TOKENS = 4 * 16


def saving(part: str) -> LoraConfig:
    return LoraConfig(target_modules=["q_proj"], modules_to_save=[part])


def adapted(part: str, order: str, config: ChronoConfig | None = None, family: str = "mixtral") -> Any:
    """A model whose adapter trains a copy of `part`; the copy is moved away from the original, so that they differ."""
    model = tiny.tiny_model(family)
    if order == "wrap-peft":
        chronomoe_hf.wrap(model, config)
    torch.manual_seed(1)
    peft_model = get_peft_model(model, saving(part))
    shift_copies(peft_model, "default")
    if order == "peft-wrap":
        assert chronomoe_hf.wrap(peft_model, config) is peft_model
    return peft_model.train()


@torch.no_grad()
def shift_copies(model: Any, adapter: str) -> None:
    generator = torch.Generator().manual_seed(len(adapter))
    for name, parameter in model.named_parameters():
        if f"modules_to_save.{adapter}" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def routers_that_run(model: Any, batch: dict[str, torch.Tensor]) -> list[nn.Module]:
    """The routers that a forward goes through, found by hooks on every module of the native class."""
    ran: list[nn.Module] = []
    routers = [m for m in model.modules() if any(c.__name__ == "MixtralTopKRouter" for c in type(m).__mro__)]
    handles = [router.register_forward_hook(lambda module, *_: ran.append(module)) for router in routers]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("part", PARTS)
def test_the_copy_that_trains_is_the_one_that_is_counted(part: str, order: str) -> None:
    model = adapted(part, order, OBSERVE)
    plain = adapted(part, "plain")
    plain.load_state_dict(model.state_dict())
    system = chronomoe_hf.system_of(model)
    assert [layer.name for layer in system.layers] == NAMES
    batch = tiny.tiny_batch("mixtral", padded=True)
    assert torch.equal(model(**batch).loss, plain(**batch).loss)
    ran = routers_that_run(model, batch)
    assert [layer.router for layer in system.layers] == ran
    system.step(1)
    recount = Recount(nn.ModuleList(ran), "mixtral")
    recount.mask = batch["attention_mask"].flatten().bool().tolist()
    model(**batch).loss.backward()
    plain(**batch).loss.backward()
    system.step(2)
    snapshot = system.snapshot()
    first = [layer.tokens for layer in snapshot.layers]
    assert first == [2 * 58] * 2, "two forwards were recorded, the one without gradient was not"
    assert [layer.expert_token_counts for layer in snapshot.layers] == [[2 * n for n in row] for row in recount.lists()]
    assert all(v is not None for layer in snapshot.layers for v in layer.phi_slow)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("modules_to_save" in name for name in grads)
    assert all(torch.equal(grad, plain.get_parameter(name).grad) for name, grad in grads.items())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("part", PARTS)
def test_the_copy_that_trains_is_the_one_that_is_governed(part: str, order: str) -> None:
    model = adapted(part, order, full_balance(interval=1))
    batch = tiny.tiny_batch("mixtral")
    system = chronomoe_hf.system_of(model)
    plain = model(**batch).logits
    for step in range(1, 6):
        model(**tiny.tiny_batch("mixtral", seed=step)).loss.backward()
        system.step(step)
    assert float(system.step_state.beta_LE.abs().max()) > 0.01
    for router, layer in zip(routers_that_run(model, batch), system.layers, strict=True):
        assert isinstance(router, ChronoRouter) and router.router_state is layer.handle.state
    assert not torch.equal(model(**batch).logits, plain), "beta does not act"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("part", PARTS)
def test_several_adapters_switching_and_disabling(part: str, order: str) -> None:
    model = adapted(part, order, OBSERVE)
    model.add_adapter("second", saving(part))  # after wrap in both orders
    shift_copies(model, "second")
    assert chronomoe_hf.wrap(model) is model
    system, batch = chronomoe_hf.system_of(model), tiny.tiny_batch("mixtral")

    def counted(step: int) -> list[list[int]]:
        ran = routers_that_run(model, batch)
        assert [layer.router for layer in system.layers] == ran and len(ran) == 2
        recount = Recount(nn.ModuleList(ran), "mixtral")
        model(**batch)
        recount.enabled = False
        snapshot_before = (
            [[0] * 8, [0] * 8] if step == 1 else [layer.expert_token_counts for layer in system.snapshot().layers]
        )
        system.step(step)
        after = [layer.expert_token_counts for layer in system.snapshot().layers]
        gained = [
            [a - b for a, b in zip(rows, old, strict=True)] for rows, old in zip(after, snapshot_before, strict=True)
        ]
        assert gained == recount.lists()
        return gained

    default = counted(1)
    model.set_adapter("second")
    second = counted(2)
    with model.disable_adapter():
        off = counted(3)
    assert counted(4) == second
    if part == "gate":
        assert default != second != off, "bad test setup: the copies route alike"


@pytest.mark.parametrize("merge", [True, False], ids=["merge", "as-is"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("part", PARTS)
def test_unwrap_leaves_nothing_behind(part: str, order: str, merge: bool) -> None:
    model = adapted(part, order, OBSERVE)
    batch = tiny.tiny_batch("mixtral")
    model(**batch).loss.backward()
    system = chronomoe_hf.system_of(model)
    system.step(1)
    left = model.merge_and_unload() if merge else model
    left(**batch)
    system.step(2)
    assert [layer.tokens for layer in system.snapshot().layers] == [2 * TOKENS] * 2, "merging keeps the layers"
    with torch.no_grad():
        want = left(**batch).logits
    assert chronomoe_hf.unwrap(left) is left
    for module in left.modules():
        assert not type(module).__name__.startswith("Chrono"), type(module)
        assert not any("chrono" in key for key in module.__dict__)
        assert not any("scope" in str(hook) or "decoder" in str(hook) for hook in module._forward_hooks.values())
    plain = adapted(part, "plain")
    twin = plain.merge_and_unload() if merge else plain
    twin.load_state_dict(left.state_dict())
    with torch.no_grad():
        assert torch.equal(left(**batch).logits, want) and torch.equal(twin(**batch).logits, want)


@pytest.mark.parametrize("order", ORDERS)
def test_a_trainer_resumes_a_trained_copy_of_the_router_bit_for_bit(order: str, tmp_path: Path) -> None:
    rows = [{k: v[0] for k, v in tiny.tiny_batch("mixtral", batch=1, seed=i).items()} for i in range(16)]

    def trainer(directory: str) -> Trainer:
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / directory),
            per_device_train_batch_size=4,
            max_steps=4,
            save_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        return Trainer(adapted("gate", order, full_balance(interval=1)), arguments, train_dataset=rows)

    whole = trainer("whole")
    chronomoe_hf.attach(whole)
    whole.train()
    resumed = trainer("resumed")
    chronomoe_hf.attach(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    mine, theirs = (chronomoe_hf.system_of(one.model) for one in (whole, resumed))
    assert float(mine.step_state.beta_LE.abs().max()) > 0, "bad test setup"
    assert torch.equal(mine.step_state.beta_LE, theirs.step_state.beta_LE)
    weights = resumed.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in whole.model.state_dict().items())
    assert "RESUME_MISMATCH" not in {alert.kind for alert in theirs.last_snapshot.active_alerts}


def test_unwrap_checks_everything_before_it_changes_anything() -> None:
    model = tiny.tiny_model("mixtral")
    chronomoe_hf.wrap(model, OBSERVE)
    gate = model.model.layers[1].mlp.gate
    other = type("Foreign", (type(gate),), {})
    gate.__class__ = other
    before = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
    with pytest.raises(WrapError, match=r"layers\.1\.mlp\.gate.*Foreign.*loaded from its checkpoint"):
        chronomoe_hf.unwrap(model)
    assert {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()} == before
    model(**tiny.tiny_batch("mixtral"))
    system = chronomoe_hf.system_of(model)
    system.step(1)
    assert [layer.tokens for layer in system.snapshot().layers] == [TOKENS] * 2, "it works as before"


def test_layers_that_were_added_after_wrap_are_refused_with_the_way_out() -> None:
    model = tiny.tiny_model("mixtral")
    chronomoe_hf.wrap(model, OBSERVE)
    replicated = get_peft_model(model, LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]]))
    with pytest.raises(WrapError, match=r"2 MoE layers.*layers\.2\.mlp\.gate.*unwrap"):
        chronomoe_hf.wrap(replicated)
    with pytest.raises(WrapError, match="2 MoE layers"):
        chronomoe_hf.system_of(replicated).begin()  # as at the start of Trainer.train
    chronomoe_hf.wrap(chronomoe_hf.unwrap(replicated), OBSERVE)
    system = chronomoe_hf.system_of(replicated)
    replicated.train()(**tiny.tiny_batch("mixtral"))
    system.step(1)
    assert [layer.tokens for layer in system.snapshot().layers] == [TOKENS] * 4


@pytest.mark.parametrize("order", ORDERS)
def test_ln_tuning_of_a_router_copies_it_too(order: str) -> None:
    model = tiny.tiny_model("mixtral")
    if order == "wrap-peft":
        chronomoe_hf.wrap(model, OBSERVE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, LNTuningConfig(target_modules=["gate"]))
    chronomoe_hf.wrap(tuned, OBSERVE)
    system, batch = chronomoe_hf.system_of(tuned), tiny.tiny_batch("mixtral")
    assert [layer.router for layer in system.layers] == routers_that_run(tuned, batch)
    tuned.train()(**batch).loss.backward()
    system.step(1)
    assert [layer.tokens for layer in system.snapshot().layers] == [TOKENS] * 2
    chronomoe_hf.unwrap(tuned)
    assert not any(type(module).__name__.startswith("Chrono") for module in tuned.modules())


def test_a_deep_copy_of_the_whole_is_another_model_and_of_a_part_is_not() -> None:
    model = adapted("gate", "wrap-peft", OBSERVE)
    twin = copy.deepcopy(model)
    assert chronomoe_hf.system_of(twin) is not chronomoe_hf.system_of(model)
    twin(**tiny.tiny_batch("mixtral"))
    for owner, tokens in ((model, 0), (twin, TOKENS)):
        system = chronomoe_hf.system_of(owner)
        system.step(1)
        assert [layer.tokens for layer in system.snapshot().layers] == [tokens] * 2
    mine = {id(m.__dict__["_chrono_handle"]) for m in model.modules() if isinstance(m, ChronoRouter)}
    theirs = {id(m.__dict__["_chrono_handle"]) for m in twin.modules() if isinstance(m, ChronoRouter)}
    assert len(mine) == len(theirs) == 2 and not mine & theirs, "original and copy of a layer point to one handle"
    assert copy.deepcopy(model.get_base_model().model.layers[0]).mlp.gate.original_module.router_state is (
        chronomoe_hf.system_of(model).layers[0].handle.state
    )


def test_a_model_with_copies_unpickles_in_a_fresh_process(tmp_path: Path) -> None:
    model = adapted("gate", "peft-wrap", OBSERVE)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    torch.save(tiny.tiny_batch("mixtral"), tmp_path / "batch.pt")
    code = (
        "import copy, pickle, sys, torch, chronomoe_hf\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "batch = torch.load(sys.argv[2])\n"
        "twin = copy.deepcopy(model)\n"
        "model.add_adapter('second', model.peft_config['default'])\n"
        "model.set_adapter('second')\n"
        "for one in (model, twin):\n"
        "    one(**batch)\n"
        "    system = chronomoe_hf.system_of(one)\n"
        "    system.step(1)\n"
        "    print([layer.tokens for layer in system.snapshot().layers])\n"
    )
    args = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model.pkl"), str(tmp_path / "batch.pt")]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [str([TOKENS] * 2)] * 2


@pytest.mark.parametrize("order", ORDERS)
def test_a_cut_masks_the_copies_that_run_and_those_that_run_later(order: str) -> None:
    config = ChronoConfig.observe(interval=1, lifecycle__cut__at=1, lifecycle__cut__keep=0.5)
    model = adapted("gate", order, config)
    system = chronomoe_hf.system_of(model)
    model(**tiny.tiny_batch("mixtral")).loss.backward()
    system.step(1)
    plan = system.cut.plan
    assert plan is not None
    model.add_adapter("later", saving("gate"))
    for adapter in ("default", "later"):
        model.set_adapter(adapter)
        model(**tiny.tiny_batch("mixtral", seed=3)).loss.backward()
        snapshot = system.step(system.global_step + 1)
        assert snapshot is not None
        for layer, planned in zip(snapshot.layers, plan.layers, strict=True):
            assert layer.token_count == 2 * TOKENS and not any(layer.expert_token_counts[e] for e in planned.dropped)
