"""A run's records as one HTML page. Reads records only; imports no torch."""

from chronomoe_hf.report.page import write_report

__all__ = ["write_report"]
