"""`hpc images stage` without Slurm: what is refused, what is staged on this machine, and which jobs it would submit."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hpc.core import rundir
from hpc.core.digest import sha256
from hpc.core.errors import Interrupted
from hpc.core.rundir import RunDir
from hpc.login import batch, cli, follow, slurm
from hpc.login.place import Placed
from hpc.login.slurm import Node, parse_partitions
from hpc.node.enter import Job

PARTITIONS = "batch*|up|7-00:00:00|2|128|1000000|gpu:a100:8\ndebug|up|30:00|1|1|1024|(null)\n"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one image, on a site that is this machine with a scratch folder."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in [n for n in os.environ if n.startswith("HPC_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "project"
    for name in ("images", "sites"):
        (folder / name).mkdir(parents=True)
    (folder / "images" / "train.sif").write_bytes(os.urandom(2 << 20))
    site = f'images = "{folder}/images"\nscratch = "{tmp_path}/scratch"\n'
    (folder / "sites" / "here.toml").write_text(f'extends = "local"\n{site}')
    (folder / "sites" / "dgx.toml").write_text(f'extends = "slurm"\n{site}')
    (folder / "sites" / "plain.toml").write_text(f'extends = "slurm"\nimages = "{folder}/images"\n')
    (folder / "hpc.toml").write_text('site = "here"\n')
    monkeypatch.chdir(folder)
    return folder


def stage(*arguments: str) -> int:
    return cli.main(["images", "stage", *arguments])


# ---- here


def test_on_this_machine_it_is_staged_at_once(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage("train") == 0
    assert f"{os.uname().nodename}: train staged, 0.00 GB in" in capsys.readouterr().out
    (copy,) = project.parent.glob("scratch/hpc-*/images/*.sif")
    assert sha256(copy) == sha256(project / "images" / "train.sif")
    assert stage("train", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "hpc.images.stage/1"
    assert document["nodes"][0]["images"]["train"]["copied"] is False


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "--site", "plain"], 2, "there is nothing to stage"),
        (["train", "--nodes", "dgx01"], 2, "this machine alone"),
        (["nothing"], 3, "the environment 'nothing' is not there"),
    ],
)
def test_what_cannot_be_staged_is_said(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage(*arguments) == code
    assert said in capsys.readouterr().err


def test_a_venv_cannot_be_staged(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = project.parent / "data" / "hpc" / "venvs" / "other" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.touch()
    assert stage("other") == 2
    assert "is a venv" in capsys.readouterr().err


# ---- on Slurm


class Slurm:
    """Stand-ins for sinfo and sbatch: the nodes that are there, and the jobs that were submitted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes = [Node("dgx01", "mixed-"), Node("dgx02", "down*"), Node("dgx03", "idle")]
        self.jobs: list[Placed] = []
        monkeypatch.setattr(slurm, "partitions", lambda: parse_partitions(PARTITIONS))
        monkeypatch.setattr(slurm, "nodes", self._nodes)
        monkeypatch.setattr(slurm, "hostnames", lambda text: text.split(","))
        monkeypatch.setattr(slurm, "queue", lambda user, call: {})
        monkeypatch.setattr(batch, "submit_slurm", self._sbatch)

    def _nodes(self, partition: str | None, names: Sequence[str]) -> list[Node]:
        return [n for n in self.nodes if not names or n.name in names]

    def _sbatch(self, placed: Placed, dependency: str | None, user: str) -> str:
        self.jobs.append(placed)
        return str(100 + len(self.jobs))

    def finish(self, run: RunDir, outcomes: dict[str, dict[str, Any]]) -> None:
        """The jobs have ended so."""
        for name, outcome in outcomes.items():
            folder = run.stage(name)
            if outcome["state"] == "COMPLETED":
                metrics = {"train": {"copied": True, "bytes": 2_000_000_000, "seconds": 2.0}}
                key = (rundir.read_json(folder.job) or {})["key"]
                rundir.write_json(folder.manifest, {"key": key, "metrics": metrics})
            rundir.write_json(folder.attempt(1).outcome, {"started": 0, "ended": 2, **outcome})


@pytest.fixture
def dgx(project: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    (project / "hpc.toml").write_text('site = "dgx"\n')
    return Slurm(monkeypatch)


def test_every_node_that_is_up_gets_a_small_job(project: Path, dgx: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage("train") == 0
    assert [p.name for p in dgx.jobs] == ["dgx01", "dgx03"]
    for placed in dgx.jobs:
        script = batch.script(placed, None)
        assert f"#SBATCH --nodelist={placed.name}" in script
        assert "--gres" not in script
        assert "#SBATCH --cpus-per-task=2" in script
        assert isinstance(placed.job, Job)
        assert placed.job.launch.argv[1:3] == ("-m", "hpc.node.prefetch")
    said = capsys.readouterr()
    assert "images-1: dgx01, dgx03 submitted" in said.out
    assert "next: hpc status images-1" in said.out
    assert "images-1/dgx01: submitted as job 101" in said.err
    assert cli.main(["images", "list"]) == 0


def test_a_small_partition_gets_a_job_that_it_allows(dgx: Slurm) -> None:
    assert stage("train", "--partition", "debug", "--nodes", "dgx03") == 0
    (placed,) = dgx.jobs
    asked = placed.planned.resources
    assert (asked.cpus_per_task, asked.mem_gb, asked.time_min) == (1, 1, 30)
    assert placed.batch["partition"] == "debug"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--nodes", "dgx02"], 3, "dgx02 is down*"),
        (["--nodes", "dgx01,dgx9"], 2, "has no node 'dgx9'"),
        (["--partition", "debugg"], 3, "no partition 'debugg'"),
    ],
)
def test_nodes_that_cannot_be_had_are_said_before_anything_is_submitted(
    dgx: Slurm, project: Path, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage("train", *arguments) == code
    assert said in capsys.readouterr().err
    assert dgx.jobs == []
    assert not list((project / "runs").glob("images-*"))


def test_where_no_node_is_up_it_is_refused(dgx: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    dgx.nodes = [Node("dgx02", "down*")]
    assert stage("train") == 3
    assert "has no node that is up" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "code"),
    [({"exit_code": 6, "cause": "another image"}, 6), ({"exit_code": 1, "cause": "no room"}, 1)],
)
def test_waiting_says_how_each_node_ended_and_the_worst_is_the_exit_code(
    dgx: Slurm, failure: dict[str, Any], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait(run: RunDir, names: Sequence[str], out: object) -> int:
        dgx.finish(run, {"dgx01": {"state": "COMPLETED"}, "dgx03": {"state": "FAILED", **failure}})
        return 1

    monkeypatch.setattr(follow, "wait", wait)
    assert stage("train", "--wait") == code
    assert capsys.readouterr().out.splitlines() == [
        "dgx01: train staged, 2.00 GB in 2.0 s (1.00 GB/s)",
        f"dgx03: FAILED: {failure['cause']}",
    ]


def test_who_leaves_is_told_that_the_jobs_go_on(
    dgx: Slurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(run: RunDir, names: Sequence[str], out: object) -> int:
        raise Interrupted(f"no longer waiting; {run.id} goes on", hint="h")

    monkeypatch.setattr(follow, "wait", leave)
    assert stage("train", "--wait") == 130
    assert "images-1 goes on" in capsys.readouterr().err
