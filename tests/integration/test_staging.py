"""Images are copied to the node's own disk once, and only what was planned with ever runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hpc.core.digest import sha256
from tests.support.slowed import slowed

from .project import Project, jobs
from .test_images import tamper
from .test_states import ended, submit


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A node-local scratch that every user may write to, as sites have it."""
    folder = Path(tempfile.mkdtemp(prefix="hpc-test-scratch-", dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)  # a job that is cancelled may be at work in it


@pytest.fixture
def own_image(project: Project) -> Project:
    """The project with a copy of the image that the test may spoil."""
    toml = (project.folder / "hpc.toml").read_text()
    image = toml.split('train = "')[1].split('"')[0]
    shutil.copy(image, project.write("own.sif", ""))
    project.write("hpc.toml", toml.replace(image, "own.sif"))
    return project


@pytest.fixture
def staging(own_image: Project, scratch: Path) -> Project:
    """The same on a site with scratch."""
    site = (own_image.folder / "sites" / "slurm-test.toml").read_text()
    own_image.write("sites/slurm-test.toml", site + f'scratch = "{scratch}"\n')
    return own_image


def phases(project: Project, run: str) -> list[str]:
    events = project.folder / "runs" / run / "first" / "attempt-1" / "events.jsonl"
    return [json.loads(line)["phase"] for line in events.read_text().splitlines()]


def test_first_job_stages_the_image_and_the_next_finds_it(staging: Project, scratch: Path) -> None:
    staging.hpc("submit", "first", "--wait")
    staging.hpc("submit", "first", "--set", "first.message=again", "--wait")
    assert "staging" in phases(staging, "first-1")
    assert "staging" not in phases(staging, "first-2")
    launch = json.loads((staging.folder / "runs/first-2/first/attempt-1/launch.json").read_text())
    (copy,) = scratch.glob("hpc-*/images/*.sif")
    assert str(copy) in launch["argv"]
    assert copy.read_bytes() == (staging.folder / "own.sif").read_bytes()
    assert "the image train is copied to its node anew" in staging.hpc("reset", "first-2", "--yes").stderr
    assert "nothing to reset" in staging.hpc("reset", "first-2", "--yes").stdout
    staging.hpc("submit", "first", "--set", "first.message=anew", "--wait")
    assert "staging" in phases(staging, "first-3")


@pytest.mark.parametrize("site", ["staging", "own_image"], ids=["staged", "in-place"])
def test_image_that_was_changed_after_it_was_planned_with_never_runs(site: str, request: pytest.FixtureRequest) -> None:
    project: Project = request.getfixturevalue(site)
    run = submit(project, "first", "--set", "first.sbatch={hold = true}")
    image = project.folder / "own.sif"
    planned = json.loads((project.folder / "runs" / run / "first" / "config.json").read_text())["environment"]["digest"]
    tamper(image)
    job = project.states(run)["first"]["job_id"]
    project.cluster.run("alice", "scontrol", "release", job)
    found = project.until(ended("first"), run)["first"]
    assert (found["state"], found["exit_code"]) == ("FAILED", 6)
    assert planned in found["reason"]
    assert sha256(image) in found["reason"]
    assert "is not the image that was planned with" in found["reason"]
    assert not (project.folder / "runs" / run / "first" / "out").exists()


def test_image_in_place_that_was_only_touched_runs(own_image: Project) -> None:
    run = submit(own_image, "first", "--set", "first.sbatch={hold = true}")
    (own_image.folder / "own.sif").touch()
    own_image.cluster.run("alice", "scontrol", "release", own_image.states(run)["first"]["job_id"])
    assert own_image.until(ended("first"), run)["first"]["state"] == "COMPLETED"
    assert "checking" in phases(own_image, run)


def test_copy_that_was_changed_on_the_node_is_made_again(staging: Project, scratch: Path) -> None:
    staging.hpc("submit", "first", "--wait")
    (copy,) = scratch.glob("hpc-*/images/*.sif")
    with copy.open("r+b") as file:
        file.write(b"tampered")
    staging.hpc("submit", "first", "--set", "first.message=again", "--wait")
    assert "staging" in phases(staging, "first-2")


def test_two_users_stage_the_same_image_apart(staging: Project, scratch: Path) -> None:
    staging.hpc("submit", "first", "--wait")
    staging.folder.chmod(0o755)
    theirs = tempfile.mkdtemp(prefix="tests-", dir="/home/bob")
    shutil.copytree(staging.folder, theirs, ignore=shutil.ignore_patterns("runs"), dirs_exist_ok=True)
    for path in (Path(theirs), *Path(theirs).rglob("*")):
        shutil.chown(path, "bob", "bob")
    try:
        hpc = str(staging.venv / "bin" / "hpc")
        staging.cluster.run("bob", hpc, "submit", "first", "--wait", cwd=theirs)
    finally:
        shutil.rmtree(theirs)
    owners = {path.owner() for path in scratch.glob("hpc-*/images/*.sif")}
    assert owners == {"alice", "bob"}


def test_status_tells_how_far_the_copy_is_and_that_it_waits_for_its_turn(staging: Project) -> None:
    os.truncate(staging.folder / "own.sif", 1 << 30)  # room behind the image: the copy takes a while
    site = (staging.folder / "sites" / "slurm-test.toml").read_text()
    staging.write("sites/slurm-test.toml", site + "stage_readers = 1\n")
    run = submit(staging, "first", "--set", "first.sbatch={hold = true}")
    digest = json.loads((staging.folder / "runs" / run / "first" / "config.json").read_text())["environment"]["digest"]
    place = staging.write(f"runs/.cache/staging/{digest[:16]}/slot-0", "")  # another node's
    staging.cluster.run("alice", "scontrol", "release", staging.states(run)["first"]["job_id"])
    waiting = staging.until(lambda rows: rows["first"]["phase"] == "staging", run)["first"]
    assert (waiting["state"], waiting["message"]) == ("RUNNING", "waits for its turn to copy the image")
    assert "staging  waits for its turn to copy the image" in staging.hpc("status", run).stdout
    with slowed(*copying(staging, run)):
        place.unlink()
        shown = ""
        while not re.search(r"staging [━─]+ +\d+%  [\d.]+ GB/s", shown):
            shown = staging.hpc("status", run).stdout
            assert "RUNNING" in shown
    assert staging.until(ended("first"), run)["first"]["state"] == "COMPLETED"


def copying(project: Project, run: str) -> list[int]:
    """The processes of the job's own program, which copies the image."""
    mark, found = os.fsencode(project.folder / "runs" / run), []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            if mark in words and b"submitit.core._submit" in words:
                found.append(int(entry.name))
    return found


@pytest.fixture
def small_disk(scratch: Path) -> Iterator[Path]:
    """A scratch with a little more room than the image takes."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m,mode=1777", "tmpfs", scratch], check=True)
    yield scratch
    subprocess.run(["umount", "-l", scratch], check=True)  # the image's helper may take a moment more


def test_disk_that_fills_during_the_copy_is_said_and_leaves_nothing(staging: Project, small_disk: Path) -> None:
    site = (staging.folder / "sites" / "slurm-test.toml").read_text()
    staging.write("sites/slurm-test.toml", site + "stage_readers = 1\n")
    run = submit(staging, "first", "--set", "first.sbatch={hold = true}")
    digest = sha256(staging.folder / "own.sif")
    place = staging.write(
        f"runs/.cache/staging/{digest[:16]}/slot-0", ""
    )  # it waits when it has seen that there is room
    staging.cluster.run("alice", "scontrol", "release", staging.states(run)["first"]["job_id"])
    staging.until(lambda rows: rows["first"]["phase"] == "staging", run)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(60 << 20))
    place.unlink()
    found = staging.until(ended("first"), run)["first"]
    assert (found["state"], found["exit_code"]) == ("FAILED", 1)
    assert "no room for own.sif in" in found["reason"]
    assert {path.suffix for path in small_disk.glob("hpc-*/images/*")} == {".lock"}
    filler.unlink()
    staging.write("sites/slurm-test.toml", site)
    staging.hpc("submit", "first", "--set", "first.sbatch={}", "--wait")


# ---- ahead of time


def test_images_are_staged_on_every_node_ahead_of_time(staging: Project, scratch: Path) -> None:
    """The nodes here share one disk, so one of them copies, and the others find the copy."""
    done = staging.hpc("images", "stage", "train", "--nodes", "dgx[01-03]", "--wait")
    said = sorted(done.stdout.splitlines())
    assert [line.partition(": train ")[0] for line in said] == ["dgx01", "dgx02", "dgx03"]
    assert sum("staged, 0.0" in line for line in said) == 1, said
    assert sum("already there (" in line for line in said) == 2, said
    assert "completed" in done.stderr
    (copy,) = scratch.glob("hpc-*/images/*.sif")
    assert copy.read_bytes() == (staging.folder / "own.sif").read_bytes()
    staging.hpc("submit", "first", "--wait")
    assert "staging" not in phases(staging, "first-2")
    assert {row["state"] for row in staging.json("status", "images-1")["stages"]} == {"COMPLETED"}


def test_staging_goes_on_without_waiting_and_takes_the_partitions_nodes(staging: Project) -> None:
    said = staging.hpc("images", "stage", "train", "-p", "debug")
    assert "images-1: dgx01 submitted\nnext: hpc status images-1" in said.stdout
    found = staging.until(ended("dgx01"), "images-1")
    assert list(found) == ["dgx01"]
    assert found["dgx01"]["state"] == "COMPLETED"
    document = staging.json("images", "stage", "train", "--nodes", "dgx01", "--wait")
    (row,) = document["nodes"]
    assert (document["schema"], row["node"], row["images"]["train"]["copied"]) == ("hpc.images.stage/1", "dgx01", False)


def test_staging_another_image_than_is_known_is_6_and_tells_both_digests(staging: Project, scratch: Path) -> None:
    image = staging.folder / "own.sif"
    known = sha256(image)
    toml = (staging.folder / "sites" / "slurm-test.toml").read_text()
    staging.write("sites/slurm-test.toml", toml + "sbatch = { hold = true }\n")
    waiting = staging.popen("images", "stage", "train", "--nodes", "dgx04", "--wait", "--json")
    deadline = time.monotonic() + 30
    while not (held := jobs(staging, "%i")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    tamper(image)
    staging.cluster.run("alice", "scontrol", "release", *held)
    out, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 6, out + err
    (row,) = json.loads(out)["nodes"]
    assert (row["state"], row["exit_code"]) == ("FAILED", 6)
    assert known in row["reason"]
    assert sha256(image) in row["reason"]
    assert list(scratch.glob("hpc-*/images/*.sif")) == []


def test_a_node_that_is_not_there_is_said_before_anything_is_submitted(staging: Project) -> None:
    done = staging.hpc("images", "stage", "train", "--nodes", "dgx01,dgx77", check=False)
    assert done.returncode == 2
    assert "partition 'batch' has no node 'dgx77'" in done.stderr
    assert not list((staging.folder / "runs").glob("images-*"))
