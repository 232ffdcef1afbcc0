"""Taking what forwards have added up since the last step: over all layers and ranks, in one collective.

Shape suffixes: L layers, R numbers of one row, N the two numbers about the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chronomoe_hf import distributed
from chronomoe_hf.recording.recorder import LayerRecorder
from chronomoe_hf.recording.totals import Recorded, Sums


class Taken(NamedTuple):
    """What was taken.

    Args:
        row_LR: float64 sums of all layers over all ranks.
        loss_N: float64 loss tokens and forwards that were given labels, over all ranks.
        inputs: sums over router inputs by layer; empty where they were not asked for.
        failures: `flag` summed over ranks, 0-dim; None where this process is alone.
    """

    row_LR: Tensor
    loss_N: Tensor
    inputs: dict[int, Tensor]
    failures: Tensor | None


def take(
    sums: Sums,
    recorders: Sequence[LayerRecorder],
    home: torch.device,
    mode: Recorded = "train",
    *,
    with_inputs: bool = False,
    flag: float = 0.0,
    copies: int = 1,
) -> Taken:
    """Sums since the last call, over all ranks; they start at zero again. Collective: one all-reduce.

    Args:
        sums: of the system.
        recorders: of its layers, in order.
        home: device that the result is wanted on.
        mode: of training or of evaluation.
        with_inputs: also the sums over router inputs.
        flag: travels along and is summed.
        copies: how many ranks have seen the same batch.
    """
    for scope in {each.scope for each in recorders}:
        scope.abandon()  # no forward is running: this one a KeyboardInterrupt ended, for which torch calls no hook
    row_LR = sums.total(mode, home, [each.held(mode)[0] for each in recorders])
    loss_N = sums.loss(mode, home)
    wide = {each.layer_id: each.inputs for each in recorders if each.inputs is not None} if with_inputs else {}
    alone = not distributed.active()
    if not wide and alone:
        zero(sums, recorders, mode)
        return Taken(row_LR, loss_N, {}, None)
    parts = [row_LR.reshape(-1), row_LR.new_full((1,), flag), loss_N]
    parts += [each.to(home).double() for each in wide.values()]
    flat = distributed.all_reduce_sum_(torch.cat(parts)).div_(copies)
    zero(sums, recorders, mode)
    start = row_LR.numel()
    sizes = [each.numel() for each in wide.values()]
    inputs = dict(zip(wide, flat[start + 3 :].split(sizes), strict=True)) if wide else {}
    return Taken(flat[:start].view_as(row_LR), flat[start + 1 : start + 3], inputs, None if alone else flat[start])


def zero(sums: Sums, recorders: Sequence[LayerRecorder], mode: Recorded) -> None:
    """Start at zero again."""
    sums.zero(mode, [each for recorder in recorders for each in recorder.held(mode)])
