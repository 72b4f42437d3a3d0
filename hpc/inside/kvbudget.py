"""Host memory of the engine for the CPU: how many tokens its KV cache may hold in a job, and what a job must have."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from hpc.core import rundir
from hpc.core.division import GIB
from hpc.core.errors import HpcError, VerificationFailed
from hpc.core.shape import Shape

_SERVER = 1 * GIB
"""Triton, its tokenizers and the door; measured: 0.6 GiB with 64 requests."""
_WEIGHTS = 1.5
"""A loaded engine takes so many times its files: matrices are repacked for the processor."""

_INT4 = 0.635
"""Bytes of a value in 4 bits; measured: what the builder writes, blocks of 32 with a scale each."""


def tokens(engine: Path, fraction: float, memory: int | None = None) -> int:
    """The cache's tokens; HpcError where the memory does not suffice for any."""
    memory = of_job() if memory is None else memory
    files, each = sizes(engine)
    left = memory - _SERVER - _WEIGHTS * files
    found = int(max(left, 0) * fraction / each)
    if found < 1:
        needed = least(files) + 1
        raise HpcError(
            f"the job's {memory / GIB:.1f} GiB of memory do not suffice for the engine of {files / GIB:.1f} GiB",
            hint=f"ask for {needed:.0f} GiB or more: serve.resources.mem_gb",
        )
    return found


def sizes(engine: Path) -> tuple[int, float]:
    """Bytes of the engine's files, and of a token in its cache; VerificationFailed where it does not tell them."""
    try:
        settings = (rundir.read_json(engine / "genai_config.json") or {})["model"]["decoder"]
        each = 2 * 4 * settings["num_hidden_layers"] * settings["num_key_value_heads"] * settings["head_size"]
    except (KeyError, TypeError):
        raise VerificationFailed(f"{engine} has no whole genai_config.json", hint="build the engine again") from None
    return sum(path.stat().st_size for path in engine.iterdir() if path.suffix in {".onnx", ".data"}), each


def expected(shape: Shape, quantization: str) -> tuple[int, float]:
    """The same before it is built: float32, or 4 bits and scales for all but a table of its own."""
    files = shape.parameters * 4
    if quantization == "int4":
        small = shape.linear + shape.embedding
        files = math.ceil(small * _INT4) + (shape.parameters - small) * 4
    return files, shape.kv_bytes(4)


def least(files: float) -> float:
    """GiB that server and engine take alone: so much leaves nothing for the cache."""
    return (_SERVER + _WEIGHTS * files) / GIB


def enough(files: float, each: float, tokens: int, fraction: float) -> int:
    """GiB with which the cache has room for so many tokens of so many bytes."""
    return math.ceil(least(files) + tokens * each / GIB / fraction)


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
