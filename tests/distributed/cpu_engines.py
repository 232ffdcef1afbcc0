"""Lets accelerate run FSDP2 and DeepSpeed on CPU processes over gloo. For tests only; the engines are the real ones.

accelerate picks its engine by device: for several CPU processes it always takes DDP (it would *silently* train
without FSDP), and for DeepSpeed without an accelerator it finds no backend. Both choices are overruled here.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType


def allow_fsdp() -> None:
    """Make ``TrainingArguments(use_cpu=True, fsdp=True)`` mean FSDP."""
    original = state.AcceleratorState.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            # Every later AcceleratorState() copies its fields from here.
            state.PartialState._shared_state["distributed_type"] = self.distributed_type

    state.AcceleratorState.__init__ = init


def allow_deepspeed() -> None:
    """Make ``TrainingArguments(use_cpu=False, deepspeed=...)`` find gloo and all its processes."""
    # A shared-memory shortcut that is compiled with ninja on first use: minutes, for tests that need seconds.
    # (The attribute deepspeed.comm.torch is PyTorch itself: a star import there hides the module of that name.)
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    original = state.PartialState._prepare_backend

    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend, kind = original(self, *args, **kwargs)
        return ("gloo", DistributedType.MULTI_CPU) if backend is None else (backend, kind)

    state.PartialState._prepare_backend = prepare


ENGINES = {"fsdp": allow_fsdp, "zero2": allow_deepspeed, "zero3": allow_deepspeed}
