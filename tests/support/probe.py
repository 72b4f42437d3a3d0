"""A stage for tests, which does what its config says: print, sleep, eat memory, fail. Installed under any name."""

from __future__ import annotations

from pathlib import Path

ENOUGH = "enough"
"""As soon as there is such a file among its checkpoints it sleeps no more."""
_TEMPLATE = '''"""A stage for tests."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass

from hpc.core.errors import HpcError
from hpc.core.stage import Artifact, Context, Input, Resources, Stage


@dataclass(frozen=True, kw_only=True)
class Config:
    {fields}
    seconds: float = 0.0
    memory_mb: int = 0
    exit_code: int = 0
    signal: int = 0
    message: str = ""
    write_mb: int = 0
    env: str = ""
    checkpoint: bool = False


def run(config: Config, ctx: Context) -> None:
    print("hello from", config.message or "{name}", flush=True)
    ctx.metric(env=dict(os.environ) if config.env else {{}}, argv=sys.argv, host=os.uname().nodename)
    end = time.monotonic() + config.seconds
    hoard = []
    while config.memory_mb and len(hoard) < config.memory_mb:
        hoard.append(bytearray(os.urandom(1 << 10) * 1024))
    while time.monotonic() < end and not (ctx.checkpoints / "{ENOUGH}").exists():
        ctx.progress(config.seconds - (end - time.monotonic()), config.seconds, "sleeping")
        if config.checkpoint and ctx.stopping():
            (ctx.checkpoints / "saved").write_text("half\\n")
            return
        time.sleep(0.05)
    if config.signal:
        os.kill(os.getpid(), config.signal)
    if config.exit_code == 1:
        raise HpcError("the probe was told to fail", hint="tell it not to")
    if config.exit_code:
        raise SystemExit(config.exit_code)
    for path in ctx.outputs.values():
        path.write_bytes(bytes(config.write_mb << 20))
        path.write_text(json.dumps({{"inputs": dict(ctx.inputs), "resumed": (ctx.checkpoints / "saved").exists()}}))


STAGE = Stage(
    name="{name}",
    summary="A stage for tests",
    config=Config,
    container="train",
    consumes={consumes},
    outputs=lambda config: {{"{produces}": Artifact(kind="{produces}", path="result.json")}},
    resources=lambda config: Resources(cpus_per_task=1, mem_gb=1, time_min=5),
    run=run,
)
'''


def write(folder: Path, name: str, *, consumes: str | None, produces: str) -> None:
    """Put a probe stage of that name into a `stages` folder."""
    text = _TEMPLATE.format(
        name=name,
        fields=f"{consumes}: str | None = None" if consumes else "",
        consumes=f'{{"{consumes}": Input(kind="{consumes}")}}' if consumes else "{}",
        produces=produces,
        ENOUGH=ENOUGH,
    )
    (folder / f"{name}.py").write_text(text)


def write_chain(folder: Path) -> list[str]:
    """Three stages, each of which needs the one before: their names."""
    write(folder, "first", consumes=None, produces="dataset")
    write(folder, "second", consumes="dataset", produces="lora_adapter")
    write(folder, "third", consumes="lora_adapter", produces="hf_model")
    return ["first", "second", "third"]
