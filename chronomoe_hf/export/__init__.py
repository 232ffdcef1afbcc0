"""A checkpoint with fewer experts, from a live model or from files; users call it ``lifecycle.export``."""

from chronomoe_hf.export.card import ExportReport
from chronomoe_hf.export.files import export_checkpoint
from chronomoe_hf.export.live import export

__all__ = ["ExportReport", "export", "export_checkpoint"]
