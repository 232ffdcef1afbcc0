"""`unwrapped.py MODEL CHECKPOINT SETTINGS`: a checkpoint, wrapped with its state and unwrapped, is the plain model.

Prints a JSON line: every class and every weight is as it was, the forward is bit-equal to that before, and while it was
wrapped the state acted.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


def load(model: str, checkpoint: str) -> Any:
    if not Path(checkpoint, "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), checkpoint)


def seen(model: Any) -> tuple[list[type], dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.arange(4, 36).reshape(2, 16)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    return [type(each) for each in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}, logits


def main() -> int:
    model = load(sys.argv[1], sys.argv[2])
    kinds, weights, logits = seen(model)
    chronomoe_hf.wrap(model, ChronoConfig.from_pretrained(sys.argv[3]), state=sys.argv[2])
    acts = bool(system_of(model).step_state.beta_LE.any()) and not torch.equal(seen(model)[2], logits)
    chronomoe_hf.unwrap(model)
    kinds_after, weights_after, logits_after = seen(model)
    same = weights.keys() == weights_after.keys() and all(torch.equal(weights_after[k], weights[k]) for k in weights)
    plain = kinds == kinds_after and same and torch.equal(logits, logits_after)
    print(json.dumps({"plain": plain and acts, "acts": acts}))
    return int(not plain)


if __name__ == "__main__":
    sys.exit(main())
