"""How many tokens the KV cache of the engine for the CPU may hold, by the memory that the job has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hpc.core import rundir
from hpc.core.division import GIB
from hpc.core.errors import HpcError

_SERVER = 1 * GIB
"""Triton, its tokenizers and the door; measured: 0.6 GiB with 64 requests."""
_WEIGHTS = 1.5
"""A loaded engine takes so many times its files: matrices are repacked for the processor."""


def tokens(engine: Path, fraction: float, memory: int | None = None) -> int:
    """The cache's tokens; HpcError where the memory does not suffice for any."""
    memory = of_job() if memory is None else memory
    settings = (rundir.read_json(engine / "genai_config.json") or {})["model"]["decoder"]
    each = 2 * 4 * settings["num_hidden_layers"] * settings["num_key_value_heads"] * settings["head_size"]
    files = sum(path.stat().st_size for path in engine.iterdir() if path.suffix in {".onnx", ".data"})
    left = memory - _SERVER - _WEIGHTS * files
    found = int(max(left, 0) * fraction / each)
    if found < 1:
        needed = (_SERVER + _WEIGHTS * files) / GIB + 1
        raise HpcError(
            f"the job's {memory / GIB:.1f} GiB of memory do not suffice for the engine of {files / GIB:.1f} GiB",
            hint=f"ask for {needed:.0f} GiB or more: serve.resources.mem_gb",
        )
    return found


def of_job(env: Mapping[str, str] = os.environ, cgroups: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes: what Slurm says, what the cgroup allows, what the machine has free; the least of them."""
    found = [_free()]
    if env.get("SLURM_MEM_PER_NODE", "0").isdigit() and int(env.get("SLURM_MEM_PER_NODE", "0")):
        found.append(int(env["SLURM_MEM_PER_NODE"]) << 20)
    elif env.get("SLURM_MEM_PER_CPU", "").isdigit() and env.get("SLURM_CPUS_ON_NODE", "").isdigit():
        found.append((int(env["SLURM_MEM_PER_CPU"]) << 20) * int(env["SLURM_CPUS_ON_NODE"]))
    return min([*found, *_limits(cgroups)])


def _free() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def _limits(cgroups: Path) -> list[int]:
    """The limits of our memory cgroup and of those above it (v1 and v2)."""
    found = []
    for line in cgroups.read_text().splitlines() if cgroups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / ("memory" if controllers else "")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            file = place / name
            text = file.read_text().strip() if file.is_file() else ""
            if text.isdigit():
                found.append(int(text))
    return found
