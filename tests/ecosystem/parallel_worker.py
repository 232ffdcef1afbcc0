"""One rank of a model that Transformers itself distributes (tensor, expert, data parallel); see test_parallel.py."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support import gloo_exit
from support import models as tiny
from support.laws import full_balance
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import chronomoe_hf
from chronomoe_hf import ChronoConfig

STEPS = 2


def run(directory: str, family: str, layout: dict[str, int], preset: str) -> dict[str, Any]:
    """Two optimizer steps; ranks that share a tensor-parallel group get the same batch, as they must."""
    model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(**layout)).train()
    replica = dist.get_rank() // layout.get("tp_size", 1)
    config = full_balance(interval=1) if preset == "balance" else ChronoConfig.preset(preset, interval=1)
    chronomoe_hf.wrap(model, config)
    system = chronomoe_hf.system_of(model)
    windows = []
    for step in range(1, STEPS + 1):
        model(**tiny.tiny_batch(family, seed=10 * step + replica, padded=True)).loss.backward()
        snapshot = system.step(step)
        assert snapshot is not None
        windows.append([(layer.expert_token_counts, layer.tokens, layer.calls) for layer in snapshot.layers])
    return {
        "windows": windows,
        "notes": [layer.notes for layer in system.layers],
        "native_class": [type(layer.router).__name__ for layer in system.layers],
        "experts_forward_replaced": "forward" in system.layers[0].parent.experts.__dict__,
        "phi": [layer.phi_slow for layer in snapshot.layers],
        "beta": system.step_state.beta_LE.tolist(),
    }


def main() -> None:
    """``parallel_worker.py DIRECTORY FAMILY LAYOUT PRESET OUTPUT``."""
    directory, family, layout, preset, output = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    warnings.simplefilter("ignore")
    try:
        result = run(directory, family, json.loads(layout), preset)
    except chronomoe_hf.errors.ChronoError as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    Path(f"{output}.{dist.get_rank()}").write_text(json.dumps(result))
    gloo_exit.leave()


if __name__ == "__main__":
    main()
