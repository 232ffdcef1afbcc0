"""torch's own quantised Linear (``quantize_dynamic``) in routers: observed bit for bit; a lens is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import moe_zoo
from torch.ao.quantization import quantize_dynamic

from chronomoe_hf import ChronoConfig, system_of, unwrap, wrap

FAMILIES = ("gemma4", "jetmoe", "afmoe", "switch_transformers", "mixtral")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")


def quantised(family: str) -> Any:
    model = moe_zoo.build(family).eval()
    moe_zoo.randomise(model)
    return quantize_dynamic(model, {torch.nn.Linear})


def inputs(family: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if family == "switch_transformers" else {})}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_observed_and_changes_nothing(family: str) -> None:
    model = quantised(family)
    with torch.no_grad():
        native = model(**inputs(family)).logits
        wrap(model, ChronoConfig.observe(interval=1))
        assert torch.equal(model(**inputs(family)).logits, native)
        with system_of(model).recording_eval():
            model(**inputs(family))
        seen = system_of(model).take_evaluation()
        assert seen is not None and [layer.tokens for layer in seen.layers] == [16] * len(seen.layers)
        unwrap(model)
        assert torch.equal(model(**inputs(family)).logits, native)


@pytest.mark.parametrize("family", ["jetmoe", "afmoe"])
def test_a_lens_is_refused_by_name(family: str) -> None:
    model = quantised(family)
    with pytest.warns(UserWarning, match="get no lens"):
        wrap(model, ChronoConfig.protect(interval=1))
    assert all(any("quantised (torch.qint8" in note for note in layer.notes) for layer in system_of(model).layers)
    with torch.no_grad():
        model(**inputs(family))
    unwrap(model, fold=True)
