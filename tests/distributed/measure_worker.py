"""measure under torchrun: ``ranks_worker.py output_dir engine``; every rank brings half of the batches."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from support import gloo_exit, models
from support.plans import keeping
from support.ranks import on_ranks

from chronomoe_hf.errors import ChronoError
from chronomoe_hf.lifecycle import measure

KEPT = [[0, 2, 3, 5, 7], [1, 2, 4, 6, 7]]


def main(output_dir: str, engine: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    model = models.tiny_model("mixtral")
    plan = keeping(model, KEPT)
    wrapped = on_ranks(model, engine)
    mine = [models.tiny_batch("mixtral", seed=100 + 2 * index + rank, padded=True) for index in range(2)]
    effect = measure(wrapped, plan, mine, controls=1, seed=3)
    out = {"effect": effect.to_record()}
    try:
        measure(wrapped, plan, mine[: 1 + rank], controls=0)
    except ChronoError as error:
        out["uneven"] = type(error).__name__ + ": " + str(error)
    Path(output_dir, f"{rank}.json").write_text(json.dumps(out))
    gloo_exit.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
