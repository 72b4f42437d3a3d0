"""Every file name of a run, and the writing and reading of its files. Nobody else joins these paths.

<runs>/<run-id>/run.json             what was asked
                code/                the snapshot that the jobs import
                <stage>/config.json  the config with every default, the inputs and outputs
                        job.json     the latest submission: attempt, job id, comment, key
                        attempt-N/   stdout, stderr, events.jsonl, launch.json, outcome.json, process.json, scheduler/
                        checkpoints/ what outlives an attempt
                        out/         the outputs
                        manifest.json   written last: the stage is done
                        endpoint.json   a service, while it answers: node, ports; its token is in `token`, mode 0600
                        figures.json    how much it does
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGES = "images"
"""The name of runs whose jobs build or stage images."""
RANKS = "ranks.json"
"""Beside a training's checkpoints: {"ranks": n}. All else that it is of counts in its key."""


@dataclass(frozen=True)
class AttemptDir:
    """One submission of one stage."""

    path: Path

    @property
    def stdout(self) -> Path:
        return self.path / "stdout"

    @property
    def stderr(self) -> Path:
        return self.path / "stderr"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def launch(self) -> Path:
        """The container command and environment that were used."""
        return self.path / "launch.json"

    @property
    def error(self) -> Path:
        """What the runner says of an error that the user can mend."""
        return self.path / "error.json"

    @property
    def remark(self) -> Path:
        """What the runner says of a stage that completes."""
        return self.path / "remark.json"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    @property
    def heartbeat(self) -> Path:
        return self.path / "heartbeat"

    @property
    def process(self) -> Path:
        """A local job's controller: {"pid", "start", "group", "host", "heartbeat_s"}; by the process that starts it."""
        return self.path / "process.json"

    @property
    def reserve(self) -> Path:
        """Some bytes that are given back before the outcome is written, so that a full disk can't hide it."""
        return self.path / "reserve"

    @property
    def stop(self) -> Path:
        """Written by `hpc cancel`: the end that follows was asked for."""
        return self.path / "cancelled.json"

    def of_task(self, number: int) -> AttemptDir:
        """Where a task of the job writes: the first one here, each other one in a folder of its own."""
        return AttemptDir(self.path / f"task-{number}") if number else self

    @property
    def successor(self) -> Path:
        """The job.json of a service's next job, until it takes over from the one before."""
        return self.path / "successor.json"

    @property
    def number(self) -> int:
        return int(self.path.name.rpartition("-")[2])

    @property
    def stopped(self) -> Path:
        """Written by the first of several ranks: all have saved, as they were asked to."""
        return self.path / "stopped"

    @property
    def scheduler(self) -> Path:
        """submitit's own folder, for its owner alone: the batch script, its pickle and its logs."""
        return self.path / "scheduler"


@dataclass(frozen=True)
class StageDir:
    """One stage of one run."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def job(self) -> Path:
        return self.path / "job.json"

    @property
    def out(self) -> Path:
        return self.path / "out"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def ranks(self) -> Path:
        """How many made the checkpoints."""
        return self.checkpoints / RANKS

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def endpoint(self) -> Path:
        return self.path / "endpoint.json"

    @property
    def token(self) -> Path:
        return self.path / "token"

    @property
    def figures(self) -> Path:
        """How much a service does: {"schema": "hpc.figures/1", "t", "running", "done", …}."""
        return self.path / "figures.json"

    @property
    def bench(self) -> Path:
        """The latest benchmark of a service: the document of `hpc bench --json`."""
        return self.path / "bench.json"

    def attempt(self, number: int) -> AttemptDir:
        return AttemptDir(self.path / f"attempt-{number}")

    def successors(self) -> list[AttemptDir]:
        """A service's jobs that are to take over, the next one first."""
        found = (AttemptDir(path.parent) for path in self.path.glob("attempt-*/successor.json"))
        return sorted(found, key=lambda attempt: attempt.number)

    def made(self, key: str) -> bool:
        """True where a manifest with this key exists, and can be read."""
        return self._made(key) is not None

    def done(self, key: str) -> bool:
        """True where it was made, and its outputs are there: they may have been removed to save space."""
        manifest = self._made(key)
        return manifest is not None and all(
            os.path.exists(self.out / str(output["path"]).rpartition(f"/{self.name}/out/")[2])  # a project may move
            for output in manifest.get("outputs", {}).values()
        )

    def emptied(self, key: str) -> bool:
        """Whether the outputs of what was made were removed, by one look at `out` for most: planning asks for each."""
        return not (os.path.exists(self.out) or self.done(key))

    def _made(self, key: str) -> dict[str, Any] | None:
        try:
            manifest = read_json(self.manifest)
        except OSError:
            return None
        return manifest if manifest is not None and manifest.get("key") == key else None


