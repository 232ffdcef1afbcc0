"""What is declared is what is there: packages, dependencies, pinned versions, the built wheel."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OWN = "chronomoe-hf"


def packages_on_disk() -> set[str]:
    """Dotted name of every folder that holds Python sources."""
    names = set()
    for folder, package in ((ROOT / "chronomoe_hf", "chronomoe_hf"), (ROOT / "patches", "chronomoe_hf.patches")):
        for path in folder.rglob("*.py"):
            names.add(".".join((package, *path.parent.relative_to(folder).parts)))
    return names


def declared(*extras: str) -> dict[str, Requirement]:
    """Canonical name -> requirement, of the core dependencies and of `extras`, nested extras followed."""
    lines = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        lines += PROJECT["project"]["optional-dependencies"][extra]
    out: dict[str, Requirement] = {}
    for line in lines:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name == OWN:
            out |= declared(*requirement.extras)
        else:
            out[name] = requirement
    return out


def pins() -> dict[str, str]:
    """Canonical name -> version, of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def third_party_imports() -> dict[str, str]:
    """Top-level import name -> one file that imports it, over the package, without the standard library."""
    out = {}
    for folder in ("chronomoe_hf", "patches"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                for name in names:
                    top = name.split(".")[0]
                    if top not in sys.stdlib_module_names and top != "chronomoe_hf":
                        out[top] = str(path.relative_to(ROOT))
    return out


def test_every_package_folder_is_listed() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == packages_on_disk()


def test_every_package_has_an_init_file() -> None:
    for name in PROJECT["tool"]["setuptools"]["packages"]:
        folder = ROOT / name.replace("chronomoe_hf.patches", "patches").replace(".", "/")
        assert (folder / "__init__.py").is_file(), name


def test_every_import_is_a_declared_dependency() -> None:
    core = declared()
    found = third_party_imports()
    assert "torch" in found
    # Optional at run time, behind a function that says so: an import there needs an extra, not a core dependency.
    optional = declared("peft", "trl", "tensorboard", "deepspeed", "notebook")
    # Comes with Transformers itself, whose requirement decides the version.
    through_transformers = {"huggingface-hub"}
    # A tool that people train with is imported by the file of its name, which only that tool loads.
    tools = {"axolotl", "lightning", "pytorch_lightning", "llamafactory", "swift", "pydantic"}
    inside = {
        name for name in tools if found.get(name, "chronomoe_hf/integrations/").startswith("chronomoe_hf/integrations/")
    }
    assert inside == tools
    found = {"pillow" if name == "PIL" else name: path for name, path in found.items() if name not in tools}
    unknown = {
        name: path
        for name, path in found.items()
        if canonicalize_name(name) not in {*core, *optional, *through_transformers}
    }
    assert not unknown, f"imported but not declared in pyproject.toml: {unknown}"


def test_every_dependency_is_pinned_within_its_range() -> None:
    pinned = pins()
    requirements = declared("dev")
    assert {"torch", "transformers", "pytest", "peft", "trl", "tensorboard"} <= set(requirements)
    for name, requirement in requirements.items():
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pinned[name], prereleases=True), f"{requirement} excludes {pinned[name]}"


def test_constraints_name_versions_only() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line]
    for line in lines:
        assert line.startswith("#") or (line.count("==") == 1 and not set(" /@+;") & set(line)), line


def copy_of_the_sources(tmp_path: Path) -> Path:
    """What a package is built from, without what a checkout also holds."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("chronomoe_hf", "patches"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    return source


def test_the_source_archive_installs(tmp_path: Path) -> None:
    source = copy_of_the_sources(tmp_path)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet", "--target"]
    done = subprocess.run([*install, str(tmp_path / "site"), str(archive)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.*")}
    templates = {path.name for path in (ROOT / "chronomoe_hf" / "report" / "templates").iterdir()}
    assert {"chronomoe_hf/__init__.py", "chronomoe_hf/patches/__init__.py", "chronomoe_hf/py.typed"} <= found
    assert {f"chronomoe_hf/report/templates/{name}" for name in templates} <= found


def test_the_wheel_holds_the_mapped_folder(tmp_path: Path) -> None:
    source = copy_of_the_sources(tmp_path)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir"]
    done = subprocess.run([*build, str(tmp_path), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert {"chronomoe_hf/__init__.py", "chronomoe_hf/patches/__init__.py", "chronomoe_hf/py.typed"} <= names
    assert {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")} == {"chronomoe_hf"}
    templates = {path.name for path in (ROOT / "chronomoe_hf" / "report" / "templates").iterdir()}
    assert len(templates) == 3 and {f"chronomoe_hf/report/templates/{name}" for name in templates} <= names
    on_disk = {path.relative_to(ROOT / "patches") for path in (ROOT / "patches").rglob("*.py")}
    assert on_disk
    assert {f"chronomoe_hf/patches/{path.as_posix()}" for path in on_disk} <= names
    # Used from elsewhere: the files must come from the wheel, not from this checkout.
    code = "import chronomoe_hf, chronomoe_hf.patches as p; print(chronomoe_hf.__file__); print(p.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); {code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert all(line.startswith(str(tmp_path / "installed")) for line in run.stdout.split()), run.stdout
