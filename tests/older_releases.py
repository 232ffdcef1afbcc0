"""Run a reduced suite against older Transformers releases, each in an environment of its own.

    python tests/older_releases.py [5.13.1 ...]

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
}
# Switch routers return another layout before 5.18: the contract probe refuses them, which test_versions asserts.
SUITE = ["tests/test_versions.py", "tests/wrapping/test_wrap.py", "tests/recording/test_observe.py"]
SELECT = "not switch and not batched_mm and not ac and not reentrant"


def build(release: str) -> Path:
    """Create (or reuse) the environment of `release` and return its python."""
    home = ROOT / "build" / f"transformers-{release}"
    python = home / "bin" / "python"
    if not (home / ".installed").exists():
        venv.create(home, with_pip=True, clear=True)
        packages = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        (packages / "shared.pth").write_text(
            # addsitedir, not a plain path: the editable install of this package is a .pth file in there.
            f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        )
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, "--no-deps", f"transformers=={release}", *PINS[release]], check=True)
        if any(pin.startswith("huggingface_hub") for pin in PINS[release]):
            subprocess.run([*command, "httpx"], check=True)  # the older hub client speaks through it
        (home / ".installed").touch()
    return python


def main() -> int:
    """Run the suite for every release asked for; 0 if all passed."""
    failed = []
    for release in sys.argv[1:] or list(PINS):
        python = build(release)
        print(f"== Transformers {release}", flush=True)
        done = subprocess.run(
            [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SELECT, *SUITE],
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
