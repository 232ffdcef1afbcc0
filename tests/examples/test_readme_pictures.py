"""The script that makes the pictures of README and docs: pages from a real run, and screenshots of their sections."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "readme_pictures.py"


def test_it_makes_every_picture(tmp_path: Path) -> None:
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("no chromium on this machine: apt-get install chromium fonts-dejavu-core")
    from PIL import Image

    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--steps", "20", "--base-steps", "2", "--images", str(tmp_path / "images")],
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.name: Image.open(path) for path in (tmp_path / "images").glob("*.png")}
    assert set(made) == {"report.png", "changed.png", "domains.png", "trace.png"}
    for name, image in made.items():
        assert image.width == 1080 and image.height > 250, name
        assert len(image.convert("RGB").getcolors(1 << 22) or []) > 100, f"{name} is blank"
