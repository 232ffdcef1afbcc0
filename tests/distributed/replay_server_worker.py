"""GRPO in TRL's server mode under torchrun: ``replay_server_worker.py output_dir url``. Only rank 0 asks the server."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from replay.grpo_job import Passes
from replay.serving import taken_for_vllm, trainer_of
from support import gloo_exit

import chronomoe_hf
from chronomoe_hf import ChronoConfig


def main(output_dir: str, url: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank, os.environ["NO_PROXY"] = int(os.environ["RANK"]), "127.0.0.1"
    for module, name, value in taken_for_vllm():
        setattr(module, name, value)
    trainer = trainer_of(url, Path(output_dir, str(rank)))
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=4, replay__mode="rollout"))
    system = callback.system
    assert system is not None
    passes = Passes(trainer, system)
    trainer.train()
    assert system.last_snapshot is not None
    found = {
        "record": system.last_snapshot.replay,
        "flips": passes.flips,
        "choices": passes.choices,
        "rows": list(passes.before),
        "client": hasattr(trainer.vllm_generation, "vllm_client"),
        "alerts": [alert.kind for alert in system.alerts.active],
    }
    torch.save(found, Path(output_dir, f"{rank}.pt"))
    gloo_exit.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
