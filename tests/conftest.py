"""Shared by every test: quiet libraries, one thread, fixed seeds, and tiny models of the first-class families.

`from support import models` gives the same factory outside fixtures (parametrisation, worker scripts).
"""

from __future__ import annotations

import os

# Before torch is imported anywhere: the tests run in parallel processes, more threads only fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import transformers
from support import models as tiny


def pytest_configure(config: pytest.Config) -> None:
    """Quiet libraries once per process; no property test is judged by the time that it takes on a busy machine."""
    hypothesis.settings.register_profile("no deadline", deadline=None)
    hypothesis.settings.load_profile("no deadline")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seeds() -> Iterator[None]:
    """Every test starts from the same random state and leaves no default dtype behind."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def tiny_model() -> Callable[..., transformers.PreTrainedModel]:
    """Factory ``tiny_model(family, seed=0, dtype=torch.float32, train=True, **config)``; see support/models.py."""
    return tiny.tiny_model


@pytest.fixture
def tiny_batch() -> Callable[..., dict[str, Any]]:
    """Factory ``tiny_batch(family, batch=4, length=16, seed=0, padded=False)``; see tests/support/models.py."""
    return tiny.tiny_batch


@pytest.fixture(params=sorted(tiny.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each first-class family in turn."""
    return str(request.param)
