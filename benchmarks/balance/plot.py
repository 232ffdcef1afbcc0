"""The plot of benchmarks/balance/run.py: loss against evenness, a panel per setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from balance.front import Point, front, points

Row = dict[str, Any]
# Colour and marker of each arm; arms of one kind share the colour.
_STYLES = {
    "none": ("#000000", "o"),
    "aux 0.001": ("#cc79a7", "v"),
    "aux 0.01": ("#cc79a7", "s"),
    "aux 0.02": ("#cc79a7", "^"),
    "sign 0.001": ("#e69f00", "v"),
    "sign": ("#e69f00", "^"),
    "quantile": ("#999999", "D"),
    "balance 0.2": ("#56b4e9", "s"),
    "balance": ("#0072b2", "o"),
    "protect": ("#009e73", "o"),
    "revive": ("#d55e00", "*"),
}


def plot(results: Row, path: Path) -> bool:
    """Loss against worst Neff/E, a panel per setting with error bars; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {setting: arms for setting in results["settings"] if len(arms := points(results, setting)) > 1}
    if not panels:
        return False
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.4 * columns, 3.6 * rows + 0.6), squeeze=False, sharex=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    shown: dict[str, Any] = {}
    for axis, (setting, arms) in zip(axes.flat, panels.items(), strict=False):
        shown |= _panel(axis, setting, arms)
    for axis in axes[-1]:
        axis.set_xlabel("Neff / E of the worst layer (right is more even)")
    arms_in_order = [arm for arm in _STYLES if arm in shown] + [arm for arm in shown if arm not in _STYLES]
    handles = [shown[arm] for arm in arms_in_order]
    figure.tight_layout(rect=(0, 0.6 / figure.get_figheight(), 1, 1))
    figure.legend(handles, arms_in_order, loc="lower center", ncol=6, frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return True


def _panel(axis: Any, setting: str, arms: list[Point]) -> dict[str, Any]:
    """Draw a setting and return what stands for each arm in the legend."""
    best = sorted((one for one in arms if one.arm in front(arms)), key=lambda one: one.worst)
    axis.axhline(0.0, color="#bbbbbb", linewidth=0.8)
    axis.plot([one.worst for one in best], [one.loss for one in best], color="#999999", linestyle="--", linewidth=1)
    drawn = {}
    for one in arms:
        colour, marker = _STYLES.get(one.arm, ("#666666", "x"))
        bar, size = one.error if one.seeds > 1 else None, 11 if marker == "*" else 6
        drawn[one.arm] = axis.errorbar(
            one.worst, one.loss, yerr=bar, fmt=marker, color=colour, capsize=3, markersize=size, elinewidth=1
        )
    axis.set_title(f"{setting} ({max(one.seeds for one in arms)} seeds)", fontsize=10)
    axis.set_ylabel("validation loss above none, nats")
    axis.tick_params(labelbottom=True)
    return drawn
