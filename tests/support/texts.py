"""Small real texts and a tokenizer for them, from Python's own language reference."""

from __future__ import annotations

import copy
import functools
from typing import Any

import _text_job

VOCAB = 512


@functools.cache
def documents(count: int = 12, chars: int = 400) -> tuple[str, ...]:
    """The beginnings of `count` topics of the language reference."""
    from pydoc_data.topics import topics

    return tuple(topics[name].strip()[: chars + 37 * at] for at, name in enumerate(sorted(topics)[:count]))


def tokenizer() -> Any:
    """A byte-level BPE tokenizer of `VOCAB` entries, trained on `documents`; a copy that is the caller's own."""
    return copy.deepcopy(_trained())


@functools.cache
def _trained() -> Any:
    return _text_job.build_tokenizer(documents(40), VOCAB)
