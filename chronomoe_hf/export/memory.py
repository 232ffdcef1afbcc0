"""How much memory this process may still take: what the system has, its cgroup allows, and its own limits leave."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be had without swapping and without passing a limit; 0 where the system does not say.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    known = [_system(root), *_cgroups(root), *_limits(root)]
    return max(0, min((value for value in known if value is not None), default=0))


def _system(root: Path) -> int | None:
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None


def _cgroups(root: Path) -> list[int]:
    """What the cgroups of this process leave: of version 2 from its own up to the root, and of version 1."""
    found = []
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        place = base / path.lstrip("/")
        # In a container the path may be the one outside: then only the root of what is mounted can be read.
        for folder in dict.fromkeys((place, *place.parents, base)):
            if folder == base or base in folder.parents:
                most, used = (_whole(folder / name) for name in names)
                if most is not None and used is not None:
                    found.append(most - used)
    return found


def _limits(root: Path) -> list[int]:
    """What ``ulimit -v`` and ``ulimit -d`` leave of address space and of data."""
    try:
        import resource
    except ImportError:  # not on Windows
        return []
    try:
        text = (root / "proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    used = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    found = []
    for kind, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(kind)
        words = used.get(name, "").split()
        if soft != resource.RLIM_INFINITY and words:
            found.append(soft - int(words[0]) * 1024)
    return found


def _whole(path: Path) -> int | None:
    """The number in a file; None where it is ``max`` or cannot be read."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
