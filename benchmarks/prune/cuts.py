"""The cuts of the pruning benchmark: every rank at every size, one-shot and refitted, on two halves of held-out text.

Legend: N blocks of text, S positions.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.export import export
from chronomoe_hf.lifecycle import PrunePlan, masked, measure, plan_prune, random_plan, refit, worst_plan
from chronomoe_hf.lifecycle.live.masking import mask_experts
from chronomoe_hf.lifecycle.live.model import match_layers
from prune.job import SHAPES, Subject, subject

CUTS = (0.125, 0.25, 0.5)
RANKS = ("contribution", "reap", "frequency", "fisher", "phi")
REFITTED = ("contribution", "reap")
REFITTED_HALF = (*REFITTED, "frequency", "fisher", "random 0")  # at half of the experts
CONTROLS = 5
HELD_OUT = 192  # blocks, half of them predicts, half realises
CALIBRATION = 172  # training blocks; a quarter of them only checks the refit
# Of the refit: layer by layer, ridge, sweeps, times the usual text.
SETTINGS = ((False, 0.01, 3, 1), (False, 0.01, 3, 4), (True, 0.01, 3, 1), (True, 0.1, 3, 1), (True, 0.001, 3, 1))
SETTINGS += ((True, 0.01, 1, 1), (True, 0.01, 8, 1), (True, 0.01, 3, 4))
Row = dict[str, Any]


@torch.no_grad()
def losses(model: PreTrainedModel, tokens_NS: Tensor, batch: int = 16) -> Tensor:
    """Mean cross-entropy of every block, nats per token, float64 ``(N,)``."""
    out = []
    for block_BS in tokens_NS.split(batch):
        logits = model(input_ids=block_BS).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), block_BS[:, 1:].flatten(), reduction="none")
        out.append(loss.view(len(block_BS), -1).double().mean(-1))
    return torch.cat(out)


def rise(loss_N: Tensor, dense_N: Tensor) -> Row:
    """Mean paired rise with its standard error over blocks: all, and the two halves (even and odd blocks)."""
    delta_N = loss_N - dense_N
    row: Row = {}
    for name, part in (("", delta_N), ("_predicted", delta_N[::2]), ("_realised", delta_N[1::2])):
        row[f"rise{name}"] = float(part.mean())
        row[f"error{name}"] = float(part.std() / math.sqrt(len(part)))
    return row


def chunks(tokens_NS: Tensor, batch: int = 16) -> list[dict[str, Tensor]]:
    """Blocks as batches of a language model."""
    return [{"input_ids": block, "labels": block} for block in tokens_NS.split(batch)]


def held_out(sub: Subject) -> Tensor:
    """Blocks spread evenly over the held-out documents."""
    step = max(1, len(sub.valid_NS) // HELD_OUT)
    return sub.valid_NS[::step][:HELD_OUT]


def calibration(sub: Subject, seed: int, times: int = 1) -> list[dict[str, Tensor]]:
    """Training blocks for the refit, without labels; `times` as many as usual."""
    order_N = torch.randperm(len(sub.train_NS), generator=torch.Generator().manual_seed(1000 + seed))
    blocks_NS = sub.train_NS[order_N[: times * CALIBRATION]]
    return [{"input_ids": block} for block in blocks_NS.split(8)]


def plans(sub: Subject, cut: float) -> dict[str, PrunePlan]:
    """Every rank's plan at one size, and the controls; empty where no such plan exists."""
    try:
        found = {rank: plan_prune(sub.evidence, keep=1.0 - cut, rank=rank) for rank in RANKS}
    except LifecycleError:
        return {}
    base = found["contribution"]
    for index in range(CONTROLS):
        found[f"random {index}"] = random_plan(base, 100 + index)
    found["worst"] = worst_plan(base)
    return found


