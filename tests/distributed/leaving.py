"""One process of tests/distributed/test_leaving.py: train, then take the library out of a sharded model.

``leaving.py job.json``; prints one JSON line per rank, ``rank``, then what was found.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import cpu_engines
import torch
from support import gloo_exit
from support import jobs as training_job
from torch.distributed.fsdp import FSDPModule

import chronomoe_hf
from chronomoe_hf import distributed
from chronomoe_hf.errors import WrapError


def refusal(call: Any) -> str:
    """The message of the WrapError that `call` must raise."""
    try:
        call()
    except WrapError as error:
        return str(error)
    return ""


def logits(trainer: training_job.Tracing) -> torch.Tensor:
    batch = {name: value[None] for name, value in training_job.rows(1)[0].items()}
    trainer.model_wrapped.eval()
    with torch.no_grad():
        return trainer.model_wrapped(**batch).logits


def main(path: str) -> None:
    torch.set_num_threads(1)
    job = training_job.Job(**json.loads(Path(path).read_text()))
    cpu_engines.ENGINES[job.engine]()
    trainer = training_job.make_trainer(job)
    trainer.train()
    model = trainer.model
    system = chronomoe_hf.system_of(model)
    weights = training_job.whole_weights(model)
    layer = system.layers[0]
    read = distributed.full_weight(layer.adapter.weight(layer.router))
    (name,) = [name for name in weights if name.endswith("layers.0.mlp.gate.weight")]
    found: dict[str, Any] = {
        "scales": [lens.scale for lens in system.lenses.values()],
        "sharded": distributed.is_sharded(layer.adapter.weight(layer.router)),
        "full_weight": torch.equal(read, weights[name].float()),
        "fold": refusal(lambda: chronomoe_hf.unwrap(model, fold=True)),
        "router": type(layer.router).__name__,
        "router_is_fsdp": isinstance(layer.router, FSDPModule),
    }
    after = training_job.whole_weights(model)
    found["weights_untouched"] = all(torch.equal(value, after[name]) for name, value in weights.items())
    governed = logits(trainer)
    found["unwrap"] = refusal(lambda: chronomoe_hf.unwrap(model))
    found["router_after"] = type(layer.router).__name__
    found["logits"] = logits(trainer).tolist()
    found["steered"] = not torch.equal(governed, torch.tensor(found["logits"]))
    torch.save({"found": found, "weights": weights}, training_job.result_path(job.output_dir, int(os.environ["RANK"])))
    gloo_exit.leave()


if __name__ == "__main__":
    main(sys.argv[1])
