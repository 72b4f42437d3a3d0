"""`hpc images build --submit` without Slurm: what the job is told, and what is refused before there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc.core import rundir
from hpc.core.assets import PACKAGES
from hpc.core.rundir import RunDir
from hpc.login import cli
from tests.login.test_staging import Slurm


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a recipe, on a Slurm site with a scratch folder."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in [n for n in os.environ if n.startswith(("HPC_", "APPTAINER_"))]:
        monkeypatch.delenv(name)
    folder = tmp_path / "project"
    for name in ("images", "sites", "containers"):
        (folder / name).mkdir(parents=True)
    site = f'extends = "slurm"\nimages = "{folder}/images"\nscratch = "{tmp_path}/scratch/of/mine"\n'
    (folder / "sites" / "dgx.toml").write_text(site)
    (folder / "containers" / "mine.def").write_text("Bootstrap: docker\nFrom: {{ image }}\n")
    (folder / "hpc.toml").write_text('site = "dgx"\n')
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def dgx(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    return Slurm(monkeypatch)


def build(*arguments: str) -> int:
    return cli.main(["images", "build", "mine", "--build-arg", "image=x", *arguments])


def test_the_job_is_told_the_same_command(dgx: Slurm, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("--submit", "--force", "--tmp", "/fast", "--partition", "debug") == 0
    (placed,) = dgx.jobs
    config = placed.document["config"]
    assert config["cwd"] == str(project)
    again = cli.parser().parse_args(config["argv"])
    assert (again.name, again.build_arg, again.force, again.tmp, again.kind) == (
        "mine",
        ["image=x"],
        True,
        "/fast",
        "sif",
    )
    assert not again.submit
    assert placed.batch["partition"] == "debug"
    assert placed.job.launch.env["PYTHONPATH"] == str(PACKAGES), "the snapshot has no hpc.login"
    assert placed.batch["cpus_per_task"] == 1, "more than that partition's nodes have"
    said = capsys.readouterr()
    assert "images-1: build-mine submitted" in said.out
    assert "next: hpc status images-1   hpc logs -f images-1" in said.out


def test_a_document_tells_run_and_job(dgx: Slurm, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("--submit", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["run"], document["path"]) == (
        "hpc.images.build/1", "images-1", f"{project}/images/mine.sif",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["build", "mine", "--submit"], 2, "needs a value for 'image'"),
        (["build", "mien", "--submit"], 2, "did you mean 'mine'"),
        (["build", "mine", "--as", "venv", "--submit"], 2, "cannot be a venv"),
        (["build", "mine", "--wait"], 2, "add --submit"),
        (["build", "mine", "--partition", "x"], 2, "add --submit"),
        (
            ["build", "mine", "--submit", "--site", "local", "--to", "x", "--build-arg", "image=x"],
            2,
            "no compute nodes",
        ),
        (["build", "mine", "--submit", "--build-arg", "image=x", "--partition", "nope"], 3, "no partition 'nope'"),
    ],
)
def test_what_cannot_be_built_is_said_before_a_job_waits(
    dgx: Slurm, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["images", *arguments]) == code
    assert said in capsys.readouterr().err
    assert dgx.jobs == []


PROGRAM = """#!/bin/sh
case "$*" in
*version*) echo "apptainer version 9" ;;
*inspect*) echo '{"data": {"attributes": {"labels": {}}}}' ;;
*build*)
    echo "$APPTAINER_TMPDIR $APPTAINER_CACHEDIR [$PYTHONPATH]" >{told}
    for word; do case $word in *.sif) echo it >"$word" ;; esac; done ;;
*) exit 1 ;;
esac
"""


def test_the_jobs_payload_builds_on_the_nodes_scratch_and_leaves_a_manifest(
    dgx: Slurm, project: Path, tmp_path: Path
) -> None:
    program = tmp_path / "apptainer"
    program.write_text(PROGRAM.replace("{told}", str(tmp_path / "told")))
    program.chmod(0o755)
    assert build("--submit") == 0
    (placed,) = dgx.jobs
    stage, attempt = RunDir(project / "runs" / "images-1").stage("build-mine"), placed.stage_dir.attempt(1)
    argv = [sys.executable, *placed.job.launch.argv[1:]]
    env = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin", **placed.job.launch.env}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest: dict[str, Any] = rundir.read_json(stage.manifest) or {}
    assert stage.done(placed.planned.key)
    assert manifest["metrics"]["path"] == f"{project}/images/mine.sif"
    assert manifest["metrics"]["fresh"]
    scratch = tmp_path / "scratch" / "of" / "mine"
    assert f"working in {scratch}" in done.stderr
    assert list(scratch.iterdir()) == []
    tmp, cache, path = (tmp_path / "told").read_text().split()
    assert (Path(tmp).parent.parent, Path(cache).parent.parent, path) == (scratch, scratch, "[]")
    phases = {(e["phase"], e["message"].partition(":")[0]) for e in rundir.last_events(attempt.events)}
    assert phases == {("building", "mine")}


def test_a_payload_that_fails_says_why_in_one_line(dgx: Slurm, project: Path, tmp_path: Path) -> None:
    program = tmp_path / "apptainer"
    program.write_text("#!/bin/sh\necho it broke\necho FATAL: while building\nexit 255\n")
    program.chmod(0o755)
    build("--submit")
    (placed,) = dgx.jobs
    argv = [sys.executable, *placed.job.launch.argv[1:]]
    env = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin", **placed.job.launch.env}
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "it broke" in done.stderr
    said = rundir.read_json(placed.stage_dir.attempt(1).error) or {}
    assert said["cause"] == "mine.def failed with exit code 255: FATAL: while building"
    assert not placed.stage_dir.manifest.exists()
