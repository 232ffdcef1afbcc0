"""Hugging Face Trainer glue."""

from chronomoe_hf.trainer.attach import attach, detach
from chronomoe_hf.trainer.callback import ChronoCallback

__all__ = ["ChronoCallback", "attach", "detach"]
