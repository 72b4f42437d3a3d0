"""
Inside the image: CONFIG.json -> the stage's `run` -> manifest.json, written last.

python3 -m hpc.inside.runner STAGE CONFIG.json ATTEMPT_DIR
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc.core import config as configs
from hpc.core import rundir
from hpc.core.errors import STOPPED, HpcError
from hpc.core.stage import Stage, load
from hpc.inside import meeting, once, together

_PROGRESS_EVERY_S = 0.5


class RunContext:
    """The Context of `hpc.core.stage`, over the files of the run."""

    def __init__(self, stage_dir: rundir.StageDir, events: Path, document: Mapping[str, Any], cache: Path) -> None:
        self.inputs: Mapping[str, str] = {k: v["path"] for k, v in document["inputs"].items()}
        self.outputs: Mapping[str, Path] = {k: Path(v["path"]) for k, v in document["outputs"].items()}
        self.checkpoints = stage_dir.checkpoints
        self.cache = cache
        self.folder = stage_dir.path
        self.bind: str = document.get("bind", "127.0.0.1")
        self.metrics: dict[str, Any] = {}
        self._events = events
        self._last = 0.0
        self._stop = False

    def progress(self, done: float, total: float, message: str = "", **metrics: float) -> None:
        if together.rank():  # one of several tells
            return
        now = time.monotonic()
        if now - self._last < _PROGRESS_EVERY_S and done < total:
            return
        self._last = now
        rundir.append_event(self._events, "running", done=done, total=total, message=message, **metrics)

    def event(self, phase: str, **values: Any) -> None:
        if together.rank():
            return
        rundir.append_event(self._events, phase, **values)

    def remark(self, text: str) -> None:
        if together.rank():
            return
        rundir.write_json(rundir.AttemptDir(self._events.parent).remark, {"remark": text})
        print(text)

    def metric(self, **values: Any) -> None:
        self.metrics.update(values)

    def stopping(self) -> bool:
        return self._stop

    def listen(self) -> None:
        """From now on the scheduler's signals set `stopping()`; a second one changes nothing."""

        def stop(signum: int, frame: object) -> None:
            if not self._stop:
                self._stop = True
                self.event("stopping", signal=signal.Signals(signum).name)

        for number in once.REQUESTS:
            signal.signal(number, stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, once.REQUESTS)  # blocked by hpc.inside.ranks


def main(argv: list[str]) -> int:
    name, config_path, attempt_path = argv
    stage_dir = rundir.StageDir(Path(config_path).parent)
    attempt = rundir.AttemptDir(Path(attempt_path)).of_task(meeting.of(stage_dir.path, os.environ).rank)
    try:
        code = run(load(name), stage_dir, attempt)
    except HpcError as error:
        _tell(attempt, {"cause": error.message, "hint": error.hint, "exit_code": error.exit_code})
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        import traceback

        traceback.print_exc()
        _tell(attempt, {"cause": _sentence(error), "hint": "", "exit_code": 1})
        return 1
    if code == STOPPED and together.world() > 1:  # torchrun would take it for a failure, and end the others
        attempt.stopped.touch()
        return 0
    return code


def run(stage: Stage, stage_dir: rundir.StageDir, attempt: rundir.AttemptDir) -> int:
    """Run one stage; 0 where it is done, STOPPED where it was asked to end before."""
    document = rundir.read_json(stage_dir.config)
    if document is None:
        raise HpcError(f"{stage_dir.config} is not there")
    started = time.time()
    if together.rank() == 0:
        rundir.append_event(attempt.events, "running", message="")
    context = RunContext(stage_dir, attempt.events, document, Path(document["cache"]))
    for folder in (context.checkpoints, context.cache, *(p.parent for p in context.outputs.values())):
        folder.mkdir(parents=True, exist_ok=True)
    context.listen()
    together.check()
    stage.run(configs.decode(stage.config, document["config"]), context)
    together.leave()
    if together.rank() or meeting.of(stage_dir.path, os.environ).rank:  # the first one makes the outputs, and tells
        return 0
    missing = [name for name, path in context.outputs.items() if not path.exists()]
    if (missing or stage.service) and context.stopping():
        return STOPPED
    if missing:
        raise HpcError(f"{stage.name} ended without making its output {', '.join(missing)}")
    _write_manifest(stage_dir, document, context, started)
    return 0


def _tell(attempt: rundir.AttemptDir, error: Mapping[str, Any]) -> None:
    """Of several ranks the first to fail tells why: the others fail because it is gone."""
    several = together.world() > 1
    path = (attempt.of_task(rundir.task_number(together.world())) if several else attempt).error
    if not several or not path.exists():
        rundir.write_json(path, error)


def _write_manifest(
    stage_dir: rundir.StageDir, document: Mapping[str, Any], context: RunContext, started: float
) -> None:
    from hpc.core import digest  # here and not above: each import is read from the image while the user waits

    manifest = {
        "schema": "hpc.manifest/1",
        "stage": document["stage"],
        "key": document["key"],
        "inputs": document["inputs"],
        "environment": document["environment"],
        "outputs": {
            name: {**document["outputs"][name], "files": digest.tree(path)} for name, path in context.outputs.items()
        },
        "metrics": context.metrics,
        "versions": _versions(),
        "started": started,
        "ended": time.time(),
        "host": os.uname().nodename,
    }
    rundir.write_json(stage_dir.manifest, manifest, durable=True)


def _versions() -> dict[str, str]:
    """Python, and every library that the stage loaded and that has a version."""
    from importlib import metadata

    versions = {"python": sys.version.split()[0]}
    for name in (
        "torch",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "datasets",
        "bitsandbytes",
        "langdetect",
        "safetensors",
        "lm_eval",
        "onnxruntime",
        "onnxruntime_genai",
    ):
        if name in sys.modules:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
    return versions


def _sentence(error: Exception) -> str:
    """The error in one line; the whole traceback is in stderr."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


if __name__ == "__main__":
    once.told_once()
    ended = main(sys.argv[1:])
    if together.world() > 1:
        together.end(ended)
    raise SystemExit(ended)
