"""Numbers in README and docs against the tables in `benchmarks/results/`.

A measured number carries a comment that a reader does not see, right before it, and never at the start of a line
(Markdown would end the paragraph there):

    <!-- results: overhead.json results[shape=d512-e32-k4,preset=observe].ratio_median .3f -->1.011

file, expression, format. An expression is arithmetic over paths into the JSON, with min, max, mean, sum, len, abs and
floor and ceil to a number of decimals:

    runs[setting=e8,arm=balance].valid_loss     rows of a list by their fields; several rows give several values
    runs[-1]['T 1024, E 16'].rows[0:2]          positions in a list or in a mapping; any key in quotes
    mean(runs[arm=balance].valid_loss) - mean(runs[arm=none].valid_loss)
    100 * (results[preset=observe].ratio_median - 1)

The format is Python's (`.3f`, `,d`, `+.1f`). A number with a unit or with decimals that has no such comment must be
listed in `allowed_numbers.txt`, with why it is no measurement. Whole numbers without a unit are not looked for.

    python benchmarks/claims.py            # every claim and what is wrong; status 1 if something is
    python benchmarks/claims.py --write    # put the numbers of the tables into the pages
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import operator
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ALLOWED = ROOT / "benchmarks" / "allowed_numbers.txt"
MADE = {"index.md", "changelog.md", "results.md"}  # written by `make docs`

NUMBER = r"[+\-\u2212]?(?:\d[\d,]*\d|\d)(?:\.\d+)?"
MARKER = re.compile(rf"<!-- results: (\S+\.json) (.+?) (\S+) -->({NUMBER})?")
UNIT = r"(?:x|times|%|us|ms|s|seconds?|minutes?|hours?|nats?|launch(?:es)?|[KMG]?B|bytes|KiB|MiB|GiB|tokens/s)"
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", flags=re.M | re.S)
MEASURE = re.compile(rf"(?<![\w.,\-])({NUMBER})(?:\s?{UNIT}(?!\w)|(?<=\d\.\d)|(?<=\.\d\d)|(?<=\.\d\d\d))(?![\d.]*\d)")

_PATH = re.compile(r"(?<![\w'])([a-zA-Z_]\w*)((?:\.[a-zA-Z_]\w*|\[(?:'[^']*'|[^\]'])*\])+)")
_STEP = re.compile(r"\.([a-zA-Z_]\w*)|\[((?:'[^']*'|[^\]'])*)\]")
_CONDITION = re.compile(r"\s*([a-zA-Z_]\w*)\s*=\s*(?:'([^']*)'|([^,']+))\s*(?:,|$)")
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


class Rows(list[Any]):
    """What several rows of a list have: a step of a path goes into each of them."""


def _flat(*values: Any) -> list[Any]:
    return [each for value in values for each in (_flat(*value) if isinstance(value, list) else [value])]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": lambda *values: min(_flat(*values)),
    "max": lambda *values: max(_flat(*values)),
    "mean": lambda *values: statistics.fmean(_flat(*values)),
    "sum": lambda *values: sum(_flat(*values)),
    "len": lambda *values: len(_flat(*values)),
    "abs": abs,
    "floor": lambda value, digits: math.floor(value * 10**digits) / 10**digits,
    "ceil": lambda value, digits: math.ceil(value * 10**digits) / 10**digits,
}


class ClaimError(ValueError):
    """A marker that cannot be read or leads nowhere."""


@dataclass(frozen=True)
class Claim:
    """One marked number: where it stands, what it names, what is written and what the table says."""

    page: str
    line: int
    source: str
    written: str | None
    wanted: str
    span: tuple[int, int]

    @property
    def holds(self) -> bool:
        """The page says what the table says."""
        return self.written is not None and self.written.replace("\u2212", "-") == self.wanted


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def pages() -> list[Path]:
    """README and the written pages of docs."""
    return [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in MADE)]


def look_up(data: Any, name: str, steps: str) -> Any:
    """The value at a path.

    Raises:
        ClaimError: nothing is there.
    """
    found, walked = _key(data, name, name), name
    for step in _STEP.finditer(steps):
        walked += step[0]
        found = _key(found, step[1], walked) if step[1] is not None else _bracket(found, step[2], walked)
    return found


def _key(data: Any, key: str, walked: str) -> Any:
    if isinstance(data, Rows):
        return Rows(_key(each, key, walked) for each in data)
    if not isinstance(data, dict) or key not in data:
        raise ClaimError(f"nothing at {walked}")
    return data[key]


def _bracket(data: Any, inside: str, walked: str) -> Any:
    if isinstance(data, Rows):
        return Rows(_bracket(each, inside, walked) for each in data)
    if position := re.fullmatch(r"(-?\d+)(:)?(-?\d+)?", inside):
        values = list(data.values()) if isinstance(data, dict) else data
        try:
            first, many, last = position.groups()
            return values[int(first) : int(last) if last else None] if many else values[int(first)]
        except (IndexError, TypeError):
            raise ClaimError(f"nothing at {walked}") from None
    if quoted := re.fullmatch(r"'([^']*)'", inside):
        return _key(data, quoted[1], walked)
    wanted = {match[1]: match[2] if match[2] is not None else match[3].strip() for match in _CONDITION.finditer(inside)}
    if not wanted or _CONDITION.sub("", inside).strip() or not isinstance(data, list):
        raise ClaimError(f"cannot read [{inside}] at {walked}")
    rows = [row for row in data if all(str(row.get(key)) == value for key, value in wanted.items())]
    if not rows:
        raise ClaimError(f"no row at {walked}")
    return rows[0] if len(rows) == 1 else Rows(rows)


def evaluate(expression: str, data: Any) -> Any:
    """The value of an expression over the paths into `data`; see the module docstring.

    Raises:
        ClaimError: it cannot be read, or a path leads nowhere.
    """
    values: list[Any] = []

    def keep(match: re.Match[str]) -> str:
        values.append(look_up(data, match[1], match[2]))
        return f"v{len(values) - 1}"

    try:
        tree = ast.parse(_PATH.sub(keep, expression), mode="eval").body
    except SyntaxError:
        raise ClaimError(f"cannot read {expression!r}") from None
    return _value(tree, values, data)


def _value(node: ast.expr, values: list[Any], data: Any) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name):
        return values[int(node.id[1:])] if re.fullmatch(r"v\d+", node.id) else _key(data, node.id, node.id)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand, values, data))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, values, data), _value(node.right, values, data))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        return _FUNCTIONS[node.func.id](*(_value(each, values, data) for each in node.args))
    raise ClaimError(f"cannot read {ast.unparse(node)!r}")


def render(value: Any, form: str) -> str:
    """A value in a format.

    Raises:
        ClaimError: it is no number, or the format is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ClaimError(f"no single number: {str(value)[:80]}")
    if form.endswith("d"):
        if value != int(value):
            raise ClaimError(f"{value} is not whole")
        value = int(value)
    try:
        return format(value, form)
    except ValueError as error:
        raise ClaimError(str(error)) from None