@dataclass(frozen=True)
class RunDir:
    """One run."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def of_images(self) -> bool:
        """Jobs that build or stage images: a run beside those that one works on."""
        return self.id.rpartition("-")[0] == IMAGES

    @property
    def run(self) -> Path:
        return self.path / "run.json"

    @property
    def patch(self) -> Path:
        """The project's uncommitted changes at submission."""
        return self.path / "uncommitted.patch"

    @property
    def report(self) -> Path:
        """The page of `hpc report`, for its owner alone."""
        return self.path / "report.html"

    @property
    def code(self) -> Path:
        return self.path / "code"

    def stage(self, name: str) -> StageDir:
        return StageDir(self.path / name)


@dataclass(frozen=True)
class RunsDir:
    """The folder that holds the runs."""

    path: Path

    @property
    def cache(self) -> Path:
        """Things made once for all runs: converted models, digests of large files."""
        return self.path / ".cache"

    @property
    def digests(self) -> Path:
        return self.cache / "digests.json"

    @property
    def signatures(self) -> Path:
        """Images whose signature was found good."""
        return self.cache / "signatures.json"

    def numbers(self) -> list[tuple[int, Path]]:
        """(number, folder) of every run, the newest first."""
        found = []
        for entry in _scan(self.path):
            head, _, tail = entry.name.rpartition("-")
            with suppress(OSError):  # a link that leads nowhere
                if head and tail.isdecimal() and entry.is_dir():
                    found.append((int(tail), Path(entry.path)))
        return sorted(found, reverse=True)

    def runs(self) -> Iterator[tuple[RunDir, dict[str, Any]]]:
        """(folder, run.json) of every complete run folder that can be read, the newest first."""
        for _, path in self.numbers():
            run = RunDir(path)
            try:
                asked = read_json(run.run) or {}
            except OSError:  # another user's, and closed
                continue
            if "uid" in asked and isinstance(asked.get("keys"), dict):
                yield run, asked

    def next(self, name: str) -> RunDir:
        """The folder that the next run of that name gets: its number is one above the highest."""
        numbers = self.numbers()
        return RunDir(self.path / f"{name}-{numbers[0][0] + 1 if numbers else 1}")


def task_number(tasks: int) -> int:
    """Which of the job's tasks this is, as srun tells it; 0 where it is the only one."""
    return int(os.environ.get("SLURM_PROCID", "0")) if tasks > 1 else 0


def _scan(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def read_json(path: Path) -> dict[str, Any] | None:
    """The document, or None where it isn't there, or is none: a machine that lost its power can leave an empty file."""
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def write_json(path: Path, document: Mapping[str, Any], *, durable: bool = False) -> None:
    """Replace the file by this document in one step. `durable` waits until it is on the disk."""
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n", durable=durable)


def write_text(path: Path, text: str, *, durable: bool = False, mode: int = 0o644) -> None:
    """Replace the file by this text in one step: a reader sees the old one or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(_new(part, mode), "w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, ValueError):  # ValueError: a text that UTF-8 can't hold
        part.unlink(missing_ok=True)
        raise


def _new(part: Path, mode: int) -> int:
    """The file, opened and our own: what lies there may be a killed process's, or a link that another user made."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(part, flags, mode)
    except FileExistsError:
        part.unlink()
        return os.open(part, flags, mode)


def append_event(path: Path, phase: str, **fields: Any) -> None:
    """Add one line to events.jsonl: {"t": seconds, "phase": …, …}."""
    line = json.dumps({"t": round(time.time(), 3), "phase": phase, **fields}, ensure_ascii=False)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def last_events(path: Path, size: int = 8192) -> list[dict[str, Any]]:
    """The events in the last `size` bytes, oldest first; [] where there are none."""
    events = []
    for line in tail(path, size):
        try:
            events.append(json.loads(line))
        except ValueError:  # cut off at the front, or being written at this moment
            continue
    return events


def tail(path: Path, size: int = 8192) -> list[str]:
    """The lines in the last `size` bytes of a text file; [] where it isn't there."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            lines = file.read().decode("utf-8", "replace").split("\n")  # splitlines() also splits inside a JSON text
            return lines[:-1] if lines[-1] == "" else lines
    except FileNotFoundError:
        return []
