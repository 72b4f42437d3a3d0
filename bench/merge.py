"""The stage merge, as the node starts it, against PEFT, on 1.1 B random parameters: time and memory."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from measure import Fact, Line, NotMeasured, Pair

ROUNDS = 2
GOAL = 1.0
MEMORY_GOAL = 0.5
NEED_GB = 10
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(Path(__file__).with_name("bare_merge.py"))


def lines(rounds: int) -> Iterator[Line]:
    python = os.environ.get("TRAIN_PYTHON", str(ROOT / ".venvs" / "train" / "bin" / "python"))
    if not Path(python).exists():
        raise NotMeasured("needs `make train-env`, or TRAIN_PYTHON=/path/to/its/python")
    if shutil.disk_usage(tempfile.gettempdir()).free < NEED_GB << 30:
        raise NotMeasured(f"needs {NEED_GB} GB in {tempfile.gettempdir()}")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        _run([python, SCRIPT, "make", name])
        ours, theirs = [], []
        for number in range(rounds):
            for side in ((ours, theirs), (theirs, ours))[number % 2]:
                output = folder / "output"
                argv = _stage(folder, output) if side is ours else ["merge", name, str(output)]
                words = [python, "-m", "hpc.inside.runner", *argv] if side is ours else [python, SCRIPT, *argv]
                side.append(_run(words))
                shutil.rmtree(output)
    ms, peft_ms = ([taken[0] for taken in side] for side in (ours, theirs))
    yield Pair(what="merge, 1.1 B parameters", ms=ms, against="PEFT's merge_and_unload", against_ms=peft_ms, goal=GOAL)
    peak, peft_peak = (statistics.median(taken[1] for taken in side) for side in (ours, theirs))
    yield Fact(
        what="merge, peak memory",
        found=f"{peak:.0f} MB, PEFT {peft_peak:.0f} MB: {peak / peft_peak:.2f}",
        goal=f"≤ {MEMORY_GOAL}",
        met=peak <= MEMORY_GOAL * peft_peak,
    )


def _stage(folder: Path, output: Path) -> list[str]:
    """The runner's words for a fresh run of the stage, with all its checks and its manifest."""
    attempt = output / "attempt-1"
    attempt.mkdir(parents=True)
    document = {
        "stage": "merge",
        "key": "0",
        "config": {},
        "inputs": {"adapter": {"path": str(folder / "adapter")}, "base_model": {"path": str(folder / "base")}},
        "outputs": {"model": {"kind": "hf_model", "path": str(output / "out" / "model")}},
        "environment": {},
        "cache": str(folder / "cache"),
    }
    (output / "config.json").write_text(json.dumps(document))
    return ["merge", str(output / "config.json"), str(attempt)]


def _run(argv: Sequence[str]) -> tuple[float, float]:
    """Milliseconds of a process, and its peak memory in MB."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            print(log.read().decode(errors="replace")[-3000:], file=sys.stderr)
            raise SystemExit(f"{argv}: exit {process.returncode}")
    return (time.perf_counter() - begin) * 1000, used.ru_maxrss / 1024
