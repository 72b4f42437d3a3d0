"""The laptop's side on a real cluster: another network, the system's ssh and a real sshd, a real service on a node."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import echoing

from .cluster import Cluster
from .project import SITE, Project, jobs
from .test_tunnel import ASK, ECHO, PYTHON, until
from .tunnels import wish

ODD = 'it\'s $(id) `id` "q" !x \\ 한글'


class Laptop(Project):
    """alice's project, and her laptop, on which the same hpc is installed."""

    @property
    def env(self) -> dict[str, str]:
        return {"HPC_REMOTE": str(self.folder / "bin" / "hpc"), "TMPDIR": str(self.folder / "tmp")}

    @property
    def via(self) -> str:
        return f"login:{self.folder}"

    def here(
        self, *arguments: str, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """`hpc ARGUMENTS` on the laptop, in alice's home."""
        argv = (str(self.venv / "bin" / "hpc"), *arguments)
        return self.cluster.run("alice", *argv, node="laptop", env={**self.env, **(env or {})}, check=False, **options)

    def serve(self, **config: object) -> str:
        """A service that is submitted: RUN/STAGE."""
        settings = [word for name, value in config.items() for word in ("--set", f"echo.{name}={json.dumps(value)}")]
        return f"{self.json('submit', 'echo', *settings)['run']}/echo"

    def job(self) -> str:
        (number,) = jobs(self, "%i")
        return number

    def ask(self, url: str) -> str:
        return self.cluster.run("alice", PYTHON, "-c", ASK, url, node="laptop").stdout.strip()

    def processes(self) -> list[str]:
        """Processes of the laptop that know of its folder for temporary files: hpc, its guard and its ssh."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environ = (entry / "environ").read_bytes()
                    argv = (entry / "cmdline").read_bytes()
                except OSError:  # it has ended
                    continue
                if f"TMPDIR={self.folder}/tmp".encode() in environ.split(b"\0") and argv:
                    found.append(f"{entry.name} {argv.decode().replace(chr(0), ' ')}")
        return found

    def left(self) -> list[str]:
        """What is there still: processes, and files such as a control socket."""
        return [*self.processes(), *(str(p) for p in (self.folder / "tmp").iterdir())]

    def tunnel(self, *arguments: str, env: dict[str, str] | None = None, via: str = "") -> Open:
        argv = (str(self.venv / "bin" / "hpc"), "tunnel", "--via", via or self.via, *arguments)
        pipe = subprocess.PIPE
        return Open(self, self.cluster.popen(
            "alice", *argv, node="laptop", env={**self.env, **(env or {})}, stdin=subprocess.DEVNULL,
            stdout=pipe, stderr=pipe,
        ))  # fmt: skip


class Open:
    """A `hpc tunnel` that runs on the laptop, and all that it says, as it comes."""

    def __init__(self, laptop: Laptop, process: subprocess.Popen[str]) -> None:
        self.laptop = laptop
        self.process = process
        self.out: list[str] = []
        self.err: list[str] = []
        self._threads = [
            threading.Thread(target=lines.extend, args=(stream,), daemon=True)
            for stream, lines in ((process.stdout, self.out), (process.stderr, self.err))
        ]
        for thread in self._threads:
            thread.start()

    def until(self, found: Callable[[], Any], timeout: float = 90) -> Any:
        def look() -> Any:
            value = found()
            assert value or self.process.poll() is None, (self.process.returncode, self.out, self.err)
            return value

        return until(look, (self.out, self.err), timeout)

    def url(self) -> str:
        """The address that it shows."""
        shown: str = self.until(lambda: next((u.strip() for u in self.out if u.startswith("http")), None))
        return shown

    def says(self, text: str, timeout: float = 90) -> None:
        self.until(lambda: text in "".join(self.err), timeout)

    def ssh(self) -> int:
        """The pid of the connection that it holds."""
        (pid,) = (int(p.split()[0]) for p in self.laptop.processes() if re.match(r"\d+ ssh .*-M ", p))
        return pid

    def ends(self, number: int | None = None, timeout: float = 60) -> tuple[int, str]:
        """Its exit code and what it said."""
        if number is not None:
            os.killpg(self.process.pid, number) if number == signal.SIGINT else self.process.send_signal(number)
        code = self.process.wait(timeout)
        for thread in self._threads:
            thread.join(5)
        said = "".join(self.err)
        assert "Traceback" not in said, said
        return code, said


@pytest.fixture
def laptop(cluster: Cluster, workdir: Path, hpc_install: Path, base_sif: Path) -> Iterator[Laptop]:
    (stages,) = hpc_install.glob("lib/python*/site-packages/stages")
    echoing.write(stages)
    made = Laptop(cluster, workdir, hpc_install)
    made.write("sites/slurm-test.toml", SITE.format(images=base_sif.parent))
    made.write("hpc.toml", f'site = "slurm-test"\n[environments]\ntrain = "{base_sif}"\n')
    # others test at the same time, and their runs have our names: a folder of its own for what is private
    made.write("bin/hpc", f'#!/bin/sh\nXDG_STATE_HOME={workdir}/state exec {hpc_install}/bin/hpc "$@"\n').chmod(0o755)
    made.write("tmp/x", "").unlink()
    yield made
    for process in made.processes():
        os.kill(int(process.split()[0]), signal.SIGKILL)
    if left := jobs(made, "%i"):
        cluster.run("alice", "scancel", *left)


def port_of(url: str) -> int:
    found = re.match(r"http://localhost:(\d+)/", url)
    assert found, url
    return int(found[1])


# ---- every verb


def test_every_verb_is_there_with_its_words_and_exit_codes(laptop: Laptop) -> None:
    asked = laptop.here("--via", laptop.via, "status", "--json")
    assert json.loads(asked.stdout)["runs_folder"] == str(laptop.folder / "runs")
    assert asked.returncode == 0
    none = laptop.here("--via", laptop.via, "status", ODD, "--json")
    assert none.returncode == 7
    assert ODD in json.loads(none.stdout)["error"]
    plan = laptop.here("--via", laptop.via, "submit", "echo", "--dry-run", "--set", f"echo.delay={ODD}")
    assert plan.returncode == 2
    assert ODD in plan.stderr
    sent = laptop.here("submit", "echo", "--json", env={"HPC_VIA": "login", "HPC_VIA_FOLDER": str(laptop.folder)})
    run = json.loads(sent.stdout)["run"]
    assert laptop.here("--via", laptop.via, "cancel", run).returncode == 0
    missing = laptop.here("--via", f"login:{laptop.folder}/none", "status", "--json")
    assert missing.returncode == 2
    assert json.loads(missing.stdout)["exit_code"] == 2
    plain = laptop.here("--via", laptop.via, "status", env={"HPC_REMOTE": ""})
    assert plain.returncode == 4
    assert "no hpc on login" in plain.stderr


def test_terminal_there_where_one_is_here_and_ctrl_c_ends_both(laptop: Laptop) -> None:
    argv = (str(laptop.venv / "bin" / "hpc"), "--via", laptop.via, "status", "--watch")
    master, slave = pty.openpty()
    # setsid --ctty: the terminal becomes its own, so that Ctrl-C is the terminal's
    process = laptop.cluster.popen(
        "alice",
        "setsid",
        "--ctty",
        "--wait",
        *argv,
        node="laptop",
        env=laptop.env,
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown, deadline = b"", time.monotonic() + 60
    try:
        while b"\033[2J" not in shown:  # `status --watch` clears the screen of a terminal only
            assert time.monotonic() < deadline, shown
            if select.select([master], [], [], 0.2)[0]:
                shown += os.read(master, 4096)
        os.write(master, b"\x03")
        assert process.wait(60) == 0
    finally:
        os.close(master)
        process.kill()
    assert until(lambda: not watching(laptop), "it goes on there")


def test_without_a_terminal_it_ends_there_when_the_laptop_leaves(laptop: Laptop) -> None:
    argv = (str(laptop.venv / "bin" / "hpc"), "--via", laptop.via, "status", "--watch")
    process = laptop.cluster.popen(
        "alice", *argv, node="laptop", env=laptop.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until(lambda: watching(laptop), "it never began")
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "jobs that were submitted go on" in said
    until(lambda: not watching(laptop), "it goes on there")


def watching(laptop: Laptop) -> list[str]:
    """The `status --watch` of this project, on whichever machine."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            argv = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if b"--watch" in argv and Path(os.readlink(entry / "cwd")) == laptop.folder:
                found.append(entry.name)
        except OSError:
            continue
    return found


# ---- the tunnel


def test_address_answers_on_the_laptop_and_ctrl_c_leaves_nothing(laptop: Laptop) -> None:
    name = laptop.serve(delay=2)
    opened = laptop.tunnel(*wish())
    url = opened.url()
    assert laptop.ask(url).startswith("200 hello from dgx"), "it answers at the moment at which it is shown"
    assert laptop.ask(url.partition("?")[0]).startswith("403")
    opened.says(f"{name} is ready on dgx")
    token = url.partition("token=")[2]
    assert not [p for p in laptop.processes() if token in p]
    (private,) = (laptop.folder / "tmp").iterdir()
    assert private.stat().st_mode & 0o777 == 0o700
    bytes_ = str(20 << 20)
    echoed = laptop.cluster.run("alice", PYTHON, "-c", ECHO, url, bytes_, node="laptop", timeout=120)
    assert echoed.stdout.split() == [bytes_, "True"]
    code, said = opened.ends(signal.SIGINT)
    assert code == 130
    assert f"{name} goes on" in said
    assert f"hpc --via {shlex.quote(laptop.via)} cancel {name} ends it" in said
    assert laptop.left() == []
    assert laptop.states()["echo"]["phase"] == "ready"
    assert laptop.ask(url).startswith("none")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_however_it_ends_nothing_is_left(laptop: Laptop, number: signal.Signals) -> None:
    laptop.serve()
    opened = laptop.tunnel(*wish())
    opened.url()
    code, _ = opened.ends(number)
    assert code == (-number if number == signal.SIGKILL else 130)
    until(lambda: not laptop.left(), laptop.left())


def test_document_has_the_port_that_was_really_used(laptop: Laptop) -> None:
    laptop.serve()
    flag, port = wish()
    with listener(laptop, int(port)):
        opened = laptop.tunnel(flag, port, "--json")
        opened.until(lambda: opened.out and opened.out[-1] == "}\n")
        document = json.loads("".join(opened.out))
        opened.says(f"local port {port} is taken")
    assert document["schema"] == "hpc.tunnel/1"
    assert document["local_ports"] == {"http": port_of(document["url"])}
    assert port_of(document["url"]) > int(port)
    assert laptop.ask(document["url"]).startswith("200 hello from")
    code, _ = opened.ends(signal.SIGINT)
    assert (code, json.loads("".join(opened.out))) == (130, document), "one document, whatever comes later"


def listener(laptop: Laptop, port: int) -> subprocess.Popen[str]:
    """Another program of the laptop's that listens there."""
    code = f"import socket; s = socket.create_server(('127.0.0.1', {port})); print('yes', flush=True); input()"
    pipe = subprocess.PIPE
    process = laptop.cluster.popen("alice", PYTHON, "-c", code, node="laptop", stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    assert process.stdout.readline() == "yes\n"
    return process


def test_all_ports_of_a_service(laptop: Laptop) -> None:
    laptop.serve(several=True)
    opened = laptop.tunnel(*wish())
    url = opened.url()
    opened.until(lambda: len(opened.out) == 3)
    for line in opened.out[1:]:
        name, port = re.match(r"(\w+): localhost:(\d+)", line).groups()  # type: ignore[union-attr]
        assert laptop.ask(re.sub(r":\d+/", f":{port}/", url)).startswith("200"), name
    opened.ends(signal.SIGINT)


def test_connection_that_dies_is_made_anew_on_the_same_port(laptop: Laptop) -> None:
    laptop.serve()
    opened = laptop.tunnel(*wish())
    url, first = opened.url(), opened.ssh()
    os.kill(first, signal.SIGKILL)
    opened.says("is ready again")
    assert opened.ssh() != first
    assert laptop.ask(url).startswith("200"), "the same address"
    assert len([line for line in opened.out if line.startswith("http")]) == 1, "no other is shown"
    opened.ends(signal.SIGINT)
    assert laptop.left() == []


def test_once_leaves_when_the_connection_dies(laptop: Laptop) -> None:
    laptop.serve()
    opened = laptop.tunnel("--once", *wish())
    opened.url()
    os.kill(opened.ssh(), signal.SIGKILL)
    code, said = opened.ends()
    assert code == 5
    assert "the connection to login is lost" in said
    assert laptop.left() == []


def test_service_that_moves_to_another_node_is_followed(laptop: Laptop) -> None:
    name = laptop.serve()
    opened = laptop.tunnel(*wish())
    url = opened.url()
    node = laptop.ask(url).rpartition(" ")[2]
    job = laptop.job()
    laptop.cluster.run("alice", "scontrol", "requeue", job)
    laptop.cluster.run("alice", "scontrol", "update", f"jobid={job}", f"excnodelist={node}")
    opened.says("does not answer any more")
    opened.says(f"{name} is ready again", timeout=90)
    shown = time.time()
    ready = json.loads((laptop.folder / "runs" / name / "endpoint.json").read_text())["ready"]
    assert shown - ready < 5, "the goal"
    answer = laptop.ask(url)
    assert answer.startswith("200 hello from dgx"), "the address of before, in a tab that is open"
    assert not answer.endswith(node)
    opened.ends(signal.SIGINT)
    assert laptop.left() == []


def test_service_that_dies_is_told(laptop: Laptop) -> None:
    name = laptop.serve()
    opened = laptop.tunnel(*wish())
    laptop.ask(opened.url().replace("/lab?", "/die?"))
    code, said = opened.ends()
    assert code == 5
    assert f"error: {name} has ended: FAILED" in said
    assert "exit code 3" in said
    assert "hpc logs" in said
    assert laptop.left() == []


def test_service_that_is_shut_down_ends_the_tunnel_without_an_error(laptop: Laptop) -> None:
    name = laptop.serve()
    opened = laptop.tunnel(*wish())
    laptop.ask(opened.url().replace("/lab?", "/leave?"))
    code, said = opened.ends()
    assert (code, f"{name} has ended; the tunnel is closed" in said) == (0, True), said


def test_cancelled_while_it_waits_in_the_queue(laptop: Laptop) -> None:
    name = laptop.serve(delay=600)
    opened = laptop.tunnel()
    opened.says(f"{name}: starting on dgx")
    laptop.hpc("cancel", name)
    code, said = opened.ends()
    assert code == 5
    assert f"{name} has ended: CANCELLED" in said
    assert laptop.left() == []


def test_nothing_to_reach_is_exit_code_7(laptop: Laptop) -> None:
    opened = laptop.tunnel("--json")
    code, said = opened.ends()
    assert code == 7
    assert json.loads("".join(opened.out))["exit_code"] == 7
    assert said.count("error: ") == 1, "not said twice"


def test_login_that_has_expired_is_told_and_the_job_goes_on(laptop: Laptop) -> None:
    name = laptop.serve()
    laptop.until(lambda f: f["echo"]["phase"] == "ready")
    code, said = laptop.tunnel("--login", "k7m-expired", *wish()).ends()
    assert code == 4
    assert "k7m-expired@login does not let you in" in said
    assert "--login NEWNAME" in said
    assert laptop.states()["echo"]["phase"] == "ready"
    assert laptop.left() == []
    opened = laptop.tunnel(name, "--login", "alice", *wish(), via=f"k7m-expired@{laptop.via}")
    assert laptop.ask(opened.url()).startswith("200"), "another name is enough"
    opened.ends(signal.SIGINT)


def test_login_that_expires_while_the_tunnel_is_open(laptop: Laptop) -> None:
    """The key is taken away, then the connection: no endless trying with a name that is not valid any more."""
    laptop.serve()
    key = laptop.write("key", Path("/home/alice/.ssh/id_ed25519").read_text())
    key.chmod(0o600)
    opened = laptop.tunnel(
        *wish(), env={"HPC_SSH": f"ssh -o IdentityFile={key} -o IdentitiesOnly=yes -o IdentityAgent=none"}
    )
    opened.url()
    key.unlink()
    os.kill(opened.ssh(), signal.SIGKILL)
    code, said = opened.ends()
    assert code == 4
    assert "login name may have expired" in said
    assert laptop.left() == []


def test_passphrase_is_asked_for_once(laptop: Laptop) -> None:
    """As a one-time code would be: for the question, the tunnel, and a service that has moved."""
    laptop.serve()
    key = laptop.write("key", Path("/home/alice/.ssh/id_ed25519").read_text())
    key.chmod(0o600)
    laptop.cluster.run("alice", "ssh-keygen", "-q", "-p", "-P", "", "-N", "pass word", "-f", str(key))
    asked = laptop.folder / "asked"
    laptop.write("askpass", f"#!/bin/sh\necho >>{asked}\necho 'pass word'\n").chmod(0o755)
    env = {
        "HPC_SSH": f"ssh -o IdentityFile={key} -o IdentitiesOnly=yes -o IdentityAgent=none",
        "SSH_ASKPASS": str(laptop.folder / "askpass"), "SSH_ASKPASS_REQUIRE": "force",
    }  # fmt: skip
    opened = laptop.tunnel(*wish(), env=env)
    url = opened.url()
    laptop.cluster.run("alice", "scontrol", "requeue", laptop.job())
    opened.says("is ready again", timeout=90)
    assert laptop.ask(url).startswith("200")
    assert asked.read_text() == "\n"
    opened.ends(signal.SIGINT)


def test_connection_of_the_users_own_is_used_and_left(laptop: Laptop) -> None:
    config = laptop.write(
        "ssh_config",
        f"Include /home/alice/.ssh/config\nHost *\n ControlPath {laptop.folder}/own\n ControlMaster auto\n",
    )
    ssh = ("ssh", "-F", str(config))
    with laptop.cluster.popen("alice", *ssh, "-N", "login", node="laptop", stdin=subprocess.DEVNULL) as own:
        try:
            until((laptop.folder / "own").exists, "no connection")
            laptop.serve()
            opened = laptop.tunnel(*wish(), env={"HPC_SSH": shlex.join(ssh)})
            url = opened.url()
            assert not [p for p in laptop.processes() if " -M " in p], "no connection of ours"
            assert laptop.ask(url).startswith("200")
            opened.ends(signal.SIGINT)
            assert own.poll() is None
            assert laptop.ask(url).startswith("none"), "our port is gone from it"
            opened = laptop.tunnel(*wish(), env={"HPC_SSH": shlex.join(ssh)})
            url = opened.url()
            opened.ends(signal.SIGKILL)
            until(lambda: not laptop.left(), laptop.left())
            assert own.poll() is None
            assert laptop.ask(url).startswith("none")
        finally:
            own.terminate()


@pytest.mark.parametrize("reach", ["relay", "jump"])
def test_service_on_its_nodes_loopback(laptop: Laptop, reach: str) -> None:
    site = laptop.folder / "sites" / "slurm-test.toml"
    node = "dgx02"
    laptop.write("sites/slurm-test.toml", f'{site.read_text()}reach = "{reach}"\nsbatch = {{ nodelist = "{node}" }}\n')
    if reach == "jump":
        laptop.cluster.start(f"sshd-{node}")
    try:
        laptop.serve()
        opened = laptop.tunnel(*wish())
        assert laptop.ask(opened.url()) == f"200 hello from {node}"
        code, _ = opened.ends(signal.SIGINT)
        assert code == 130
        assert laptop.left() == []
    finally:
        if reach == "jump":
            laptop.cluster.stop(f"sshd-{node}")


def test_browser_is_opened_without_the_token_in_its_argv(laptop: Laptop) -> None:
    laptop.serve()
    seen = laptop.folder / "seen"
    code = f"""#!{PYTHON}
import sys, urllib.request
url = sys.argv[1]
page = urllib.request.urlopen(url).read().decode()
open({str(seen)!r}, "w").write(url + "\\n" + page)
"""
    browser = laptop.write("browser", code)
    browser.chmod(0o755)
    opened = laptop.tunnel("--open", *wish(), env={"BROWSER": f"{browser} %s"})
    token = opened.url().partition("token=")[2]
    address, page = until(lambda: seen.exists() and len(t := seen.read_text().splitlines()) == 2 and t, "no page")
    assert page.startswith("hello from dgx")
    assert token not in address
    opened.ends(signal.SIGINT)