def claims_of(text: str, page: str, results: Path = RESULTS) -> Iterator[Claim]:
    """Every marked number of a page.

    Raises:
        ClaimError: a marker that cannot be read, naming page and line.
    """
    files: dict[str, Any] = {}
    for match in MARKER.finditer(text):
        file, expression, form, written = match.groups()
        line = _line(text, match.start())
        try:
            if file not in files:
                files[file] = json.loads((results / file).read_text(encoding="utf-8"))
            wanted = render(evaluate(expression, files[file]), form)
        except (ClaimError, OSError) as error:
            raise ClaimError(f"{page}:{line}: {file} {expression}: {error}") from None
        end = match.end()
        yield Claim(page, line, f"{file} {expression}", written, wanted, (end - len(written or ""), end))


def unmarked(text: str) -> list[tuple[int, str]]:
    """Numbers with a unit, or with decimals, that have no marker: line and text. Code is left out."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    # A marked number goes with its unit; a marker without a number leaves what follows to be found.
    text = re.sub(rf"{MARKER.pattern}(?:\s?{UNIT}(?!\w))?", blank, CODE.sub(blank, text))
    text = re.sub(r"<!--.*?-->", blank, text, flags=re.S)
    return [(_line(text, m.start()), re.sub(r"\s+", " ", m[0].strip())) for m in MEASURE.finditer(text)]


def allowed() -> dict[tuple[str, str], str]:
    """(page, number) -> why it is no measurement."""
    found = {}
    for line in ALLOWED.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            page, number, reason = (part.strip() for part in line.split("|", 2))
            found[page, number] = reason
    return found


def allowing(page: str, number: str, known: dict[tuple[str, str], str]) -> tuple[str, str] | None:
    """The line of the list that allows a number; a page of settings (`*`) allows every one without a unit."""
    keys = [(page, number), *([(page, "*")] if re.fullmatch(NUMBER, number) else [])]
    return next((key for key in keys if key in known), None)


def faults_of(text: str, page: str, known: dict[tuple[str, str], str]) -> list[str]:
    """What is wrong on a page, as sentences."""
    wrong = []
    if text.count("<!-- results:") != len(MARKER.findall(text)):
        wrong.append(f"{page}: a marker cannot be read; see benchmarks/claims.py")
    for match in re.finditer(r"^[ \t>*-]*<!-- results:", text, flags=re.M):
        wrong.append(f"{page}:{_line(text, match.start())}: a marker may not begin a line: it would end the paragraph")
    try:
        for claim in claims_of(text, page):
            if not claim.holds:
                wrong.append(f"{page}:{claim.line}: says {claim.written}, {claim.source} says {claim.wanted}")
    except ClaimError as error:
        wrong.append(str(error))
    for line, number in unmarked(text):
        if allowing(page, number, known) is None:
            wrong.append(f"{page}:{line}: {number!r} has no marker and is not in {ALLOWED.name}")
    return wrong


def faults() -> list[str]:
    """Everything that is wrong in README and docs, as sentences."""
    wrong: list[str] = []
    known, used = allowed(), set[tuple[str, str] | None]()
    for path in pages():
        page, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        wrong += faults_of(text, page, known)
        used |= {allowing(page, number, known) for _, number in unmarked(text)}
    wrong += [f"{ALLOWED.name}: {page} no longer says {number!r}" for page, number in sorted(known.keys() - used)]
    return wrong


def corrected(text: str, page: str) -> str:
    """The page with the numbers that the tables say."""
    for claim in reversed(list(claims_of(text, page))):
        text = text[: claim.span[0]] + claim.wanted + text[claim.span[1] :]
    return text


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the numbers of the tables into the pages")
    if parser.parse_args().write:
        for path in pages():
            path.write_text(corrected(path.read_text(encoding="utf-8"), path.name), encoding="utf-8")
    found = faults()
    total = 0
    for path in pages():
        for claim in claims_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))):
            print(f"{claim.page}:{claim.line}: {claim.written} = {claim.source}")
            total += 1
    print("\n".join([*found, f"{total} claims, {len(found)} faults"]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
