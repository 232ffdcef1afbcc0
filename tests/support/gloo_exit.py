"""How a test process under torchrun ends."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch


def leave() -> NoReturn:
    """Wait for the other ranks, then end this process with status 0, without the interpreter's own shutdown.

    A device mesh, FSDP and DDP hold process groups beyond ``destroy_process_group``, and with them gloo's threads. A
    thread that is about to release the tensors of a finished collective when the interpreter shuts down aborts the
    process ("terminate called without an active exception"; pytorch/pytorch#190489), whoever started the collective.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
