"""Hugging Face Trainer glue."""

from chronomoe_hf.trainer.callback import ChronoCallback, attach

__all__ = ["ChronoCallback", "attach"]
