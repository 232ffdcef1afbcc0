"""In a compiled graph all lenses run together, closed ones at scale 0: those change nothing, in bf16 too."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support import moe_zoo

import chronomoe_hf
from chronomoe_hf import ChronoConfig


def low_precision(family: str, path: Any) -> Any:
    model = moe_zoo.build(family)
    moe_zoo.randomise(model)
    model.save_pretrained(path)
    # Only from_pretrained keeps in fp32 what the library keeps in fp32. "eager" experts do not compile.
    return type(model).from_pretrained(path, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("family", ["lfm2_moe", "mistral4", "qwen3_moe"])
def test_closed_lenses_of_a_compiled_bf16_model_change_nothing(family: str, tmp_path: Any) -> None:
    """lfm2_moe and mistral4 score in the dtype of their logits, qwen3_moe in fp32."""
    model = low_precision(family, tmp_path)
    ids = torch.randint(3, 60, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        chronomoe_hf.wrap(model, ChronoConfig())
        system = chronomoe_hf.system_of(model)
        lensed = [layer for layer in system.layers if layer.handle.lens is not None]
        lensed[-1].handle.lens.set_scale(0.5)  # open, but aimed nowhere: its basis is zero
        system._set_switches()
        assert system.switches.any_steering and not lensed[0].handle.lens_open, "bad test setup"
        seen: list[bool] = []
        lens = lensed[0].handle.lens
        shift = lens.logit_shift

        def watched(*args: Any) -> torch.Tensor:
            seen.append(True)
            return shift(*args)

        lens.logit_shift = watched
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = torch.compile(model, backend="eager")(input_ids=ids).logits
    assert seen, "bad test setup: the closed lens did not run in the graph"
    assert torch.equal(got, want)
