"""A run's records as one HTML page and as a verdict. Reads records only; imports no torch."""

from typing import Any

from chronomoe_hf.report.verdict import judge_directory

__all__ = ["judge_directory", "write_report"]


def __getattr__(name: str) -> Any:
    if name == "write_report":  # the page needs jinja2, a verdict does not
        from chronomoe_hf.report.page import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
