"""examples/accelerate_loop.py on CPU processes with FSDP2, which accelerate would silently replace by DDP."""

from __future__ import annotations

import sys

import accelerate_loop
import cpu_engines
from accelerate import PartialState
from accelerate.utils import DistributedType

if __name__ == "__main__":
    cpu_engines.allow_fsdp()
    accelerate_loop.main(sys.argv[1:])
    assert PartialState().distributed_type == DistributedType.FSDP
