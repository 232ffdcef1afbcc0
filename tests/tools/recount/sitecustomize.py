"""Counts what Mixtral's experts are given in a process, apart from chronomoe_hf: real tokens per layer and expert.

Put the folder on PYTHONPATH and name a file in RECOUNT_TO. What counts is the dispatch (which a law on routing may
have changed), in training mode with gradients, inside the model's own forward (so no recomputation). Written when the
process ends.
"""

from __future__ import annotations

import atexit
import importlib.abc
import importlib.util
import json
import os
import sys

NAME = "transformers.models.mixtral.modeling_mixtral"


class Counter:
    def __init__(self):
        self.counts, self.mask, self.at, self.inside = {}, None, 0, False

    def install(self, module):
        import torch

        model, experts = module.MixtralModel, module.MixtralExperts
        native_model = model.forward

        def model_forward(this, *args, **kwargs):
            ids = kwargs.get("input_ids", args[0] if args else None)
            mask = kwargs.get("attention_mask")
            shown = ids if ids is not None else kwargs["inputs_embeds"]
            two = isinstance(mask, torch.Tensor) and mask.dim() == 2
            real = torch.ones(shown.shape[:2], dtype=torch.bool)
            if ids is not None and this.config.pad_token_id is not None:
                real = ids != this.config.pad_token_id  # packed rows come without a mask; no text holds a pad
            self.mask = (mask.bool() if two else real).flatten()
            self.at, self.inside = 0, this.training and torch.is_grad_enabled()
            try:
                return native_model(this, *args, **kwargs)
            finally:
                self.inside = False

        def dispatched(this, args):
            if not (self.inside and isinstance(this, experts)):
                return
            index = args[1]
            counted = torch.bincount(index[self.mask].flatten(), minlength=this.num_experts).tolist()
            before = self.counts.get(self.at, [0] * len(counted))
            self.counts[self.at] = [a + b for a, b in zip(before, counted, strict=True)]
            self.at += 1

        # Transformers reads the signature of forward to tell which columns a model takes.
        model_forward.__wrapped__ = native_model
        model.forward = model_forward
        torch.nn.modules.module.register_module_forward_pre_hook(dispatched)
        atexit.register(self.write)

    def write(self):
        if self.counts:
            with open(f"{os.environ['RECOUNT_TO']}.{os.getpid()}", "w", encoding="utf-8") as file:
                json.dump([self.counts[at] for at in sorted(self.counts)], file)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        native = spec.loader.exec_module

        def exec_module(module):
            native(module)
            Counter().install(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("RECOUNT_TO"):
    sys.meta_path.insert(0, Finder())
