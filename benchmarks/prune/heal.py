"""Healing after a cut, a cut in the middle of fine-tuning, and a cut after `balance`: the rest of prune_quality.

Legend: N blocks of text, S positions.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.lifecycle import Evidence, PrunePlan, calibrate, masked, plan_prune, random_plan, refit
from prune.cuts import Row, calibration, held_out, losses, rise
from prune.job import SHAPES, WINDOWS, Subject, base_and_text, fine_tuned, subject, train

CUTS = (0.25, 0.5)
HEAL_STEPS = 100
HEAL_RATE = 5e-4  # peak; fresh AdamW, as a new run has
CALIBRATED = 32  # blocks that mean norms are read from


def healed(
    sub: Subject, name: str, seed: int, plan: PrunePlan | None, state: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Weights after HEAL_STEPS more steps of the fine-tuning text from `state` on, inside the mask of `plan`."""
    model = copy.deepcopy(sub.model).train()
    if state is not None:
        model.load_state_dict(state)
    generator = torch.Generator().manual_seed(500 + seed)
    if plan is None:
        train(model, SHAPES[name], sub.train_NS, HEAL_STEPS, generator, learning_rate=HEAL_RATE)
    else:
        with masked(model, plan):
            train(model, SHAPES[name], sub.train_NS, HEAL_STEPS, generator, learning_rate=HEAL_RATE)
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def loss_of(sub: Subject, state: dict[str, Tensor], plan: PrunePlan | None, text_NS: Tensor) -> Tensor:
    """Held-out losses of the model with these weights, masked by `plan`."""
    model = copy.deepcopy(sub.model)
    model.load_state_dict(state)
    if plan is None:
        return losses(model.eval(), text_NS)
    with masked(model.eval(), plan):
        return losses(model, text_NS)


def cut_in_the_middle(name: str, seed: int, cut: float) -> tuple[dict[str, Tensor], PrunePlan]:
    """The fine-tuning of the subject once more, cut at its half by ``lifecycle__cut__at=...``."""
    shape = SHAPES[name]
    base, train_NS, _ = base_and_text(shape, seed)
    config = ChronoConfig.observe(lifecycle__cut__at=0.5, lifecycle__cut__keep=1.0 - cut)
    with tempfile.TemporaryDirectory() as records:
        model = fine_tuned(shape, seed, base, train_NS, config, Path(records))
    plan = chronomoe_hf.system_of(model).cut.plan
    assert plan is not None
    return {key: value.detach().clone() for key, value in model.state_dict().items()}, plan


def healing(name: str, seed: int) -> list[Row]:
    """Every row is the rise over the dense model at the same number of steps (`after` of them since the end)."""
    sub = subject(SHAPES[name], seed)
    text_NS = held_out(sub)
    start = sub.model.state_dict()
    dense = {0: losses(sub.model, text_NS)}
    dense[HEAL_STEPS] = loss_of(sub, healed(sub, name, seed, None), None, text_NS)
    rows: list[Row] = [
        {"shape": name, "seed": seed, "cut": 0.0, "how": "dense", "after": HEAL_STEPS}
        | rise(dense[HEAL_STEPS], dense[0])
        | {"dense_loss": float(dense[0].mean())}
    ]

    def add(cut: float, how: str, state: dict[str, Tensor], plan: PrunePlan) -> None:
        for after in (0, HEAL_STEPS):
            now = state if after == 0 else healed(sub, name, seed, plan, state)
            row = rise(loss_of(sub, now, plan, text_NS), dense[after])
            rows.append({"shape": name, "seed": seed, "cut": cut, "how": how, "after": after, **row})
            print(name, seed, cut, how, after, f"{row['rise']:.4f}", flush=True)

    for cut in CUTS:
        plan = plan_prune(sub.evidence, keep=1.0 - cut)
        add(cut, "at the end", start, plan)
        report = refit(sub.model, plan, calibration(sub, seed))
        refitted = {key: value.detach().clone() for key, value in sub.model.state_dict().items()}
        report.undo()
        add(cut, "at the end, refit", refitted, plan)
        if cut == 0.5:
            add(cut, "at the end, random", start, random_plan(plan, 100))
        state, own = cut_in_the_middle(name, seed, cut)
        same = sum(len(set(a.kept) & set(b.kept)) for a, b in zip(own.layers, plan.layers, strict=True))
        add(cut, "in the middle", state, own)
        rows[-1]["same_kept"] = rows[-2]["same_kept"] = same / sum(len(layer.kept) for layer in plan.layers)
    return rows


def balanced(name: str, seed: int) -> list[Row]:
    """The cuts of the model that was fine-tuned under `balance`, with its beta; rises over that model's own loss.

    The law is at its strongest: no dead zone, every layer alike.
    """
    shape = SHAPES[name]
    base, train_NS, valid_NS = base_and_text(shape, seed)
    config = ChronoConfig.balance(beta__dead_zone=None, beta__first_layer="same", beta__rate=0.3)
    with tempfile.TemporaryDirectory() as records:
        model = fine_tuned(shape, seed, base, train_NS, config, Path(records)).eval()
        evidence = Evidence.from_directory(records, windows=WINDOWS)
    sub = Subject(model, evidence, train_NS, valid_NS)
    text_NS = held_out(sub)
    dense_N = losses(model, text_NS)
    rows: list[Row] = []
    for cut in (0.125, *CUTS):
        for rank in ("contribution", "reap"):
            plan = plan_prune(evidence, keep=1.0 - cut, rank=rank)  # type: ignore[arg-type]
            row = {"shape": name, "seed": seed, "cut": cut, "rank": rank, "dense_loss": float(dense_N.mean())}
            with masked(model, plan):
                rows.append({**row, "refit": False, **rise(losses(model, text_NS), dense_N)})
            if rank == "contribution" and cut in CUTS:
                report = refit(model, plan, calibration(sub, seed))
                with masked(model, plan):
                    rows.append({**row, "refit": True, **rise(losses(model, text_NS), dense_N)})
                report.undo()
            print(name, seed, "balance", rank, cut, f"{rows[-1]['rise']:.4f}", flush=True)
    return rows


def mean_norm(name: str, seed: int) -> list[Row]:
    """Rows of the `mean_norm` rank, read from a calibration pass over training text."""
    sub = subject(SHAPES[name], seed)
    text_NS = held_out(sub)
    dense_N = losses(sub.model, text_NS)
    batches: list[dict[str, Any]] = calibration(sub, seed)[: CALIBRATED // 8]
    evidence = calibrate(sub.model, batches)
    rows: list[Row] = []
    for cut in (0.125, *CUTS):
        plan = plan_prune(evidence, keep=1.0 - cut, rank="mean_norm", super_experts=False)
        with masked(sub.model, plan):
            row = rise(losses(sub.model, text_NS), dense_N)
        common = {"shape": name, "seed": seed, "cut": cut, "rank": "mean_norm", "num_kept": plan.num_kept}
        rows.append({**common, "dense_loss": float(dense_N.mean()), "refit": False, **row})
        print(name, seed, "mean_norm", cut, f"{row['rise']:.4f}", flush=True)
    return rows
