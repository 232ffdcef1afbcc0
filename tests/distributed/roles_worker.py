"""Roles under torchrun: ``roles_worker.py output_dir``; the ranks bring batches of different sizes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from support import gloo_exit, models
from support.role_ranks import CONFIG, batch_of, outcome

import chronomoe_hf


def main(output_dir: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    model = models.tiny_model("mixtral")
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(model, CONFIG))
    found = []
    for step in range(1, 5):
        model(**batch_of(step, rank)).loss.backward()
        system.step(step)
        if step % 2 == 0:
            found.append(outcome(system))
    model(**batch_of(5, rank)).loss.backward()
    system.step(5)
    system.save(Path(output_dir, "state"))  # in the middle of a window
    torch.distributed.barrier()
    system.load(Path(output_dir, "state"))
    model(**batch_of(6, rank)).loss.backward()
    system.step(6)
    found.append(outcome(system))
    torch.save(found, Path(output_dir, f"{rank}.pt"))
    gloo_exit.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