def run(name: str, seed: int) -> list[Row]:
    """All rows of one shape and seed."""
    sub = subject(SHAPES[name], seed)
    text_NS = held_out(sub)
    dense_N = losses(sub.model, text_NS)
    rows: list[Row] = []
    for cut in CUTS:
        for rank, plan in plans(sub, cut).items():
            common = _common(name, seed, cut, rank, plan, dense_N)
            with masked(sub.model, plan):
                rows.append({**common, "refit": False, **rise(losses(sub.model, text_NS), dense_N)})
            if rank == "contribution" and seed == 0:
                rows[-1]["measure"] = measure(sub.model, plan, chunks(text_NS[::2]), controls=CONTROLS).to_record()
            if rank in refitted_ranks(cut):
                rows.append({**common, "refit": True, **_refitted(sub, plan, text_NS, dense_N, seed)})
            print(name, seed, cut, rank, *(f"{row['rise']:.4f}" for row in rows[-2:]), flush=True)
    return [*rows, *free_budgets(name, seed)]


def _common(name: str, seed: int, cut: float, rank: str, plan: PrunePlan, dense_N: Tensor) -> Row:
    """What every row of a cut says."""
    row: Row = {"shape": name, "seed": seed, "cut": cut, "rank": rank, "num_kept": plan.num_kept}
    return row | {"dense_loss": float(dense_N.mean())}


def refitted_ranks(cut: float) -> tuple[str, ...]:
    """The ranks whose cut of this size is refitted."""
    return REFITTED_HALF if cut == 0.5 else REFITTED


def refits(name: str, seed: int) -> list[Row]:
    """The refitted rows of one shape and seed alone."""
    sub = subject(SHAPES[name], seed)
    text_NS = held_out(sub)
    dense_N = losses(sub.model, text_NS)
    rows: list[Row] = []
    for cut in CUTS:
        made = plans(sub, cut)
        for rank in refitted_ranks(cut) if made else ():
            common = _common(name, seed, cut, rank, made[rank], dense_N)
            rows.append({**common, "refit": True, **_refitted(sub, made[rank], text_NS, dense_N, seed)})
            print(name, seed, cut, rank, "refit", f"{rows[-1]['rise']:.4f} {rows[-1]['seconds']:.0f} s", flush=True)
    return rows


def fresh(name: str, seed: int) -> list[Row]:
    """Half of the experts, on a seed that no choice was made on: REAP one-shot, our rank without and with refit."""
    sub = subject(SHAPES[name], seed)
    text_NS = held_out(sub)
    dense_N = losses(sub.model, text_NS)
    made = plans(sub, 0.5)
    common = {"shape": name, "seed": seed, "cut": 0.5, "dense_loss": float(dense_N.mean())}
    rows: list[Row] = []
    for rank in ("reap", "contribution"):
        with masked(sub.model, made[rank]):
            rows.append({**common, "rank": rank, "refit": False, **rise(losses(sub.model, text_NS), dense_N)})
    for times in (1, 4):
        row = {**common, "rank": "contribution", "refit": True, "times": times}
        rows.append({**row, **_refitted(sub, made["contribution"], text_NS, dense_N, seed, times)})
    print(name, seed, "fresh", *(f"{row['rise']:.4f}" for row in rows), flush=True)
    return rows


