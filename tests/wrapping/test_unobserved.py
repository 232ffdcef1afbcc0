"""NOT_OBSERVED says why, where the model shows it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import models as tiny

import chronomoe_hf
from chronomoe_hf import ChronoConfig


def nothing(model: Any, batch: dict[str, Any]) -> None:
    """Another model is in training."""
    copy.deepcopy(model)(**batch)


def in_eval_mode(model: Any, batch: dict[str, Any]) -> None:
    model.eval()(**batch)


def without_gradient(model: Any, batch: dict[str, Any]) -> None:
    with torch.no_grad():
        model(**batch)


def replaced(model: Any, batch: dict[str, Any]) -> None:
    for index, layer in enumerate(tiny.tiny_model("mixtral").model.layers):
        model.model.layers[index].mlp.gate = layer.mlp.gate
    model(**batch)


@pytest.mark.parametrize(
    ("act", "cause"),
    [
        (nothing, r"another model object may be in training \(wrap or attach that one\)"),
        (in_eval_mode, r"the model is in eval mode; call model.train\(\)"),
        (without_gradient, r"its 1 forwards in training mode ran under torch.no_grad\(\)"),
        (replaced, r"another module runs in the place of model.layers.\d.mlp.gate, put there after wrap\(\)"),
    ],
)
def test_the_alert_names_the_cause(act: Callable[..., None], cause: str) -> None:
    model = chronomoe_hf.wrap(tiny.tiny_model("mixtral"), ChronoConfig.observe(interval=1))
    system = chronomoe_hf.system_of(model)
    act(model, tiny.tiny_batch("mixtral"))
    snapshot = system.step(1)
    assert snapshot is not None
    details = [alert.detail for alert in snapshot.alerts if alert.kind == "NOT_OBSERVED"]
    assert len(details) == 2
    for detail in details:
        assert detail.startswith("the router was never called in the window: ")
        assert re.search(cause, detail), detail
    assert all(any(note.startswith("not observed: ") for note in layer.notes) for layer in snapshot.layers)


def test_a_branch_without_tokens_is_told_from_a_model_that_did_not_run() -> None:
    model = chronomoe_hf.wrap(tiny.tiny_model("mixtral"), ChronoConfig.observe(interval=1))
    model.model.layers[1].mlp.forward = lambda hidden: hidden  # this block routes nothing
    model(**tiny.tiny_batch("mixtral"))
    snapshot = chronomoe_hf.system_of(model).step(1)
    assert snapshot is not None
    (alert,) = [alert for alert in snapshot.alerts if alert.kind == "NOT_OBSERVED"]
    assert alert.layer_id == 1 and "other layers ran in this window and this one did not" in alert.detail
    assert [layer.observed for layer in snapshot.layers] == [True, False]
