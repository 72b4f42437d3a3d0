"""What a training logs, kept as it comes: lines of JSON for programs, and TensorBoard's own file for a person."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc.inside import once

FOLDER = "training"
"""In the stage's folder."""
LOG = "log.jsonl"


class Curves:
    """The logs of one attempt; what an earlier one logged after the checkpoint that is resumed is taken out."""

    def __init__(self, folder: Path, resumed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / LOG
        kept = [entry for entry in read(self._log) if entry["step"] <= resumed]
        part = self._log.with_suffix(".part")
        part.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        os.replace(part, self._log)
        hidden = resumed + 1 if resumed else None  # TensorBoard forgets what it has of later steps
        self._events = _writer(folder / "tensorboard", hidden)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with open(self._log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"t": round(time.time(), 3), "step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()


def _writer(folder: Path, hidden: int | None) -> Any:
    """TensorBoard's; None in an image without it, where the lines of JSON are all there is."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, once.REQUESTS)  # its thread never takes the scheduler's requests
    try:
        return SummaryWriter(str(folder), purge_step=hidden)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def read(log: Path) -> list[dict[str, float]]:
    """The entries of a log.jsonl; a last line that was cut off by a kill is left out."""
    entries = []
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries
