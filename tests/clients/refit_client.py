"""What `refit` says to a model that Transformers loaded quantized: it refuses by name, before anything changes.

PYTHONPATH=LIBRARY COMPRESSOR_ENV/bin/python tests/clients/refit_client.py OUT.json PLAN_DIRECTORY DIRECTORY ...

``PLAN_DIRECTORY`` holds the ``prune_plan.json`` of a cut; each DIRECTORY is a quantized checkpoint of its source.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from asking import ask_each
from transformers import AutoModelForCausalLM

from chronomoe_hf import lifecycle
from chronomoe_hf.errors import LifecycleError


def ask(directory: str, plan: lifecycle.PrunePlan) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids_NS = torch.randint(3, 900, (8, 64), generator=torch.Generator().manual_seed(0))
    try:
        lifecycle.refit(model, plan, [{"input_ids": row[None]} for row in ids_NS])
    except LifecycleError as error:
        after = model.state_dict()
        same = all(torch.equal(after[name], value) for name, value in before.items())
        return {"refused": str(error), "unchanged": same}
    return {"error": "refit ran on a quantized model"}


def main() -> None:
    out, plan_directory, *directories = sys.argv[1:]
    saved = json.loads((Path(plan_directory) / "prune_plan.json").read_text())
    plan = lifecycle.PrunePlan.from_dict(saved["plan"])
    ask_each(out, directories, lambda directory: ask(directory, plan))


if __name__ == "__main__":
    main()
