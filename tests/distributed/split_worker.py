"""A revive run under torchrun: ``split_worker.py output_dir engine``; each rank reports its weights."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import cpu_engines
import torch
from support import gloo_exit, jobs
from support.idle import with_idle
from support.plans import digest
from transformers import Trainer, TrainerCallback

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.errors import ChronoError


class Begin(TrainerCallback):
    """The weights' digest at the start of the first step."""

    digest = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.digest = self.digest or digest(kwargs["model"])


def main(output_dir: str, engine: str) -> None:
    torch.set_num_threads(1)
    cpu_engines.ENGINES.get(engine, lambda: None)()
    model = with_idle(2, train=True)
    was = digest(model)
    arguments = jobs.training_arguments(
        jobs.Job(output_dir=output_dir, engine=engine, arguments={"max_steps": 3, "gradient_accumulation_steps": 1})
    )
    trainer = Trainer(model, arguments, train_dataset=jobs.rows(64))
    begin = Begin()
    trainer.add_callback(begin)
    chronomoe_hf.attach(trainer, ChronoConfig.revive(interval=2))
    out: dict[str, Any] = {"was": was}
    try:
        trainer.train()
        system = chronomoe_hf.system_of(model)
        beta = system.step_state.beta_LE.tolist()
        out |= {"begin": begin.digest, "end": digest(model), "beta": beta}
    except ChronoError as error:
        out["error"] = f"{type(error).__name__}: {error}"
    Path(output_dir, f"{os.environ['RANK']}.json").write_text(json.dumps(out))
    gloo_exit.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
