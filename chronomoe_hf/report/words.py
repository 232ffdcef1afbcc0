"""Numbers and lists as the sentences of a report say them."""

from __future__ import annotations


def percent(value: float | None) -> str:
    """``57 %``, or a dash."""
    return "-" if value is None else f"{100 * value:.0f} %"


def points(change: float) -> str:
    """``+3.1 points``: a change of a fraction in hundredths."""
    return f"{100 * change:+.1f} points"


def counted(number: int, noun: str) -> str:
    """``1 window``, ``3 windows``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: list[str], most: int = 4) -> str:
    """``a, b and c``; of many names the first ones and how many more."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"
