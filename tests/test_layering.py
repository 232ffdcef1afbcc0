"""Imports go one way. Reads the sources; imports none of them."""

from __future__ import annotations

import ast
import functools
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PAGE = ROOT / "docs" / "architecture.md"


def rooms_of(page: str) -> tuple[str, ...]:
    """The first column of the page's first table: the rooms in the order of imports."""
    lines = page[page.index("| room |") :].splitlines()[2:]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return tuple(line.split("|")[1].strip().strip("`") for line in rows)


# A room may import itself and the rooms further up in the table. Imports for types count too.
ROOMS = rooms_of(PAGE.read_text(encoding="utf-8"))
# Files that may not import these libraries, directly.
FORBIDDEN = {
    "chronomoe_hf.metrics": ("transformers", "torch.distributed"),
    "chronomoe_hf.coherence": ("transformers", "torch.distributed"),
    "chronomoe_hf.controller.policy": ("transformers", "torch.distributed", "torch"),
}
ONLY_IN = {"torch.distributed": "distributed"}
# Packages that offer users names of rooms to their right, on first use. What a file takes from one of them lies in the
# room of the name: the one that its __init__ imports it from.
DOORS = ("chronomoe_hf.lifecycle", "chronomoe_hf.router")


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package: dotted import name -> file."""
    found = {}
    for folder, package in ((ROOT / "chronomoe_hf", "chronomoe_hf"), (ROOT / "patches", "chronomoe_hf.patches")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imported(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, dotted target) of every import in `source`, relative ones resolved, `from a import b` as ``a.b``."""
    package = module if is_package else module.rpartition(".")[0]
    out = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            out += [(node.lineno, text) for text in map(_text, node.args[:1]) if text is not None]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([node.module] if node.module else [])])
            out += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return out


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _text(node: ast.expr) -> str | None:
    """A constant text, with ``__name__`` and other parts that are no constants left out; None where there is none."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
    return node.value.rstrip(".") if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def room_of(target: str) -> str | None:
    """The room a dotted name lies in; '' for the package root itself, None outside the package."""
    parts = target.split(".")
    if parts[0] != "chronomoe_hf":
        return None
    if target in DOORS:
        return rightmost(target)
    if ".".join(parts[:2]) in DOORS and len(parts) == 3 and target not in modules():
        return room_of(homes_of(parts[1]).get(parts[2], "chronomoe_hf"))
    for room in ("/".join(parts[1:3]), *parts[1:2]):
        if room in ROOMS:
            return room
    return ""


@functools.cache
def homes_of(door: str) -> dict[str, str]:
    """Name -> module of everything that a door imports, for types too."""
    path = ROOT / "chronomoe_hf" / door / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        alias.name: node.module or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def rightmost(door: str) -> str:
    """The last room that a door opens to: who takes the door whole must lie right of it."""
    rooms = {room_of(home) for home in homes_of(door.rpartition(".")[2]).values()} - {None, ""}
    return max((room for room in rooms if room), key=ROOMS.index)


def within(target: str, library: str) -> bool:
    return target == library or target.startswith(library + ".")


def is_untyped(annotation: ast.expr | None) -> bool:
    return annotation is None or any(
        (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Constant) and node.value == "Any")
        for node in ast.walk(annotation)
    )


def untyped_systems(source: str) -> list[int]:
    """Lines with an argument or a field that is named after a ChronoSystem and typed `Any`, or not at all."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg) and node.arg == "system" and is_untyped(node.annotation):
            lines.append(node.lineno)
        elif isinstance(node, ast.AnnAssign) and is_untyped(node.annotation):
            name = getattr(node.target, "id", getattr(node.target, "attr", ""))
            lines += [node.lineno] if name == "system" else []
    return sorted(lines)


def violations(module: str, source: str, is_package: bool) -> list[str]:
    """Every line of `source` that imports against the order."""
    if module in DOORS:
        return []
    here = room_of(module)
    assert here is not None
    if here == "":
        return [] if module == "chronomoe_hf" else [f"{module}: not a room; add it to ROOMS at its place in the order"]
    out = [f"{module}:{line}: a ChronoSystem typed Any; name its type" for line in untyped_systems(source)]
    for line, target in imported(source, module, is_package):
        room = room_of(target)
        if room is not None and target != "chronomoe_hf.__version__":
            if room == "":
                out.append(f"{module}:{line} imports {target}: the public root is for users; import the room")
            elif ROOMS.index(room) > ROOMS.index(here):
                out.append(f"{module}:{line} imports {target}: {room} is to the right of {here}")
        out += [
            f"{module}:{line} imports {target}: {library} is not for {module}"
            for library in FORBIDDEN.get(module, ())
            if within(target, library)
        ]
        out += [
            f"{module}:{line} imports {target}: only {room} may"
            for library, room in ONLY_IN.items()
            if within(target, library) and here != room
        ]
    return out


