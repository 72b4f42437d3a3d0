"""How often the kernel killed a process of this job for memory, by its cgroup (v1 and v2)."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def kills(cgroups: Path = Path("/proc/self/cgroup"), root: Path = _ROOT) -> int:
    """The kernel's count of out-of-memory kills in our memory cgroup and those above it; 0 where unknown."""
    try:
        lines = cgroups.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            return _sum(root / path.lstrip("/"), root, "memory.events")
        if "memory" in controllers.split(","):
            return _sum(root / "memory" / path.lstrip("/"), root / "memory", "memory.oom_control")
    return 0


def _sum(folder: Path, top: Path, name: str) -> int:
    """oom_kill summed from the job's step up to the root: Slurm sets the limit on the step, the task or the job."""
    total = 0
    while folder != top and top in folder.parents:
        total += _count(folder / name)
        folder = folder.parent
    return total


def _count(file: Path) -> int:
    try:
        for line in file.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
