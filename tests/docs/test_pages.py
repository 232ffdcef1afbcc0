"""Every Python block of README and docs runs: here, or in the test beside the room that its page is about.

A block after ``<!-- not run: reason -->`` is left out; it must say why.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Pages whose blocks a test of their own runs, with what they must show.
ELSEWHERE = {
    "docs/checkpoints.md": "tests/checkpoint/test_docs.py",
    "docs/configuration.md": "tests/config/test_docs.py",
    "docs/integration.md": "tests/trainer/test_docs.py",
    "docs/cut.md": "tests/lifecycle/test_docs.py",
    "docs/lifecycle.md": "tests/lifecycle/test_docs.py",
    "docs/pictures.md": "tests/tracing/test_docs.py",
    "docs/roles.md": "tests/lifecycle/test_docs.py",
    "docs/profile_and_export.md": "tests/cli/test_pruning_docs.py",
    "docs/report.md": "tests/report/test_docs.py",
    "docs/wrapping.md": "tests/wrapping/test_docs.py",
}
MADE = {"index.md", "changelog.md", "results.md"}  # written by `make docs` from the README and other files
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*$")


class Block(NamedTuple):
    """One fenced block: its language, its code, and why it is not run, or None."""

    language: str
    code: str
    reason: str | None


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S):
        marked = NOT_RUN.search(text[: match.start()])
        found.append(Block(match[1], match[2], marked[1] if marked else None))
    return found


def pages() -> list[str]:
    found = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in MADE)
    return ["README.md", *(str(path.relative_to(ROOT)) for path in found)]


def test_every_page_with_python_has_a_test() -> None:
    with_python = {
        page
        for page in pages()
        if any(b.language == "python" and b.reason is None for b in blocks_of((ROOT / page).read_text("utf-8")))
    }
    assert with_python >= {"README.md", "docs/concepts.md"}, "hardly a block was found; is the reader broken?"
    for page, test in ELSEWHERE.items():
        source = (ROOT / test).read_text("utf-8")
        assert Path(page).name in source, f"{test} does not read {page}"
    assert {page for page in ELSEWHERE} <= set(pages())


def scripts() -> dict[str, str]:
    """The Python of every page that has no test of its own, as one script a page."""
    found = {}
    for page in pages():
        blocks = [
            b.code for b in blocks_of((ROOT / page).read_text("utf-8")) if b.language == "python" and not b.reason
        ]
        if blocks and page not in ELSEWHERE:
            found[page] = "\n".join(blocks)
    return found


@pytest.mark.parametrize("page", scripts())
def test_the_python_of_a_page_runs(page: str, tmp_path: Path) -> None:
    """In a process of its own: a page may register an adapter."""
    done = subprocess.run([sys.executable, "-c", scripts()[page]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_not_run_is_rare_and_says_why() -> None:
    left = [(page, b.reason) for page in pages() for b in blocks_of((ROOT / page).read_text("utf-8")) if b.reason]
    assert len(left) <= 3 and all(len(reason or "") > 20 for _, reason in left), left


def test_commands_in_shell_blocks_exist() -> None:
    """Make targets, chronomoe commands, example and benchmark scripts."""
    from chronomoe_hf.cli.main import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M))
    seen = 0
    for page in pages():
        for block in blocks_of((ROOT / page).read_text("utf-8")):
            if block.language not in ("bash", "sh", "shell"):
                continue
            for line in block.code.splitlines():
                words = line.split("#")[0].split()
                if words[:1] == ["chronomoe"] and len(words) > 1 and not words[1].startswith("-"):
                    assert words[1] in known, f"{page}: {line}"
                    seen += 1
                if words[:1] == ["make"]:
                    assert words[1] in targets, f"{page}: {line}"
                    seen += 1
                for word in words:
                    if re.match(r"(examples|benchmarks)/[\w/]+\.py$", word):
                        assert (ROOT / word).is_file(), f"{page}: {line}"
    assert seen > 10, "hardly a command was found; is the reader broken?"


def test_links_between_pages_lead_somewhere() -> None:
    for page in pages():
        here = (ROOT / page).parent
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text("utf-8")):
            assert (here / target).exists(), f"{page} links to {target}"


def test_docstrings_cite_pages_and_sections_that_exist() -> None:
    """A formula's source is a page of docs/ or a paper, never a document that the repository does not have."""
    seen = 0
    for path in [*(ROOT / "chronomoe_hf").rglob("*.py"), *(ROOT / "patches").rglob("*.py")]:
        text = path.read_text("utf-8")
        assert not re.search(r"\b(SPEC|DESIGN)\b(?!\w)", text), f"{path.name} cites a document that is not here"
        for page, section in re.findall(r'(docs/\w+\.md)(?:, "([^"]+)")?', text):
            headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text("utf-8"), flags=re.M)
            assert not section or re.sub(r"\s+", " ", section) in headings, f"{path.name}: {page} has no {section!r}"
            seen += 1
    assert seen > 15
