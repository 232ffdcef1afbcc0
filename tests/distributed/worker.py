"""One process of a run under torchrun: ``worker.py jobs.json``. Every job leaves ``result-<rank>.pt`` behind."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import cpu_engines
import torch
import transformers
from support import gloo_exit
from support import jobs as training_job

from chronomoe_hf.errors import ChronoError


def main(path: str) -> None:
    """Run the jobs of `path` one after the other, in this process."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    jobs = [training_job.Job(**fields) for fields in json.loads(Path(path).read_text())]
    for engine in {job.engine for job in jobs}:
        cpu_engines.ENGINES.get(engine, lambda: None)()
    rank = int(os.environ.get("RANK", "0"))
    for job in jobs:
        try:
            result = training_job.run(job)
        except ChronoError as error:  # the test decides whether this rank had to raise it
            result = {"error": type(error).__name__, "message": str(error)}
        training_job.save_result(job, rank, result)
    gloo_exit.leave()


if __name__ == "__main__":
    main(sys.argv[1])
