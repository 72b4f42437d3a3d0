"""Images ahead of time: what a staging job writes of its end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hpc.core import rundir
from hpc.core.digest import sha256
from hpc.core.rundir import AttemptDir, RunDir, StageDir
from hpc.node.prefetch import fetch
from hpc.node.staging import Staging, target_of


@pytest.fixture
def wish(tmp_path: Path) -> Staging:
    image = tmp_path / "train.sif"
    image.write_bytes(os.urandom(5 << 20))
    target = target_of(str(tmp_path / "scratch"), sha256(image), os.getuid())
    return Staging(source=str(image), sha256=sha256(image), target=target, limit_gb=10)


class Job:
    """One staging job's folder, and its payload as a process."""

    def __init__(self, folder: Path, wish: Staging) -> None:
        self.stage: StageDir = RunDir(folder / "images-1").stage("dgx01")
        self.attempt: AttemptDir = self.stage.attempt(1)
        self.attempt.path.mkdir(parents=True)
        usual = {"stage": "dgx01", "key": "k", "inputs": {}, "outputs": {}, "environment": {}}
        rundir.write_json(self.stage.config, {**usual, "config": {"images": {"train": asdict(wish)}}})

    def run(self) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "hpc.node.prefetch", str(self.stage.path), str(self.attempt.path)]
        return subprocess.run(argv, capture_output=True, text=True)

    @property
    def images(self) -> dict[str, Any]:
        return dict((rundir.read_json(self.stage.manifest) or {})["metrics"])


def test_first_time_copies_and_the_second_finds_it(wish: Staging) -> None:
    first = fetch(wish)
    begin = time.monotonic()
    second = fetch(wish)
    assert (first.copied, first.bytes) == (True, 5 << 20)
    assert (second.copied, second.bytes) == (False, 5 << 20)
    assert 0 < second.seconds <= time.monotonic() - begin


def test_job_leaves_a_manifest_with_its_key_and_tells_progress(tmp_path: Path, wish: Staging) -> None:
    job = Job(tmp_path, wish)
    done = job.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("train: staged, 0.01 GB in ")
    assert job.stage.done("k")
    assert job.images["train"]["copied"]
    event = rundir.last_events(job.attempt.events)[-1]
    assert (event["phase"], event["done"], event["total"]) == ("staging", 5 << 20, 5 << 20)
    assert event["message"].endswith(" GB/s")


def test_job_whose_image_is_another_one_says_both_digests_and_is_6(tmp_path: Path, wish: Staging) -> None:
    Path(wish.source).write_bytes(b"evil")
    job = Job(tmp_path, wish)
    assert job.run().returncode == 6
    said = rundir.read_json(job.attempt.error)
    assert said is not None
    assert wish.sha256 in said["cause"]
    assert sha256(Path(wish.source)) in said["cause"]
    assert not job.stage.manifest.exists()
