"""`hpc tunnel` on a real cluster: its command is really run on the laptop, and its address really opened there."""

from __future__ import annotations

import json
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc.core import endpoint
from hpc.core.rundir import RunDir
from tests.support import echoing

from .cluster import Cluster
from .project import SITE, Project, jobs
from .tunnels import opened, wish

PYTHON = "/usr/bin/python3"
ASK = """
import sys, urllib.error, urllib.request
try:
    with urllib.request.urlopen(sys.argv[1], timeout=10) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
except OSError as error:
    print("none", error)
"""
ECHO = """
import hashlib, os, sys, urllib.request
data = os.urandom(int(sys.argv[2]))
request = urllib.request.Request(sys.argv[1], data=data, method="POST")
with urllib.request.urlopen(request, timeout=120) as answer:
    back = answer.read()
print(len(back), hashlib.sha256(back).digest() == hashlib.sha256(data).digest())
"""


class Serving(Project):
    """A project whose one stage is the service of the tests."""

    def site(self, **values: str) -> None:
        images = self.cluster.image_dir
        text = SITE.format(images=images) + "".join(f"{name} = {json.dumps(v)}\n" for name, v in values.items())
        self.write("sites/slurm-test.toml", text)

    def hpc(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """With a folder of its own for what is private: others test at the same time, and their runs have our names."""
        env = {"XDG_STATE_HOME": str(self.folder / "state")}
        return super().hpc(*arguments, **{"env": env, **options})

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        env, pipe = {"XDG_STATE_HOME": str(self.folder / "state")}, subprocess.PIPE
        hpc = str(self.venv / "bin" / "hpc")
        return self.cluster.popen("alice", hpc, *arguments, cwd=self.folder, env=env, stdout=pipe, stderr=pipe)

    def submit(self, **config: object) -> RunDir:
        settings = [word for name, value in config.items() for word in ("--set", f"echo.{name}={json.dumps(value)}")]
        return RunDir(Path(self.json("submit", "echo", *settings)["folder"]))

    def tunnel(self, *arguments: str) -> dict[str, Any]:
        """Its document, with a local port that no other test has."""
        return self.json("tunnel", *wish(), *arguments)

    def ask(self, url: str, node: str = "laptop", user: str = "alice") -> str:
        return self.cluster.run(user, PYTHON, "-c", ASK, url, node=node).stdout.strip()

    def steps(self) -> list[str]:
        """The steps of alice's jobs of this project."""
        numbers = jobs(self, "%i")
        found = self.cluster.run("alice", "squeue", "-h", "-s", "-u", "alice", "-o", "%i").stdout.split()
        return [step for step in found if step.partition(".")[0] in numbers]

    def opens(self, url: str) -> str:
        """What the address answers, as soon as the tunnel stands."""

        def answer() -> str:
            said = self.ask(url)
            return "" if said.startswith("none") else said

        return str(until(answer, f"{url} answers"))


def until(found: Callable[[], Any], what: object, timeout: float = 60) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := found()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return value


@pytest.fixture
def lab(cluster: Cluster, workdir: Path, hpc_install: Path, base_sif: Path) -> Iterator[Serving]:
    (folder,) = hpc_install.glob("lib/python*/site-packages/stages")
    echoing.write(folder)
    made = Serving(cluster, workdir, hpc_install)
    made.site(login_host="login")
    made.write(
        "hpc.toml", f'site = "slurm-test"\n[environments]\ntrain = "{base_sif}"\n[pipeline]\nstages = ["echo"]\n'
    )
    yield made
    left = jobs(made, "%i")
    if left:
        cluster.run("alice", "scancel", *left)


def test_it_waits_prints_at_once_and_what_it_prints_works(lab: Serving) -> None:
    lab.submit(delay=20)
    option, port = wish()
    waiting = lab.popen("tunnel", "--json", option, port)
    out, err = waiting.communicate(timeout=90)
    printed = time.time()
    assert waiting.returncode == 0, err
    found = json.loads(out)
    begin = time.monotonic()
    lab.json("tunnel")
    pace = time.monotonic() - begin  # of this machine at this moment: the same command, where nothing is waited for
    assert printed - found["ready"] <= max(1, pace)
    assert "echo-1/echo: starting on dgx" in err
    assert found["command"] == f"ssh -N -L localhost:{port}:{found['node']}:{found['ports']['http']} login -l alice"
    assert 0 < found["ends"] - printed < 10 * 60
    with opened(lab.cluster, found["command"]):
        assert lab.opens(found["url"]) == f"200 hello from {found['node']}"
        assert lab.ask(found["url"].partition("?")[0]) == "403 Password or token"
        assert lab.ask(found["url"].replace(found["token"], "x" * 43)) == "403 Password or token"


def test_all_ports_come_through_one_command(lab: Serving) -> None:
    lab.submit(several=True)
    found = lab.tunnel()
    with opened(lab.cluster, found["command"]):
        first = found["local_ports"]["http"]
        for local in found["local_ports"].values():
            assert lab.opens(found["url"].replace(str(first), str(local), 1)).startswith("200 ")


def since_its_end(run: RunDir) -> float:
    """Seconds: how long the container takes to start, and the service to end, is not what is asked here."""
    return time.time() - float(json.loads(run.stage("echo").attempt(1).outcome.read_text())["ended"])


def test_death_at_the_start_is_told_with_its_log(lab: Serving) -> None:
    run = lab.submit(lives=-1)
    lab.until(lambda rows: rows["echo"]["state"] != "PENDING")
    said = lab.hpc("tunnel", check=False)
    assert said.returncode == 5
    assert since_its_end(run) < 15
    assert "echo-1/echo has ended: FAILED" in said.stderr
    assert "  | the model file is broken" in said.stderr


def test_death_later_and_what_ssh_then_says_is_explained(lab: Serving) -> None:
    lab.submit()
    found = lab.tunnel()
    with opened(lab.cluster, found["command"]) as ssh:
        assert lab.opens(found["url"]).startswith("200 ")
        assert lab.ask(found["url"].replace("/lab?", "/die?")).startswith("none")
        lab.until(lambda rows: rows["echo"]["state"] == "FAILED")
        assert lab.ask(found["url"]).startswith("none")
        ssh.terminate()
        message = ssh.communicate(timeout=10)[1]
    assert "open failed: connect failed: Connection refused" in message
    said = lab.hpc("tunnel", "--explain", f"{found['command']}\n{message}")
    assert "echo-1/echo is over: FAILED" in said.stdout
    again = lab.hpc("tunnel", check=False)
    assert again.returncode == 5
    assert "  | the server dies" in again.stderr


def test_cancelled_while_the_tunnel_waits(lab: Serving) -> None:
    run = lab.submit(delay=60)
    waiting = lab.popen("tunnel")
    lab.until(lambda rows: rows["echo"]["phase"] == "running" or "no answer yet" in rows["echo"]["message"])
    (job,) = jobs(lab, "%i")
    lab.cluster.run("alice", "scancel", job)
    _, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 5, err
    assert since_its_end(run) < 15
    assert f"{run.id}/echo has ended: CANCELLED" in err


def test_requeued_job_gets_a_new_tunnel_and_keeps_its_token(lab: Serving) -> None:
    lab.submit()
    before = lab.tunnel()
    lab.cluster.run("alice", "scontrol", "requeue", before["job_id"])
    lab.until(lambda rows: rows["echo"]["phase"] != "ready")
    after = lab.tunnel()
    assert after["job_id"] == before["job_id"]
    assert after["token"] == before["token"]
    with opened(lab.cluster, after["command"]):
        assert lab.opens(after["url"]).startswith("200 ")
    lab.hpc("cancel")
    again = lab.json("submit", "echo")  # another job of the same run
    assert again["run"] == after["run"]
    third = lab.tunnel()
    assert (third["job_id"] == after["job_id"], third["token"] == after["token"]) == (False, False)
    with opened(lab.cluster, third["command"]):
        assert lab.opens(third["url"].replace(third["token"], after["token"])).startswith("403 ")


def test_jump_leads_to_the_nodes_loopback(lab: Serving) -> None:
    lab.site(reach="jump", login_host="login")
    lab.write("hpc.toml", (lab.folder / "hpc.toml").read_text() + '[echo]\nsbatch = { nodelist = "dgx01" }\n')
    lab.cluster.start("sshd-dgx01")
    try:
        lab.submit()
        found = lab.tunnel()
        assert found["command"].startswith("ssh -N -J alice@login -L localhost:")
        assert found["command"].endswith(f":localhost:{found['ports']['http']} -l alice dgx01")
        assert lab.ask(f"http://dgx01:{found['ports']['http']}/", node="login").startswith("none")
        with opened(lab.cluster, found["command"]):
            assert lab.opens(found["url"]) == "200 hello from dgx01"
        said = checks(lab)
        assert "direct: works; jump: works; relay: works" in said["reach"]["found"]
    finally:
        lab.cluster.stop("sshd-dgx01")


def test_relay_carries_all_bytes_and_leaves_nothing(lab: Serving) -> None:
    lab.site(reach="relay", login_host="login")
    run = lab.submit()
    found = lab.tunnel()
    sockets = {name: Path(path) for name, path in found["relay"].items()}
    local = next(iter(found["local_ports"].values()))
    assert found["command"] == f"ssh -N -L localhost:{local}:{sockets['http']} login -l alice"
    assert (endpoint.read(run.stage("echo")) or pytest.fail("no endpoint")).bound == "127.0.0.1"
    for node in ("login", "dgx02"):
        assert lab.ask(f"http://{found['node']}:{found['ports']['http']}/", node=node).startswith("none")
    with opened(lab.cluster, found["command"]):
        assert lab.opens(found["url"]) == f"200 hello from {found['node']}"
        assert lab.ask(found["url"].partition("?")[0]).startswith("403 ")
        size = 100_000_000
        done = lab.cluster.run("alice", PYTHON, "-c", ECHO, found["url"], str(size), node="laptop", timeout=180)
        assert done.stdout.split() == [str(size), "True"]
    assert lab.tunnel()["relay"] == found["relay"]
    assert len(lab.steps()) == 3  # batch, the service, and one for the relay however often it is asked for
    assert "the relay has ended" in lab.hpc("tunnel", "--stop").stderr
    assert "no relay runs here" in lab.hpc("tunnel", "--stop").stderr
    until(lambda: len(lab.steps()) == 2, "the relay's step has ended")
    assert not sockets["http"].exists()


def test_relay_ends_with_its_job(lab: Serving) -> None:
    lab.site(reach="relay")
    lab.submit()
    found = lab.tunnel()
    (socket,) = map(Path, found["relay"].values())
    record = socket.with_name(socket.name.replace("-http.sock", ".json"))
    process = json.loads(record.read_text())["pid"]
    lab.hpc("cancel")
    until(lambda: not socket.exists() and not record.exists(), "the sockets are gone")
    until(lambda: not Path(f"/proc/{process}").exists(), "the relay has ended")


def test_relay_whose_process_was_killed_is_started_again(lab: Serving) -> None:
    lab.site(reach="relay", login_host="login")
    lab.submit()
    (socket,) = map(Path, lab.tunnel()["relay"].values())
    process = json.loads(socket.with_name(socket.name.replace("-http.sock", ".json")).read_text())["pid"]
    lab.cluster.run("alice", "kill", "-KILL", str(process))
    found = lab.tunnel()
    with opened(lab.cluster, found["command"]):
        assert lab.opens(found["url"]).startswith("200 ")
    until(lambda: len(lab.steps()) == 3, "the killed one's step has ended")


def checks(lab: Serving) -> dict[str, Any]:
    return {check["what"]: check for check in lab.json("doctor", check=False)["checks"]}


def test_doctor_tries_the_ways(lab: Serving) -> None:
    assert checks(lab)["reach"]["found"] == "direct; not tried"
    lab.submit()
    lab.tunnel()
    found = checks(lab)["reach"]
    assert found["verdict"] == "ok"
    assert "direct: works" in found["found"]
    assert "relay: works" in found["found"]


# ---- nobody else gets in

SEARCH = """
import os, subprocess, sys
token = sys.stdin.read().strip().encode()
found = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("cmdline", "environ"):
        try:
            if token in open(f"/proc/{pid}/{name}", "rb").read():
                found.append(f"/proc/{pid}/{name}")
        except OSError:
            pass
for argv in (["ps", "-efww"], ["scontrol", "show", "job"], ["squeue", "-o", "%all"], ["sacct", "-aPo", "ALL"]):
    if token in subprocess.run(argv, capture_output=True).stdout:
        found.append(" ".join(argv))
for top in sys.argv[1:]:
    for folder, _, names in os.walk(top):
        for name in names:
            path = os.path.join(folder, name)
            try:
                if os.path.isfile(path) and token in open(path, "rb").read():
                    found.append(path)
            except OSError:
                pass
print(found)
"""


@pytest.mark.parametrize("reach", ["direct", "relay"])
def test_other_user_finds_no_token_and_no_way_in(lab: Serving, reach: str) -> None:
    lab.site(reach=reach, login_host="login")
    lab.folder.chmod(0o755)  # only what the files themselves forbid counts
    run = lab.submit()
    waiting = lab.popen("tunnel", "--login", "klm-v5xx45")
    out, _ = waiting.communicate(timeout=60)
    found = lab.tunnel()
    assert found["token"] in out
    node, port = found["node"], found["ports"]["http"]
    with opened(lab.cluster, found["command"]):
        assert lab.opens(found["url"]).startswith("200 ")
        for user, machine in (("bob", "login"), ("bob", node), ("bob", "laptop"), ("alice", "login")):
            said = lab.cluster.run(
                user, PYTHON, "-c", SEARCH, str(lab.folder), str(lab.cluster.dir / "log"),
                node=machine, input=found["token"], timeout=120,
            )  # fmt: skip
            if user == "bob":
                assert said.stdout.strip() == "[]", machine
        assert all(path in said.stdout for path in (str(run.stage("echo").token), "/environ")), (
            "the search finds nothing"
        )
        address = f"http://{node if reach == 'direct' else '127.0.0.1'}:{port}/"
        assert lab.ask(address, node=node, user="bob") == "403 Password or token"
        (kept,) = (lab.folder / "state" / "hpc").glob(f"tunnel-{run.id}-echo-*.txt")
        assert found["token"] in kept.read_text()
        assert "klm-v5xx45" not in kept.read_text()
        for path in (kept, run.stage("echo").token):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert lab.cluster.run("bob", "cat", str(path), check=False).returncode != 0
        for path in (found["relay"] or {}).values():
            code = f"import socket; socket.socket(socket.AF_UNIX).connect({path!r})"
            assert "PermissionError" in lab.cluster.run("bob", PYTHON, "-c", code, check=False).stderr
    assert lab.hpc("tunnel", run.id, user="bob", check=False).returncode == 7