def test_imports_go_one_way() -> None:
    found = []
    edges = 0
    for module, path in modules().items():
        source = path.read_text(encoding="utf-8")
        is_package = path.name == "__init__.py"
        found += violations(module, source, is_package)
        edges += sum(room_of(target) is not None for _, target in imported(source, module, is_package))
    assert edges >= 5, "hardly an import inside the package was read; is the reader broken?"
    assert not found, "\n".join(found)


def test_every_room_of_the_table_has_a_file() -> None:
    there = {room_of(module) for module in modules() if module not in DOORS} - {""}
    assert set(ROOMS) == there and len(set(ROOMS)) == len(ROOMS)


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A list of modules each of which imports the next, the last one the first; empty where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for target in sorted(edges.get(module, ())):
            if found := walk(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(edges) if (found := walk(module, []))), [])


def file_edges() -> dict[str, set[str]]:
    """Which file imports which, by module name; a package's own __init__ stands for itself."""
    files = modules()
    edges: dict[str, set[str]] = {}
    for module, path in files.items():
        targets = set()
        for _, target in imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
            while target not in files and "." in target:
                target = target.rpartition(".")[0]
            # Importing a file runs its package's __init__ too; that is Python's business, not a circle of ours.
            if target in files and target != module:
                targets.add(target)
        edges[module] = targets
    return edges


def test_no_two_files_import_each_other() -> None:
    doors = {"chronomoe_hf", *DOORS}
    edges = {module: targets for module, targets in file_edges().items() if module not in doors}
    assert sum(map(len, edges.values())) > 100, "hardly an import was read; is the reader broken?"
    assert circle(edges) == []


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert circle({"a": {"b"}, "b": {"c"}, "d": {"a"}}) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("chronomoe_hf.metrics", "from chronomoe_hf.system import ChronoSystem", "to the right"),
        ("chronomoe_hf.metrics", "def f():\n    import chronomoe_hf.api", "to the right"),
        ("chronomoe_hf.patches.mixtral", "from ..telemetry import events", "to the right"),
        ("chronomoe_hf.router.forward", "from chronomoe_hf import wrap", "public root"),
        ("chronomoe_hf.router.forward", "import chronomoe_hf", "public root"),
        ("chronomoe_hf.coherence", "import transformers", "is not for"),
        ("chronomoe_hf.controller.policy", "import torch", "is not for"),
        ("chronomoe_hf.system", "from torch import distributed", "only distributed may"),
        (
            "chronomoe_hf.router.forward",
            "if TYPE_CHECKING:\n    pass\nelse:\n    import chronomoe_hf.api",
            "to the right",
        ),
        ("chronomoe_hf.helpers", "", "not a room"),
        ("chronomoe_hf.metrics", "import_module('chronomoe_hf.system')", "to the right"),
        ("chronomoe_hf.metrics", "import importlib\nimportlib.import_module(f'chronomoe_hf.api.{x}')", "to the right"),
        (
            "chronomoe_hf.lifecycle.evidence.table",
            "from chronomoe_hf.lifecycle.live.model import layer_specs",
            "lifecycle/live is to the right of lifecycle/evidence",
        ),
        ("chronomoe_hf.export.live", "from chronomoe_hf.lifecycle import plan_split", "splitting is to the right"),
        ("chronomoe_hf.system", "from chronomoe_hf import lifecycle", "to the right"),
        ("chronomoe_hf.step_state", "from chronomoe_hf.router import update_beta", "original is to the right"),
        ("chronomoe_hf.lifecycle.live.model", "def f(system: Any) -> None: ...", "typed Any"),
        ("chronomoe_hf.lifecycle.live.model", "class A:\n    system: Any | None", "typed Any"),
        ("chronomoe_hf.lifecycle.live.model", "def f(system: 'Any') -> None: ...", "typed Any"),
        ("chronomoe_hf.lifecycle.live.model", "def f(system): ...", "typed Any"),
    ],
)
def test_a_violation_is_seen(module: str, source: str, expected: str) -> None:
    assert any(expected in line for line in violations(module, source, False))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "chronomoe_hf.system",
            "from chronomoe_hf.telemetry.events import RoutingEvent\nfrom chronomoe_hf import errors",
        ),
        ("chronomoe_hf.patches.mixtral", "from .registry import register\nfrom ..router import ChronoRouter"),
        ("chronomoe_hf.distributed", "import torch.distributed as dist"),
        ("chronomoe_hf", "from chronomoe_hf.api import wrap"),
        ("chronomoe_hf.export.live", "from chronomoe_hf.lifecycle import PrunePlan, measure"),
        ("chronomoe_hf.cli.export", "from chronomoe_hf import lifecycle"),
        ("chronomoe_hf.trainer.attach", "def f(system: ChronoSystem | None) -> None: ..."),
    ],
)
def test_the_allowed_direction_passes(module: str, source: str) -> None:
    assert violations(module, source, module == "chronomoe_hf") == []
