"""Roles of two processes with batches of different sizes are those of one process that sees all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from support.role_ranks import CONFIG, batch_of, outcome

import chronomoe_hf

WORKER = Path(__file__).parent / "roles_worker.py"


def alike(one: Any, other: Any, where: str = "") -> None:
    """Equal but for the rounding of sums in another order."""
    if isinstance(one, dict):
        assert set(one) == set(other), where
        for name, value in one.items():
            alike(value, other[name], f"{where}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, value in enumerate(one):
            alike(value, other[index], f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3, msg=lambda text: f"{where}: {text}")
    else:
        assert one == (pytest.approx(other, rel=1e-3, abs=1e-4) if isinstance(one, float) else other), where


def test_two_processes_find_what_one_does(tmp_path: Path, start_script: Callable[..., tuple[int, str]]) -> None:
    status, output = start_script(WORKER, [str(tmp_path)], 2)
    assert status == 0, output[-4000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for mine, its in zip(*ranks, strict=True):
        assert mine["roles"] == its["roles"] and mine["memory"] == its["memory"]
        assert all(torch.equal(value, its["state"][name]) for name, value in mine["state"].items())
    model = models.tiny_model("mixtral")
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(model, CONFIG))
    for step in range(1, 7):
        # Of the window that was open when the state was saved, the part of the rank that saved it is kept.
        for rank in (0, 1) if step != 5 else (0,):
            model(**batch_of(step, rank)).loss.backward()
        system.step(step)
        if step in (2, 4):
            alike(outcome(system), ranks[0][step // 2 - 1])
    alone = outcome(system)
    alike(alone["state"], ranks[0][2]["state"])
    names = ("pairs", "two_roles")  # loads were counted on both ranks
    alike(
        [[layer[name] for name in names] for layer in alone["roles"]],
        [[r[n] for n in names] for r in ranks[0][2]["roles"]],
    )
    assert alone["state"]["role.0.updates_E"].max() == 3, "bad test setup"
