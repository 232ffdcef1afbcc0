"""examples/accelerate_loop.py on CPU processes; with FSDP2 too, which accelerate would silently replace by DDP."""

from __future__ import annotations

import os
import sys

import accelerate_loop
import cpu_engines
from accelerate import PartialState
from accelerate.utils import DistributedType
from support import gloo_exit

if __name__ == "__main__":
    sharded = "ACCELERATE_USE_FSDP" in os.environ
    if sharded:
        cpu_engines.allow_fsdp()
    accelerate_loop.main(sys.argv[1:])
    assert (PartialState().distributed_type == DistributedType.FSDP) is sharded
    gloo_exit.leave()
