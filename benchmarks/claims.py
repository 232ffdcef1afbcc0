"""Numbers in README and docs against the tables in `benchmarks/results/`.

A measured number carries a comment that a reader does not see, right before it, and never at the start of a line
(Markdown would end the paragraph there):

    <!-- n:overhead_observe -->2 %

The name stands in `numbers.toml` with its table, an expression and a format:

    [[numbers]]
    table = "overhead.json"
    overhead_observe = ["100*(max(results[graph=eager,preset=observe].ratio_median)-1)", ".0f"]

An expression is arithmetic over paths into the JSON, with min, max, mean, sum, len, abs and floor and ceil to a number
of decimals:

    runs[setting=e8,arm=balance].valid_loss     rows of a list by their fields; several rows give several values
    runs[-1]['T 1024, E 16'].rows[0:2]          positions in a list or in a mapping; any key in quotes
    mean(runs[arm=balance].valid_loss) - mean(runs[arm=none].valid_loss)
    100 * (results[preset=observe].ratio_median - 1)

The format is Python's (`.3f`, `,d`, `+.1f`). `each.arm = ["none", "balance"]` makes one number of each for a name with
`{arm}` in it; `each.arm = { full = "'balance 0.2'" }` says what stands in the expression where the name says `full`.

A number with a unit or with decimals that has no such comment must be listed in `allowed_numbers.txt`, with why it is
no measurement. Whole numbers without a unit are not looked for.

    python benchmarks/claims.py            # every claim and what is wrong; status 1 if something is
    python benchmarks/claims.py --write    # put the numbers of the tables into the pages
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import json
import math
import operator
import re
import statistics
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ALLOWED = ROOT / "benchmarks" / "allowed_numbers.txt"
NUMBERS = ROOT / "benchmarks" / "numbers.toml"
MADE = {"index.md", "changelog.md", "results.md"}  # written by `make docs`

NUMBER = r"[+\-\u2212]?(?:\d[\d,]*\d|\d)(?:\.\d+)?"
MARKER = re.compile(rf"<!-- n:([a-z]\w*) -->({NUMBER})?")
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
class Formula:
    """What `numbers.toml` says about a name; `line` is the name as it stands there, with its braces."""

    line: str
    table: str
    expression: str
    form: str


@dataclass(frozen=True)
class Claim:
    """One marked number: where it stands, its name, what is written and what the table says."""

    page: str
    line: int
    name: str
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


def formulas(path: Path = NUMBERS) -> dict[str, Formula]:
    """Every name of `numbers.toml`.

    Raises:
        ClaimError: a group without a table, a formula of another shape, or a name that stands there twice.
    """
    found: dict[str, Formula] = {}
    for group in tomllib.loads(path.read_text(encoding="utf-8"))["numbers"]:
        words = {word: _words(choices) for word, choices in group.pop("each", {}).items()}
        table = group.pop("table", None)
        for line, said in group.items():
            if table is None or not (isinstance(said, list) and [type(each) for each in said] == [str, str]):
                raise ClaimError(f"{path.name}: {line} needs a table above it and [expression, format]")
            for name, expression in _expanded(line, said[0], words):
                if name in found:
                    raise ClaimError(f"{path.name}: {name} stands there twice")
                found[name] = Formula(line, table, expression, said[1])
    return found


def _words(choices: list[str] | dict[str, str]) -> dict[str, str]:
    return choices if isinstance(choices, dict) else {each: each for each in choices}


def _expanded(name: str, expression: str, words: dict[str, dict[str, str]]) -> Iterator[tuple[str, str]]:
    used = [word for word in words if f"{{{word}}}" in name]
    for keys in itertools.product(*(words[word] for word in used)):
        made, meant = name, expression
        for word, key in zip(used, keys, strict=True):
            made, meant = made.replace(f"{{{word}}}", key), meant.replace(f"{{{word}}}", words[word][key])
        yield made, meant


@functools.cache
def _table(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def value_of(formula: Formula, results: Path = RESULTS) -> str:
    """The number as a page has to write it.

    Raises:
        ClaimError: the expression cannot be read, or a path leads nowhere.
    """
    try:
        return render(evaluate(formula.expression, _table(results / formula.table)), formula.form)
    except (ClaimError, OSError) as error:
        raise ClaimError(f"{formula.table} {formula.expression}: {error}") from None


def claims_of(text: str, page: str, known: dict[str, Formula] | None = None) -> Iterator[Claim]:
    """Every marked number of a page.

    Raises:
        ClaimError: a marker that cannot be read, naming page and line.
    """
    known = formulas() if known is None else known
    for match in MARKER.finditer(text):
        name, written = match.groups()
        line = _line(text, match.start())
        if name not in known:
            raise ClaimError(f"{page}:{line}: {NUMBERS.name} has no {name}")
        try:
            wanted = value_of(known[name])
        except ClaimError as error:
            raise ClaimError(f"{page}:{line}: {name}: {error}") from None
        end = match.end()
        yield Claim(page, line, name, written, wanted, (end - len(written or ""), end))


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
    if text.count("<!-- n:") + text.count("<!-- results:") != len(MARKER.findall(text)):
        wrong.append(f"{page}: a marker cannot be read; see benchmarks/claims.py")
    for match in re.finditer(r"^[ \t>*-]*<!-- n:", text, flags=re.M):
        wrong.append(f"{page}:{_line(text, match.start())}: a marker may not begin a line: it would end the paragraph")
    try:
        for claim in claims_of(text, page):
            if not claim.holds:
                wrong.append(f"{page}:{claim.line}: says {claim.written}, {claim.name} is {claim.wanted}")
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
    named = {name for path in pages() for name, _ in MARKER.findall(path.read_text(encoding="utf-8"))}
    defined = formulas()
    unused = {formula.line for formula in defined.values()} - {defined[name].line for name in named & defined.keys()}
    wrong += [f"{NUMBERS.name}: no page has {line}" for line in sorted(unused)]
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
            print(f"{claim.page}:{claim.line}: {claim.written} = {claim.name}")
            total += 1
    print("\n".join([*found, f"{total} claims, {len(found)} faults"]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
