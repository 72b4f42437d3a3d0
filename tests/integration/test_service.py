"""Service stages on a real cluster: ready before they are announced, private, and gone when they end."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import serving

from .project import Project, holding, jobs
from .test_states import ended, submit


class Door:
    """One submitted service."""

    def __init__(self, project: Project, run: str) -> None:
        self.project = project
        self.run = run
        self.folder = project.folder / "runs" / run / serving.NAME

    def row(self) -> dict[str, Any]:
        return self.project.states(self.run)[serving.NAME]

    def ready(self, timeout: float = 60) -> dict[str, Any]:
        self.project.until(lambda f: bool(f[serving.NAME]["endpoint"]), self.run, timeout)
        document: dict[str, Any] = json.loads((self.folder / "endpoint.json").read_text())
        return document

    def opens(self) -> None:
        """Let one with a gate listen."""
        (self.folder / "go").touch()

    @property
    def token(self) -> str:
        return (self.folder / "token").read_text()

    def end(self, timeout: float = 60) -> dict[str, Any]:
        return self.project.until(ended(serving.NAME), self.run, timeout)[serving.NAME]


@pytest.fixture
def door(project: Project, hpc_install: Path) -> Project:
    """A project that has the service stage."""
    (folder,) = hpc_install.glob("lib/python*/site-packages/stages")
    serving.write(folder)
    return project


def start(project: Project, *options: str) -> Door:
    return Door(project, submit(project, serving.NAME, *options))


def http(project: Project, url: str, token: str | None = None, *, user: str = "alice", node: str = "login") -> str:
    """The status code that curl gets, or 000; the token never stands in its arguments."""
    config = f'header = "Authorization: Bearer {token}"\n' if token else ""
    done = project.cluster.run(
        user, "curl", "-s", "--max-time", "30", "-K", "-", "-o", "/dev/null", "-w", "%{http_code}", url,
        node=node, check=False, input=config,
    )  # fmt: skip
    return done.stdout


def test_it_answers_on_the_login_node_when_status_says_ready(door: Project) -> None:
    one = start(door, "--set", "door.gate=true")
    found = door.until(lambda f: "no answer yet" in f["door"]["message"], one.run)["door"]
    assert (found["state"], found["endpoint"]) == ("RUNNING", "")
    one.opens()
    where = one.ready()
    address = one.row()["endpoint"]
    assert address == f"{where['host']}:{where['ports']['http']}"
    assert http(door, f"http://{address}/health", one.token) == "200"
    assert http(door, f"http://{address}/health") == "403"
    text = door.hpc("status", one.run).stdout
    assert f"ready on {address}" in text
    again = door.hpc("submit", serving.NAME, "--set", "door.gate=true")
    assert f"{one.run}: nothing to do for door (RUNNING" in again.stdout
    assert f"hpc tunnel {one.run}/door" in again.stdout
    door.hpc("cancel", one.run)
    assert one.end()["state"] == "CANCELLED"
    assert not (one.folder / "endpoint.json").exists()
    assert not (one.folder / "token").exists()
    assert http(door, f"http://{address}/health") == "000"


def test_wait_ends_when_it_is_ready_and_submit_starts_an_ended_one_again(door: Project) -> None:
    done = door.hpc("submit", serving.NAME, "--wait")
    (run,) = {row["run"] for row in door.json("status")["stages"]}
    assert f"{run}/door is ready on dgx" in done.stderr
    door.hpc("cancel", run)
    again = submit(door, serving.NAME)  # at once: the first may still be ending
    assert again == run
    assert Door(door, run).row()["attempt"] == 2
    Door(door, run).ready()


def test_death_at_the_start_is_told_with_its_last_words(door: Project) -> None:
    one = start(door, "--set", "door.fail=cannot open")
    end = one.end()
    assert (end["state"], end["reason"]) == ("FAILED", "the service ended before it answered: exit code 1")
    outcome = json.loads((one.folder / "attempt-1" / "outcome.json").read_text())
    assert "cannot open" in "\n".join(outcome["log_tail"])


def test_death_later_is_told(door: Project) -> None:
    one = start(door)
    one.ready()
    address = one.row()["endpoint"]
    http(door, f"http://{address}/die", one.token)
    end = one.end()
    assert (end["state"], end["reason"]) == ("FAILED", "the service ended by itself: exit code 3")
    assert not (one.folder / "endpoint.json").exists()


def test_time_limit_is_announced_and_ends_it(door: Project) -> None:
    one = start(door, "--time", "1")
    one.ready()
    found = door.until(lambda f: f["door"]["phase"] == "ending", one.run, 90)["door"]
    assert "time limit" in found["message"]
    assert http(door, f"http://{found['endpoint']}/health", one.token) == "200"
    assert one.end(120)["state"] == "TIMEOUT"
    assert not (one.folder / "token").exists()


@pytest.fixture
def of_bob(door: Project) -> Iterator[Project]:
    """The same project, in bob's hands."""
    folder = Path(tempfile.mkdtemp(prefix="tests-", dir="/home/bob"))
    shutil.chown(folder, "bob", "bob")
    his = Project(door.cluster, folder, door.venv, "bob")
    for name in ("hpc.toml", "sites/slurm-test.toml"):
        his.write(name, (door.folder / name).read_text())
    yield his
    if left := jobs(his, "%i"):
        door.cluster.run("bob", "scancel", *left)
        his.until(ended(serving.NAME))
    shutil.rmtree(folder, ignore_errors=True)


