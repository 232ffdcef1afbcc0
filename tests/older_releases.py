"""Run a reduced suite against other Transformers releases, each in an environment of its own, and the lowest versions.

    python tests/older_releases.py [5.13.1 ...]     # every release by default
    python tests/older_releases.py lowest

`lowest` holds the lowest versions of torch, accelerate, peft and trl that pyproject.toml promises, with the lowest
Transformers. The torch of that age on PyPI is the CUDA build, several GB; it is downloaded once.

An environment holds the release and what it pins differently; everything else (torch, pytest, this package in its
editable install) is read from the environment that runs this script, so that it takes seconds to build.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Release -> what it cannot share with the newest one.
PINS = {
    "5.6.0": ["huggingface_hub==1.33.0", "tokenizers==0.22.2"],
    "5.13.1": ["huggingface_hub==1.33.0", "tokenizers==0.22.2"],
    "5.16.1": ["huggingface_hub==1.33.0"],
    "5.19.0": [],
    "5.24.0": [],  # newer than what constraints.txt holds: what `pip install` takes today
}
# The lowest versions that pyproject.toml promises; tests/test_versions.py compares them with it.
LOWEST = {"transformers": "5.6.0", "torch": "2.6.0", "accelerate": "1.10.0", "peft": "0.18.0", "trl": "0.24.0"}
# Switch routers return another layout before 5.18: the contract probe refuses them, which test_versions asserts.
SUITE = ["tests/test_versions.py", "tests/wrapping/test_wrap.py", "tests/recording/test_observe.py"]
# What users do after training, a test or two each: export, refit, repair of a resume, the dry run.
SMOKE = [
    "tests/export/test_live.py::test_the_directory_says_what_it_is",
    "tests/export/test_live.py::test_an_exported_model_can_be_cut_again",
    "tests/lifecycle/test_refit.py",
    "tests/lifecycle/test_coordinator.py",
    "tests/trainer/test_weight_repair.py",
]
SELECT = "not switch and not batched_mm and not ac and not reentrant"
# These go over families that an older release lays out otherwise, or over conversions that it does not have.
SELECT += " and not every_family and not layouts and not where_the_routed and not conversion_that and not few_copies"


def build(release: str) -> Path:
    """Create (or reuse) the environment of `release` (or ``"lowest"``) and return its python."""
    lowest = release == "lowest"
    home = ROOT / "build" / (release if lowest else f"transformers-{release}")
    python = home / "bin" / "python"
    if not (home / ".installed").exists():
        venv.create(home, with_pip=True, clear=True)
        packages = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        (packages / "shared.pth").write_text(
            # addsitedir, not a plain path: the editable install of this package is a .pth file in there.
            f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        )
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pins = [f"transformers=={release}", *PINS[release]] if not lowest else []
        if lowest:
            subprocess.run([*command, f"torch=={LOWEST['torch']}"], check=True)  # with its own CUDA libraries
            pins = [f"{name}=={version}" for name, version in LOWEST.items() if name != "torch"]
            pins += PINS[LOWEST["transformers"]]
        subprocess.run([*command, "--no-deps", "--ignore-installed", *pins], check=True)
        if any(pin.startswith("huggingface_hub") for pin in pins):
            subprocess.run([*command, "httpx"], check=True)  # the older hub client speaks through it
        (home / ".installed").touch()
    return python


def main() -> int:
    """Run the suite for every release asked for; 0 if all passed."""
    failed = []
    for release in sys.argv[1:] or PINS:
        python = build(release)
        print(f"== {release if release == 'lowest' else f'Transformers {release}'}", flush=True)
        done = subprocess.run(
            [
                str(python),
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "-m",
                "not slow",
                "-k",
                SELECT,
                *SUITE,
                *SMOKE,
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        if done.returncode:
            failed.append(release)
    print(f"older releases: {'all passed' if not failed else 'FAILED with ' + ', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
