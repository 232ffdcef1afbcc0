"""A fault of ours in a forward turns recording off, and the model goes on; the model's own errors pass through."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support import jobs as training_job
from support import models as tiny
from torch import Tensor
from transformers import Trainer, TrainingArguments

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of
from chronomoe_hf.recording import experts as reading
from chronomoe_hf.recording import scope as scoping
from chronomoe_hf.recording import tape as taping
from chronomoe_hf.recording.recorder import LayerRecorder
from chronomoe_hf.telemetry import read_jsonl

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out.detach()


def boom(*args: Any, **kwargs: Any) -> Any:
    raise LookupError("injected fault")


# What is broken, whether routing is still counted in layer 0.
PLACES: dict[str, tuple[Any, str, bool]] = {
    "reading the router's output": (None, "read", False),
    "remembering it": (LayerRecorder, "_routing", False),
    "summing it": (taping, "sums_of", False),
    "the scope": (scoping, "real_tokens", False),
    "the rows of the experts": (reading, "_sorted_slots", True),
    "inside the tap": (reading._Tap, "post_expert_norm", True),
    "summing the outputs": (taping, "output_parts", True),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_fault_of_ours_changes_nothing_but_the_record(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner, name, counted = PLACES[place]
    model = tiny.tiny_model("mixtral").train()
    want = logits(copy.deepcopy(model))
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    system = system_of(model)
    owner = type(system.layers[0].adapter) if owner is None else owner
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING, "chronomoe_hf"):
        broken.setattr(owner, name, boom)
        for _ in range(3):
            assert torch.equal(logits(model), want)
    told = [record for record in caplog.records if "injected fault" in record.getMessage()]
    assert len(told) == 1 and told[0].exc_info is not None, "one warning, with the traceback"
    snapshot = system.step(1)
    assert snapshot is not None
    raised = {alert.layer_id for alert in snapshot.alerts if alert.kind == "RECORDING_FAILED"}
    assert raised == {0, 1}
    detail = next(alert.detail for alert in snapshot.alerts if alert.kind == "RECORDING_FAILED")
    assert "LookupError: injected fault" in detail
    assert [sum(layer.expert_token_counts) for layer in snapshot.layers] == [3 * 36 * counted] * 2
    assert torch.equal(logits(model), want), "what failed once stays off"
    again = system.step(2)
    assert again is not None and [sum(layer.expert_token_counts) for layer in again.layers] == [36 * counted] * 2


def test_one_layers_fault_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chronomoe_hf.wrap(tiny.tiny_model("mixtral").train(), ChronoConfig.observe(interval=1))
    system = system_of(model)
    native = LayerRecorder._routing

    def only_the_second(self: LayerRecorder, *args: Any) -> None:
        if self.layer_id == 1:
            boom()
        native(self, *args)

    monkeypatch.setattr(LayerRecorder, "_routing", only_the_second)
    logits(model)
    snapshot = system.step(1)
    assert snapshot is not None
    assert [sum(layer.expert_token_counts) for layer in snapshot.layers] == [36, 0]
    kinds = [(alert.kind, alert.layer_id) for alert in snapshot.alerts]
    assert kinds == [("NOT_OBSERVED", 1), ("RECORDING_FAILED", 1)]
    assert "injected fault" in snapshot.alerts[0].detail


@pytest.mark.parametrize("where", ["router", "experts"])
def test_an_error_of_the_model_itself_passes_through(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_model("mixtral").train()
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    block = model.model.layers[0].mlp
    native = type(block.gate if where == "router" else block.experts).chrono_native_class  # type: ignore[attr-defined]
    with monkeypatch.context() as broken, pytest.raises(LookupError, match="injected fault"):
        broken.setattr(native, "forward", boom)
        logits(model)
    logits(model)
    snapshot = system_of(model).step(1)
    assert snapshot is not None and not snapshot.alerts
    assert [sum(layer.expert_token_counts) for layer in snapshot.layers] == [36, 36], "the failed forward is in no sum"


def test_a_run_goes_on_and_its_records_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as without the fault; the alert is in the records, in the report and under --check."""

    def run(folder: Path) -> Any:
        arguments = {"max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
        trainer = Trainer(
            tiny.tiny_model("mixtral"),
            TrainingArguments(str(folder), report_to="none", save_strategy="no", **arguments),
            train_dataset=training_job.rows(32),
        )
        chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=2))
        trainer.train()
        return trainer.model.state_dict()

    whole = run(tmp_path / "whole")
    monkeypatch.setattr(taping, "sums_of", boom)
    broken = run(tmp_path / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    alerts, _ = read_jsonl(tmp_path / "broken" / "chronomoe" / "alerts.jsonl")
    assert {alert["kind"] for alert in alerts} == {"NOT_OBSERVED", "RECORDING_FAILED"}