def test_two_users_who_start_at_once_on_one_node_get_ports_of_their_own(door: Project, of_bob: Project) -> None:
    """Both wish for the same port, and both begin to listen at the same moment: the later one must choose again."""
    # a port that no other service takes by chance: they choose among 9000 to 9999
    words = ("submit", serving.NAME, "--set", "door.port=8500", "--set", "door.gate=true")
    both = (door, of_bob)
    for project in both:
        site = project.folder / "sites" / "slurm-test.toml"
        site.write_text(site.read_text() + '[sbatch]\nnodelist = "dgx01"\n')
    asking = [project.popen(*words, "--json") for project in both]
    runs = [json.loads(one.communicate(timeout=60)[0])["run"] for one in asking]
    doors = [Door(project, run) for project, run in zip(both, runs, strict=True)]
    for one in doors:  # each has chosen its port
        one.project.until(lambda f: f["door"]["phase"] == "starting" and "no answer" in f["door"]["message"], one.run)
    for one in doors:
        one.opens()
    found = [one.ready() for one in doors]
    assert {f["host"] for f in found} == {"dgx01"}
    ports = [f["ports"]["http"] for f in found]
    assert len(set(ports)) == 2
    assert 8500 in ports, "else they did not want the same"
    events = "".join((one.folder / "attempt-1" / "events.jsonl").read_text() for one in doors)
    assert "port 8500 was taken by another; choosing again" in events, "else they did not meet"
    for one, other, port in zip(doors, reversed(doors), ports, strict=True):
        url = f"http://dgx01:{port}/health"
        assert http(one.project, url, one.token, user=one.project.user) == "200"
        assert http(one.project, url, other.token, user=other.project.user) == "403"
        assert one.row()["endpoint"] == f"dgx01:{port}"


def test_another_user_of_the_node_gets_neither_in_nor_at_the_token(door: Project) -> None:
    before = time.time()
    one = start(door)
    where = one.ready()
    node, port, token = where["host"], where["ports"]["http"], one.token
    cluster = door.cluster
    for place, address in (("login", f"{node}:{port}"), (node, f"127.0.0.1:{port}"), (node, f"{node}:{port}")):
        assert http(door, f"http://{address}/health", user="bob", node=place) == "403"
    assert cluster.run("bob", "cat", str(one.folder / "token"), check=False).returncode != 0
    shown = [
        cluster.run("bob", "ps", "-eww", "-o", "args", node=node).stdout,
        cluster.run("bob", "scontrol", "show", "job", "-d", str(one.row()["job_id"])).stdout,
        cluster.run(
            "bob", "find", str(door.folder), "/tmp", "-type", "f", "-newermt", f"@{before:.0f}",
            "-exec", "grep", "-Fsl", "--", token, "{}", "+", check=False, timeout=120,
        ).stdout,
        cluster.run("bob", "bash", "-c", f"cat /proc/{where['pid']}/environ", node=node, check=False).stdout,
    ]  # fmt: skip
    assert not any(token in text for text in shown[:2])
    assert shown[2].split() == []
    assert shown[3] == ""
    assert holding(one.folder, token) == []


def test_requeued_service_is_announced_where_it_is_now(door: Project) -> None:
    one = start(door)
    first = one.ready()
    token = one.token
    job = str(one.row()["job_id"])
    door.cluster.run("alice", "scontrol", "requeue", job)
    door.until(lambda f: not f["door"]["endpoint"], one.run)
    deadline = time.monotonic() + 60
    while (one.folder / "endpoint.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert door.cluster.run("bob", "cat", str(one.folder / "token"), check=False).returncode != 0
    door.cluster.run("alice", "scontrol", "update", f"jobid={job}", f"ExcNodeList={first['host']}", "StartTime=now")
    second = one.ready(180)
    assert second["host"] != first["host"]
    assert one.token == token, "the same job: whoever was let in is let in again"
    assert http(door, f"http://{second['host']}:{second['ports']['http']}/health", one.token) == "200"
    assert os.path.exists(one.folder / "attempt-1" / "outcome-0.json")
    door.hpc("cancel", one.run)
    one.end()
    assert not (one.folder / "token").exists(), "it dies with the job"
