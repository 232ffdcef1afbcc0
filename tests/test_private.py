"""Names of other libraries that are gone: importing and a plain forward go on, and the user is told once."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from support import models as tiny

from chronomoe_hf import private
from chronomoe_hf.errors import ExportError
from chronomoe_hf.export.disk_names import on_disk
from chronomoe_hf.trainer.hooks import Replaced

# In a process of its own: the names are taken away before chronomoe_hf is imported.
WITHOUT = """
import sys, warnings, torch, transformers.integrations.moe as moe, transformers.core_model_loading as loading
sys.path.insert(0, {tests!r})
from support import models as tiny
model = tiny.tiny_model("mixtral")
del torch._C._current_graph_task_id, torch._C._functorch.maybe_current_level
del moe.ALL_EXPERTS_FUNCTIONS, moe.ExpertsInterface, loading.revert_weight_conversion
import chronomoe_hf
from chronomoe_hf import ChronoConfig, lifecycle
lifecycle.export, chronomoe_hf.attach, chronomoe_hf.profile
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    chronomoe_hf.wrap(model, ChronoConfig.observe())
names = [str(each.message) for each in said if "does not find" in str(each.message)]
assert len(names) == 4, names
ids = torch.arange(24).reshape(2, 12) % 16
model.train()(input_ids=ids, labels=ids).loss.backward()
system = chronomoe_hf.system_of(model)
system.step(1)
layers = system.snapshot().layers
assert [layer.tokens for layer in layers] == [24] * len(layers), layers
assert all(layer.coherence_mean is not None for layer in layers)
print("fine")
"""


def test_without_the_private_names_a_model_is_wrapped_and_trained() -> None:
    tests = str(__import__("pathlib").Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", WITHOUT.format(tests=tests)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr[-3000:]


def test_every_name_is_there_with_this_release() -> None:
    assert private.absent() == {}
    assert private.absent({"torch._C._nonsense": "x", "torch.nonsense.more": "y"}) == {
        "torch._C._nonsense": "x",
        "torch.nonsense.more": "y",
    }


def test_they_say_what_torch_says() -> None:
    inside: list[bool] = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            inside.append(private.in_backward())
            return grad

    Seen.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert inside == [True] and not private.in_backward() and not private.in_transform()
    torch.func.grad(lambda x: (inside.append(private.in_transform()), x.sum())[1])(torch.ones(2))
    assert inside == [True, True]


def test_naming_files_without_the_conversion_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.core_model_loading.revert_weight_conversion")
    with pytest.raises(ExportError, match="revert_weight_conversion, which says by which names"):
        on_disk(tiny.tiny_model("mixtral"))


def test_a_method_that_is_gone_is_told_where_it_matters() -> None:
    replaced = Replaced()
    with pytest.warns(UserWarning, match="object has no evaluation_loop any more: evaluation is not recorded"):
        replaced.replace(object(), "evaluation_loop", lambda call: call, "evaluation is not recorded")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replaced.replace(object(), "generate", lambda call: call)
