"""Every family that the installed Transformers has is observed correctly or refused by name, never miscounted.

The same file runs in separate environments with older releases (`make test-versions`), where some routers return
other layouts than today's; the contract probe must refuse exactly those.
"""

from __future__ import annotations

import ast
import re
import tomllib
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import moe_zoo
from support.moe_zoo import FAMILIES
from torch import nn

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.api import TESTED_VERSIONS, _check_version
from chronomoe_hf.errors import ChronoError

GRANITE = {"granitemoe", "granitemoehybrid", "granitemoeshared"}
# Families whose routers return another layout in that release, or do not exist as modules yet.
REFUSED = {
    "5.6.0": {
        "aria",
        "deepseek_v3",
        "dots1",
        "ernie4_5_moe",
        "ernie4_5_vl_moe",
        "exaone_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe",
        "hunyuan_v1_moe",
        "jamba",
        "lfm2_moe",
        "longcat_flash",
        "mistral4",
        "nemotron_h",
        "phimoe",
        "solar_open",
        "switch_transformers",
        *GRANITE,
    },
    "5.13.1": {"aria", "jamba", "longcat_flash", "switch_transformers", *GRANITE},
    "5.16.1": {"aria", "jamba", "longcat_flash", "switch_transformers", *GRANITE},
    "5.19.0": {"doge", "aria", "jamba", *GRANITE},
    "5.23.0": {"doge"},
    "5.24.0": {"doge"},
}
# Models that their own release cannot run from these tiny configs; nothing of ours is involved.
BROKEN = {
    "5.6.0": {"dbrx", "deepseek_v2", "doge", "glm_moe_dsa"},
    "5.13.1": {"dbrx", "diffusion_gemma", "doge"},
    "5.16.1": {"doge"},
    "5.19.0": set(),
    "5.23.0": set(),
    "5.24.0": set(),
}
INSTALLED = version("transformers")
PRESENT = [f for f, entry in FAMILIES.items() if hasattr(transformers, entry["config_class"])]


def run(model: Any) -> torch.Tensor:
    torch.manual_seed(3)
    ids = torch.arange(3, 35).view(2, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
    output = model(**batch)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def recount(layer: Any, counts: Counter[int]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        routing = layer.adapter.read(layer.router, output)
        kept = routing.kept_TK
        for t, ids in enumerate(routing.index_TK.tolist()):
            counts.update(e for j, e in enumerate(ids) if kept is None or bool(kept[t, j]))

    return layer.router.register_forward_hook(hook)


def observe(family: str) -> str:
    """ "right", "refused" or "broken upstream"; raises AssertionError where observing is wrong."""
    try:
        model = moe_zoo.build(family).train()
        want = run(model).detach()
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError):
        return "broken upstream"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chronomoe_hf.wrap(model, ChronoConfig.observe())
    except ChronoError as error:
        assert family in str(error) or "Router" in str(error) or "MoE layer" in str(error)
        return "refused"
    system = chronomoe_hf.system_of(model)
    counts = [Counter[int]() for _ in system.layers]
    handles = [recount(layer, c) for layer, c in zip(system.layers, counts, strict=True)]
    assert torch.equal(run(model), want), family
    for handle in handles:
        handle.remove()
    system.step(1)
    layers = system.snapshot().layers
    assert any(sum(layer.expert_token_counts) for layer in layers), family
    for layer, c in zip(layers, counts, strict=True):
        assert layer.expert_token_counts == [c[e] for e in range(layer.n_experts)], family
    return "right"


@pytest.mark.slow
def test_every_present_family_is_observed_or_refused() -> None:
    results = {family: observe(family) for family in PRESENT}
    named = {outcome: {f for f, r in results.items() if r == outcome} for outcome in ("refused", "broken upstream")}
    assert named["refused"] == REFUSED[INSTALLED] & set(PRESENT)
    assert named["broken upstream"] == BROKEN[INSTALLED]
    assert len(PRESENT) >= 40, "bad test setup"


def test_an_untested_release_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chronomoe_hf.api.version", lambda name: "5.22.9")
    _check_version.cache_clear()
    with pytest.warns(UserWarning, match=r"5\.22\.9 is installed"):
        _check_version()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _check_version()
    _check_version.cache_clear()
    monkeypatch.undo()
    assert INSTALLED in TESTED_VERSIONS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _check_version()


def test_the_lowest_environment_holds_what_is_promised() -> None:
    """`python tests/older_releases.py lowest` runs the lowest versions that pyproject.toml promises."""
    root = Path(__file__).resolve().parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    source = (root / "tests" / "older_releases.py").read_text(encoding="utf-8")
    pins = ast.literal_eval(source.split("LOWEST = ")[1].split("\n")[0])
    for name, pinned in pins.items():
        (lowest,) = {match[1] for each in named if (match := re.match(rf"{name}>=([\d.]+)", each))}
        assert pinned in (lowest, f"{lowest}.0"), f"{name}: {lowest} is promised, {pinned} is run"


def test_the_reduced_suite_names_tests_that_exist() -> None:
    root = Path(__file__).resolve().parents[1]
    source = (root / "tests" / "older_releases.py").read_text(encoding="utf-8")
    lists = [ast.literal_eval(source.split(f"{name} = ")[1].split("]")[0] + "]") for name in ("SUITE", "SMOKE")]
    assert all(lists)
    for file, _, test in (name.partition("::") for names in lists for name in names):
        assert f"def {test}" in (root / file).read_text(encoding="utf-8"), f"{file}::{test}"
