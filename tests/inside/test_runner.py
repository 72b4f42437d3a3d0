"""CONFIG.json -> the stage's run -> manifest.json, with a tiny stage and real files."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hpc.core import rundir
from hpc.core.errors import STOPPED, UsageError
from hpc.core.stage import Artifact, Context, Input, Resources, Stage
from hpc.inside import runner


@dataclass(frozen=True, kw_only=True)
class Config:
    words: tuple[str, ...] = ()


Body = Callable[[Config, Context], None]


class Inside:
    """A stage folder as the login node leaves it, and the runner on it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dir = rundir.StageDir(folder / "run" / "tiny")
        self.attempt = self.dir.attempt(1)
        self.attempt.path.mkdir(parents=True)
        self.patch = monkeypatch
        document = {
            "stage": "tiny",
            "key": "k1",
            "config": {"words": ["a", "b"]},
            "inputs": {"dataset": {"path": "/data/x", "key": "k0", "kind": "dataset", "stage": None}},
            "outputs": {"dataset": {"kind": "dataset", "path": str(self.dir.out / "sub" / "data")}},
            "environment": {"name": "train"},
            "cache": str(folder / "cache"),
        }
        rundir.write_json(self.dir.config, document)

    def run(self, body: Body) -> int:
        stage = Stage(
            name="tiny",
            summary="a fake",
            config=Config,
            container="train",
            consumes={"dataset": Input(kind="dataset")},
            outputs=lambda config: {"dataset": Artifact(kind="dataset", path="sub/data")},
            resources=lambda config: Resources(),
            run=body,
        )
        self.patch.setattr(runner, "load", lambda name: stage)
        return runner.main(["tiny", str(self.dir.config), str(self.attempt.path)])

    @property
    def manifest(self) -> dict[str, Any] | None:
        return rundir.read_json(self.dir.manifest)

    @property
    def error(self) -> dict[str, Any] | None:
        return rundir.read_json(self.attempt.error)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Inside]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield Inside(tmp_path, monkeypatch)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def write(config: Config, ctx: Context) -> None:
    ctx.outputs["dataset"].write_text("result")


def test_manifest_says_what_was_made_of_what(inside: Inside) -> None:
    assert inside.run(write) == 0
    manifest = inside.manifest
    assert manifest is not None
    assert (manifest["schema"], manifest["stage"], manifest["key"]) == ("hpc.manifest/1", "tiny", "k1")
    assert manifest["inputs"]["dataset"]["key"] == "k0"
    assert manifest["outputs"]["dataset"]["files"] == {"data": hashlib.sha256(b"result").hexdigest()}
    assert manifest["versions"]["python"] == sys.version.split()[0]
    assert manifest["started"] <= manifest["ended"]
    assert inside.error is None


def test_stage_gets_its_config_and_its_places(inside: Inside) -> None:
    seen: dict[str, Any] = {}

    def body(config: Config, ctx: Context) -> None:
        seen.update(config=config, inputs=dict(ctx.inputs), folders=[ctx.checkpoints.is_dir(), ctx.cache.is_dir()])
        write(config, ctx)

    inside.run(body)
    assert seen == {"config": Config(words=("a", "b")), "inputs": {"dataset": "/data/x"}, "folders": [True, True]}


def test_manifest_is_written_after_the_outputs(inside: Inside) -> None:
    def body(config: Config, ctx: Context) -> None:
        write(config, ctx)
        assert inside.manifest is None

    assert inside.run(body) == 0


def test_metrics_come_into_the_manifest(inside: Inside) -> None:
    def body(config: Config, ctx: Context) -> None:
        ctx.metric(loss=0.5, note="한글")
        ctx.metric(loss=0.25)
        write(config, ctx)

    inside.run(body)
    assert inside.manifest is not None
    assert inside.manifest["metrics"] == {"loss": 0.25, "note": "한글"}


def test_progress_is_thinned_but_the_end_is_always_told(inside: Inside) -> None:
    def body(config: Config, ctx: Context) -> None:
        for step in range(1, 1001):
            ctx.progress(step, 1000, "training", loss=0.1)
        write(config, ctx)

    inside.run(body)
    told = [e["done"] for e in rundir.last_events(inside.attempt.events) if e.get("total")]
    assert told[0] == 1
    assert told[-1] == 1000
    assert len(told) < 100


def test_missing_output_is_an_error_and_leaves_no_manifest(inside: Inside) -> None:
    assert inside.run(lambda config, ctx: None) == 1
    assert inside.manifest is None
    assert inside.error == {"cause": "tiny ended without making its output dataset", "hint": "", "exit_code": 1}


def test_error_of_ours_is_written_with_its_hint_and_code(inside: Inside, capsys: pytest.CaptureFixture[str]) -> None:
    def body(config: Config, ctx: Context) -> None:
        raise UsageError("no rows", hint="give some")

    assert inside.run(body) == 2
    assert inside.error == {"cause": "no rows", "hint": "give some", "exit_code": 2}
    assert "error: no rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("first line\nsecond line"), "ValueError: first line"),
        (KeyError(), "KeyError"),
        (RuntimeError("x" * 1000), f"RuntimeError: {'x' * 300}"),
    ],
)
def test_any_other_error_is_one_line_and_its_traceback_is_in_the_log(
    inside: Inside, capsys: pytest.CaptureFixture[str], error: Exception, cause: str
) -> None:
    def body(config: Config, ctx: Context) -> None:
        raise error

    assert inside.run(body) == 1
    assert inside.error == {"cause": cause, "hint": "", "exit_code": 1}
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_stage_that_was_asked_to_end_and_left_is_stopped(inside: Inside, number: signal.Signals) -> None:
    def body(config: Config, ctx: Context) -> None:
        assert not ctx.stopping()
        os.kill(os.getpid(), number)
        assert ctx.stopping()
        os.kill(os.getpid(), number)

    assert inside.run(body) == STOPPED == 85
    assert inside.manifest is None
    assert inside.error is None
    stops = [e for e in rundir.last_events(inside.attempt.events) if e["phase"] == "stopping"]
    assert [e["signal"] for e in stops] == [number.name]


def test_stage_that_finished_all_the_same_is_done(inside: Inside) -> None:
    def body(config: Config, ctx: Context) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)
        write(config, ctx)

    assert inside.run(body) == 0
    assert inside.manifest is not None


def test_config_that_is_not_there_is_an_error(inside: Inside) -> None:
    inside.dir.config.unlink()
    assert inside.run(write) == 1
    assert inside.error is not None
    assert inside.error["cause"].endswith("config.json is not there")


def test_runner_is_a_program_and_needs_only_the_standard_library(inside: Inside) -> None:
    """As the image starts it: isolated from all installed packages but the snapshot."""
    checkout = Path(runner.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-S", "-m", "hpc.inside.runner", "nothing", inside.dir.config, inside.attempt.path],
        env={"PYTHONPATH": str(checkout), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "error: there is no stage 'nothing'\n"
    assert "merge" in json.loads(inside.attempt.error.read_text())["hint"]
