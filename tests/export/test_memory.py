"""The memory that may still be taken: of the system, of cgroups, and under the limits of a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chronomoe_hf.export.memory import available_memory


def made(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


SYSTEM = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}
V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "3:cpu:/x\n2:memory:/docker/1\n"}


@pytest.mark.parametrize(
    ("files", "bytes_left"),
    [
        ({}, 8000 * 1024),
        (V2 | {"sys/fs/cgroup/a/b/memory.max": "max", "sys/fs/cgroup/a/b/memory.current": "5"}, 8000 * 1024),
        (V2 | {"sys/fs/cgroup/a/b/memory.max": "5000", "sys/fs/cgroup/a/b/memory.current": "1500"}, 3500),
        (V2 | {"sys/fs/cgroup/a/memory.max": "5000", "sys/fs/cgroup/a/memory.current": "4000"}, 1000),
        (V2 | {"sys/fs/cgroup/memory.max": "5000", "sys/fs/cgroup/memory.current": "4500"}, 500),
        (V2 | {"sys/fs/cgroup/memory.max": "5000", "sys/fs/cgroup/memory.current": "5500"}, 0),
        (
            V1
            | {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "7000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "100",
            },
            6900,
        ),
    ],
)
def test_the_least_of_what_is_left_counts(files: dict[str, str], bytes_left: int, tmp_path: Path) -> None:
    assert available_memory(made(tmp_path, SYSTEM | files)) == bytes_left


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit as Linux has it")
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_the_process_counts(kind: str) -> None:
    code = (
        "import resource; from chronomoe_hf.export.memory import available_memory as left; most = 6 * 2**30; "
        f"before = left(); resource.setrlimit(resource.{kind}, (most, most)); print(before, left())"
    )
    before, after = map(int, subprocess.check_output([sys.executable, "-c", code]).split())
    assert 0 < after < 6 * 2**30 and after <= before
