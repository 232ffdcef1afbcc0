"""Write `docs/results.md` from the tables in `benchmarks/results/`, and put their plots beside it.

A table `NAME.md` is followed by `NAME_notes.md`, unless the table holds the notes already, and by every plot
`NAME*.png`. Tables that are not in ORDER come last, so that none is forgotten.

    python benchmarks/results_page.py [--results DIRECTORY] [--docs DIRECTORY]
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDER = (
    "launches",
    "overhead",
    "cost",
    "records",
    "rivals",
    "throughput",
    "balance",
    "prune_quality",
    "export_cost",
    "gpu",
)
HEAD = """# Results

Every table is written by a script in `benchmarks/`; the notes beside them are not. `make bench` runs them again on the
CPU. A number in these docs that was measured is compared with its table by a test.
"""


def tables(results: Path) -> list[str]:
    """Names of the tables, in the order of the page."""
    found = {path.stem for path in results.glob("*.md") if not path.stem.endswith("_notes")}
    return [name for name in ORDER if name in found] + sorted(found - set(ORDER))


def one_level_down(text: str) -> str:
    """Headings one level lower; lines of code blocks stay."""
    parts = re.split(r"(^```.*?^```$)", text.strip(), flags=re.M | re.S)
    return "".join(part if part.startswith("```") else re.sub(r"^#", "##", part, flags=re.M) for part in parts)


def page(results: Path, images: str) -> str:
    """The page; plots are linked below `images`.

    Args:
        results: directory of the tables.
        images: folder of the plots, as seen from the page.
    """
    parts = [HEAD.strip()]
    names = tables(results)
    for name in names:
        text = (results / f"{name}.md").read_text(encoding="utf-8").strip()
        notes = results / f"{name}_notes.md"
        more = notes.read_text(encoding="utf-8").strip() if notes.is_file() else ""
        parts.append(one_level_down(text))
        if more and more not in text:
            parts.append(one_level_down(more))
        parts += [f"![{_caption(plot)}]({images}/{plot.name})" for plot in _plots(results, name, names)]
    return "\n\n".join(parts) + "\n"


def _plots(results: Path, name: str, names: list[str]) -> list[Path]:
    """Plots of a table: those that begin with its name, and with no longer name of another table."""
    found = sorted(results.glob(f"{name}*.png"))
    longer = [other for other in names if other.startswith(name) and other != name]
    return [plot for plot in found if not any(plot.stem.startswith(other) for other in longer)]


def _caption(plot: Path) -> str:
    return plot.stem.replace("_", " ").capitalize()


def write(results: Path, docs: Path) -> None:
    """`results.md` and the plots, below `docs`."""
    images = docs / "images" / "results"
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir(parents=True)
    for plot in results.glob("*.png"):
        shutil.copyfile(plot, images / plot.name)
    (docs / "results.md").write_text(page(results, "images/results"), encoding="utf-8")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    write(options.results, options.docs)


if __name__ == "__main__":
    main()
