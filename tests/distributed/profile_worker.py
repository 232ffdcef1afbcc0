"""One process of a profile under torchrun: argument 1 holds `model` and the texts, and receives `out`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from support.gloo_exit import leave
from transformers import AutoModelForCausalLM, AutoTokenizer

import chronomoe_hf

root = Path(sys.argv[1])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
chronomoe_hf.profile(
    AutoModelForCausalLM.from_pretrained(root / "model"),
    AutoTokenizer.from_pretrained(root / "model"),
    {"first": root / "first.jsonl", "second": root / "second.jsonl"},
    output_dir=root / "out",
    tokens=None,
    length=24,
    batch_size=3,
    interval=2,
)
leave()
