"""Measured proposals under torchrun: ``proposal_worker.py output_dir engine k``; every rank brings its own batches."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from support import gloo_exit
from support.plans import digest
from support.ranks import on_ranks
from support.split_proposals import DONOR, EDITS, held_out, one_idle, propose, watch

from chronomoe_hf.in_run.proposals import measure_proposals


def main(output_dir: str, engine: str, k: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    model = one_idle(k=int(k))
    system = watch(model)
    propose(system, "split", (DONOR,), EDITS)
    was = digest(model)
    run = on_ranks(model, engine)
    batches = held_out(count=4)
    (record,) = measure_proposals(system, run, [batches[rank], batches[2 + rank]])
    same = engine == "fsdp2" or digest(model) == was
    Path(output_dir, f"{rank}.json").write_text(json.dumps({"record": record, "same": same}))
    gloo_exit.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
