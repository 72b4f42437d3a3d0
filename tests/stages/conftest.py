"""What the stages' tests share: a tiny model made here, and a run of one stage through the real runner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hpc.core import config as configs
from hpc.core import stage as stages
from hpc.inside import runner
from tests.support import tiny

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Result:
    """What a run of one stage left behind."""

    code: int
    folder: Path
    error: dict[str, Any]
    """error.json of the attempt; empty where there was no error."""

    @property
    def manifest(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        return document

    @property
    def metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = self.manifest["metrics"]
        return metrics

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "attempt-1" / "events.jsonl").open()]

    def out(self, name: str) -> Path:
        return self.folder / "out" / name


RunStage = Callable[..., Result]


@pytest.fixture
def run_stage(tmp_path: Path) -> Iterator[RunStage]:
    """One stage through hpc.inside.runner.main: its name, its inputs, the run's `folder`, and its config.

    With several `ranks`: by torchrun, on the CPU; asked to stop once it has logged `stop_at` steps.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}

    def run(
        name: str,
        inputs: Mapping[str, object] | None = None,
        *,
        folder: str = "run",
        ranks: int = 1,
        stop_at: int = 0,
        **config: Any,
    ) -> Result:
        stage = stages.load(name)
        made = stage.config(**config)
        here = tmp_path / folder / name
        attempt = here / "attempt-1"
        attempt.mkdir(parents=True, exist_ok=True)
        (attempt / "error.json").unlink(missing_ok=True)
        document = {
            "stage": name,
            "key": "0",
            "config": configs.encode(made),
            "inputs": {key: {"path": str(value)} for key, value in (inputs or {}).items()},
            "outputs": {
                key: {"kind": value.kind, "path": str(here / "out" / value.path)}
                for key, value in stage.outputs(made).items()
            },
            "environment": {},
            "resources": {"nodes": 1, "gpus_per_node": ranks},
            "cache": str(tmp_path / "cache"),
        }
        (here / "config.json").write_text(json.dumps(document))
        words = [name, str(here / "config.json"), str(attempt)]
        log = here / "training" / "log.jsonl"
        code = runner.main(words) if ranks == 1 else _torchrun(words, attempt, log, stop_at)
        error = attempt / "error.json"
        return Result(code, here, json.loads(error.read_text()) if error.exists() else {})

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


HELD = """
import os, time
if os.environ.get("RANK") == "0":
    from pathlib import Path
    from hpc.inside import curves
    write = curves.Curves.write

    def held(self, step, values):
        write(self, step, values)
        while step == {stop_at} and '"stopping"' not in Path({events!r}).read_text():
            time.sleep(0.01)

    curves.Curves.write = held
"""
"""In the first rank, as Python begins: a step that waits for the request, since so small a model may be done before."""


def _torchrun(words: list[str], attempt: Path, steps: Path, stop_at: int) -> int:
    held = attempt / "held"
    held.mkdir(exist_ok=True)
    (held / "sitecustomize.py").write_text(HELD.format(stop_at=stop_at or -1, events=str(attempt / "events.jsonl")))
    env = {**os.environ, "PYTHONPATH": f"{held}:{ROOT}", "OMP_NUM_THREADS": "1"}
    with open(attempt / "stderr", "a") as log:
        argv = [sys.executable, "-m", "hpc.inside.ranks", *words]
        process = subprocess.Popen(argv, env=env, stdout=log, stderr=log)
    try:
        while stop_at and process.poll() is None:
            if steps.exists() and steps.read_text().count("\n") >= stop_at:
                process.send_signal(signal.SIGUSR2)
                break
            time.sleep(0.05)
        return process.wait(300)
    finally:
        process.kill()


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the scheduler's signal arrive once the given step of a training was told."""

    def arm(step: int) -> None:
        told = runner.RunContext.progress

        def progress(self: Any, done: float, total: float, message: str = "", **figures: float) -> None:
            told(self, done, total, message, **figures)
            if message == "training" and done == step:
                os.kill(os.getpid(), signal.SIGUSR2)

        monkeypatch.setattr(runner.RunContext, "progress", progress)

    return arm


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.dataset(tmp_path_factory.mktemp("dataset"))