def free_drops(sub: Subject, cut: float) -> list[list[int]]:
    """As many experts as a uniform cut drops, wherever contribution is lowest in the whole model; ids per layer.

    Every layer keeps at least k experts and every routing group two. No stock config can hold such a model.
    """
    layers = sub.evidence.layers
    pool = sorted(
        (score or 0.0, layer.spec.layer_id, expert)
        for layer in layers
        for expert, score in enumerate(layer.contribution or ())
    )
    wanted = sum(round(cut * layer.spec.num_experts) for layer in layers)
    out: list[list[int]] = [[] for _ in layers]
    for _, layer_id, expert in pool:
        spec, gone = layers[layer_id].spec, out[layer_id]
        in_group = sum(e // spec.group_size == expert // spec.group_size for e in gone)
        enough = spec.num_experts - len(gone) > spec.top_k
        if sum(map(len, out)) < wanted and enough and (spec.num_groups == 1 or spec.group_size - in_group > 2):
            gone.append(expert)
    return out


def free_budgets(name: str, seed: int) -> list[Row]:
    """Rows of cuts that keep another number of experts in every layer."""
    sub = subject(SHAPES[name], seed)
    text_NS = held_out(sub)
    dense_N = losses(sub.model, text_NS)
    layers = match_layers(sub.model, [layer.spec for layer in sub.evidence.layers])
    rows = []
    for cut in CUTS:
        drops = free_drops(sub, cut)
        with mask_experts(layers, drops):
            row = rise(losses(sub.model, text_NS), dense_N)
        common = {"shape": name, "seed": seed, "cut": cut, "rank": "free budgets", "refit": False}
        kept = [layer.spec.num_experts - len(gone) for layer, gone in zip(sub.evidence.layers, drops, strict=True)]
        rows.append({**common, "dense_loss": float(dense_N.mean()), "kept_per_layer": kept, **row})
        print(name, seed, "free", cut, kept, rows[-1]["rise"], flush=True)
    return rows


def exported(name: str, seed: int) -> list[Row]:
    """The default rank's cuts as checkpoints on disk, loaded again by stock Transformers: rise on the odd blocks.

    Returns:
        One row per size, one-shot and refitted: ``cut``, ``refit``, ``rise``, ``error``.
    """
    sub = subject(SHAPES[name], seed)
    text_NS = held_out(sub)[1::2]
    dense_N = losses(sub.model, text_NS)
    rows = []
    for cut in CUTS:
        plan = plans(sub, cut).get("contribution")
        for refitted in (False, True) if plan is not None else ():
            report = refit(sub.model, plan, calibration(sub, seed)) if refitted else None
            with tempfile.TemporaryDirectory() as directory:
                export(sub.model, plan, Path(directory) / "small", refit=report)
                small = AutoModelForCausalLM.from_pretrained(Path(directory) / "small").eval()
            if report is not None:
                report.undo()
            delta_N = losses(small, text_NS) - dense_N
            error = float(delta_N.std() / math.sqrt(len(delta_N)))
            rows.append({"cut": cut, "refit": refitted, "rise": float(delta_N.mean()), "error": error})
            print(name, seed, "exported", rows[-1], flush=True)
    return rows


def refit_settings(name: str, seed: int) -> list[Row]:
    """Half of the experts cut by contribution and refitted with other settings: ridge, sweeps, four times the text."""
    sub = subject(SHAPES[name], seed)
    text_NS = held_out(sub)
    dense_N = losses(sub.model, text_NS)
    plan = plans(sub, 0.5)["contribution"]
    rows = []
    for sequential, ridge, sweeps, times in SETTINGS:
        batches = calibration(sub, seed, times)
        report = refit(sub.model, plan, batches, ridge=ridge, sweeps=sweeps, sequential=sequential)
        with masked(sub.model, plan):
            row = rise(losses(sub.model, text_NS), dense_N)
        report.undo()
        tokens = report.layers[0].tokens
        setting = {"sequential": sequential, "ridge": ridge, "sweeps": sweeps, "tokens": tokens}
        rows.append({"shape": name, "seed": seed, **setting, "seconds": report.seconds, **row})
        print(name, seed, rows[-1], flush=True)
    return rows


def _refitted(sub: Subject, plan: PrunePlan, text_NS: Tensor, dense_N: Tensor, seed: int, times: int = 1) -> Row:
    started = time.perf_counter()
    report = refit(sub.model, plan, calibration(sub, seed, times))
    seconds = time.perf_counter() - started
    with masked(sub.model, plan):
        row = rise(losses(sub.model, text_NS), dense_N)
    applied = report.applied
    report.undo()
    return {
        **row,
        "applied": applied,
        "seconds": seconds,
        "layer_error": [[layer.error_before, layer.error_after] for layer in report.layers],
    }
