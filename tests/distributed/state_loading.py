"""One rank of tests/distributed/test_state_loading.py: ``state_loading.py directory``; only rank 0 knows it.

``directory`` holds a sound state (``sound``) and one with a fault in it (``faulty``). Leaves
``rank-<n>.json`` there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from support import gloo_exit
from support.models import tiny_batch, tiny_model

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.errors import StateError

CONFIG = ChronoConfig.balance(interval=1)


def attempt(call: Any) -> str:
    """Class of the StateError that `call` raises, or ``"none"``."""
    try:
        call()
    except StateError as error:
        return type(error).__name__
    return "none"


def main(given: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    directory = Path(given) if rank == 0 else Path("/nowhere")  # the main process reads, the others are told
    model = chronomoe_hf.wrap(tiny_model("mixtral"), CONFIG).train()
    system = chronomoe_hf.system_of(model)
    model(**tiny_batch("mixtral", seed=1))
    system.step(1)
    before = system.state_dict()["tensors"]
    found: dict[str, Any] = {
        "missing": attempt(lambda: system.load(directory / "typo")),
        "faulty": attempt(lambda: system.load(directory / "faulty")),
        "step": attempt(lambda: system.load(directory / "sound", step=99)),
    }
    after = system.state_dict()["tensors"]
    found["unchanged"] = system.global_step == 1 and all(torch.equal(after[name], before[name]) for name in before)
    other = tiny_model("mixtral")
    found["wrapped"] = attempt(lambda: chronomoe_hf.wrap(other, CONFIG, state=directory / "faulty"))
    found["left"] = "Chrono" not in type(other.model.layers[0].mlp.gate).__name__
    found["sound"] = attempt(lambda: chronomoe_hf.wrap(other, CONFIG, state=directory / "sound"))
    found["beta"] = chronomoe_hf.system_of(other).step_state.beta_LE.tolist()
    (Path(given) / f"rank-{rank}.json").write_text(json.dumps(found))
    gloo_exit.leave()


if __name__ == "__main__":
    main(sys.argv[1])
