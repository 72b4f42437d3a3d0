"""`hpc tunnel` with a real service on this machine: it waits, prints what works, and says why where it never will."""

from __future__ import annotations

import json
import os
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc.core import endpoint, rundir
from hpc.core.errors import NotFound, NotReady, UsageError
from hpc.core.rundir import RunDir
from hpc.login import private, ready, states, tunnel
from hpc.login.asking import Answer
from hpc.login.ready import Service
from tests.login.test_local import Local, packages  # noqa: F401
from tests.login.test_states import World, world  # noqa: F401
from tests.support import echoing


@pytest.fixture
def local(tmp_path: Path, packages: Path) -> Iterator[Local]:  # noqa: F811
    made = Local(tmp_path, packages)
    echoing.write(packages / "stages")
    yield made
    made.end()


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


# ---- the whole verb


def test_it_waits_and_then_prints_what_works(local: Local) -> None:
    local.hpc("submit", "echo", "--set", "echo.delay=2")
    said = local.hpc("tunnel", env={"XDG_STATE_HOME": str(local.folder / "state")})
    assert "echo-1/echo: starting on " in said.stderr
    found = local.json("tunnel", "echo")
    assert (found["schema"], found["run"], found["stage"], found["reach"]) == (
        "hpc.tunnel/1",
        "echo-1",
        "echo",
        "direct",
    )
    (port,) = found["ports"].values()
    assert f"ssh -N -L localhost:9999:localhost:{port} {os.uname().nodename} -l " in said.stdout
    here = next(line.split()[-1] for line in said.stdout.splitlines() if " itself: " in line)
    assert status(here) == 200
    assert status(here.replace(found["token"], "guessed")) == 403
    local.hpc("cancel")


def test_steps_are_shown_where_they_cannot_be_kept(local: Local) -> None:
    local.hpc("submit", "echo", "--wait")
    env = {"XDG_STATE_HOME": str(local.folder / "hpc.toml")}
    said = local.hpc("tunnel", env=env)
    assert "ssh -N -L localhost:9999:" in said.stdout
    assert "not kept for later: " in said.stderr
    assert json.loads(local.hpc("tunnel", "--json", env=env).stdout)["schema"] == "hpc.tunnel/1"


def test_file_of_the_steps_is_private_and_has_no_login_name(local: Local) -> None:
    local.hpc("submit", "echo", "--wait")
    state = local.folder / "state"
    for name, login in (("klm-v5xx45", "LOGIN"), ("", None)):
        said = local.hpc("tunnel", *(["--login", name] if name else []), env={"XDG_STATE_HOME": str(state)})
        (kept,) = (state / "hpc").glob("tunnel-echo-1-echo-*.txt")
        assert f" -l {name}" in said.stdout
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
        if login:
            assert kept.read_text() == said.stdout.replace(name, login)
        else:
            assert kept.read_text() == said.stdout
        assert str(kept) in said.stderr
    local.hpc("cancel")  # no file goes while they are read
    everything = [
        p.read_text(errors="replace") for p in local.folder.rglob("*") if p.is_file() and "venv" not in p.parts
    ]
    assert not any("klm-v5xx45" in text for text in everything)


def test_two_projects_whose_runs_have_one_name_have_a_file_each(local: Local) -> None:
    state = local.folder / "state"
    texts = set()
    for runs in ("runs", "others"):
        env = {"XDG_STATE_HOME": str(state), "HPC_RUNS": str(local.folder / runs)}
        local.hpc("submit", "echo", "--wait", env=env)
        texts.add(local.hpc("tunnel", env=env).stdout)
    assert len(texts) == 2
    assert {path.read_text() for path in (state / "hpc").glob("tunnel-echo-1-echo-*.txt")} == texts
    for runs in ("runs", "others"):
        local.hpc("cancel", env={"HPC_RUNS": str(local.folder / runs)})


def test_name_from_the_environment(local: Local) -> None:
    local.hpc("submit", "echo", "--wait")
    found = json.loads(local.hpc("tunnel", "--json", env={"HPC_LOGIN": "one-time"}).stdout)
    assert found["login"] == "one-time"
    local.hpc("cancel")


def test_dead_at_the_start_is_5_with_its_last_lines(local: Local) -> None:
    local.hpc("submit", "echo", "--set", "echo.lives=-1")
    begin = time.monotonic()
    said = local.hpc("tunnel", code=5)
    assert time.monotonic() - begin < 15
    assert "echo-1/echo has ended: FAILED (the service ended before it answered: exit code 1)" in said.stderr
    assert "  | the model file is broken" in said.stderr
    assert "hpc submit echo starts it again; hpc logs echo-1/echo" in said.stderr


def test_no_wait_is_5_with_the_phase(local: Local) -> None:
    local.hpc("submit", "echo", "--set", "echo.delay=60")
    local.running("echo-1/echo")
    said = local.hpc("tunnel", "--no-wait", "--json", code=5)
    document = json.loads(said.stdout)
    assert document["exit_code"] == 5
    assert document["error"].startswith("echo-1/echo does not answer yet: starting on ")
    local.hpc("cancel")
    said = local.hpc("tunnel", code=5)
    assert "has ended: CANCELLED" in said.stderr


def test_explain_names_the_live_state(local: Local) -> None:
    local.hpc("submit", "echo", "--wait")
    said = local.hpc(
        "tunnel",
        "--explain",
        "ssh -L 9999:elsewhere:1234 x\nchannel 3: open failed: connect failed: Connection refused",
    )
    assert "the command leads to elsewhere:1234, and the service is on " in said.stdout
    assert "asked from this machine, it answers" in said.stdout
    local.hpc("cancel")
    said = local.hpc("tunnel", "--explain", "channel 3: open failed: connect failed: Connection refused")
    assert "echo-1/echo is over: CANCELLED" in said.stdout


def test_what_is_not_there_or_no_service(local: Local) -> None:
    assert "you have no service" in local.hpc("tunnel", code=7).stderr
    assert "there is no run 'none-1'" in local.hpc("tunnel", "none-1", code=7).stderr
    local.hpc("submit", "first", "--wait")
    assert "first-1 has no service" in local.hpc("tunnel", "first-1", code=7).stderr
    local.hpc("submit", "echo", "--set", "echo.delay=60")
    assert "--local-port 80: not a port" in local.hpc("tunnel", "--local-port", "80", code=2).stderr
    assert "--login '-x' is no name" in local.hpc("tunnel", "--login=-x", code=2).stderr
    local.hpc("cancel")


# ---- choosing


def services(world: World, *shown: tuple[str, str]) -> list[tuple[RunDir, dict[str, Any]]]:  # noqa: F811
    """Runs with one service each, the newest first; squeue has them in these states, "" not at all."""
    for number, (name, state) in enumerate(shown, 1):
        run = world.run(name, "lab")
        world.job(run, "lab", job_id=str(number), comment=name)
        rundir.write_json(run.stage("lab").config, {"bind": "0.0.0.0"})
        if state:
            world.shows(state, str(number), comment=name)
    return list(world.runs.runs())


@pytest.fixture
def slurm(world: World, monkeypatch: pytest.MonkeyPatch) -> World:  # noqa: F811
    """The world answers for Slurm wherever the tunnel asks."""
    monkeypatch.setattr(tunnel, "Scheduler", lambda: states.Scheduler(user="alice", call=world))
    monkeypatch.setattr(ready, "Scheduler", lambda: states.Scheduler(user="alice", call=world))
    return world


def test_latest_service_that_is_at_work_is_meant(slurm: World) -> None:
    runs = services(slurm, ("lab-1", "RUNNING"), ("lab-2", "PENDING"), ("lab-3", "FAILED"))
    assert tunnel.choose(runs, None).what == "lab-2/lab"
    assert tunnel.choose(runs[:1], None).what == "lab-3/lab"
    assert slurm.asked == ["squeue"]
    with pytest.raises(NotFound):
        tunnel.choose(runs, "other")


def test_run_with_several_services_wants_one_named(slurm: World) -> None:
    run = slurm.run("both-1", "lab", "serve")
    for number, name in enumerate(("lab", "serve"), 1):
        slurm.job(run, name, job_id=str(number), comment=name)
        rundir.write_json(run.stage(name).config, {"bind": "0.0.0.0"})
        slurm.shows("RUNNING", str(number), comment=name)
    with pytest.raises(UsageError, match="several services: lab, serve"):
        tunnel.choose(list(slurm.runs.runs()), None)
    assert tunnel.choose(list(slurm.runs.runs()), "serve").what == "both-1/serve"


# ---- waiting


class Waiting:
    """One service, waited for; `then` runs at each look."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
        self.world = world
        ((run, asked),) = services(world, ("lab-1", "RUNNING"))
        self.service = Service(run, asked, "lab")
        self.attempt = run.stage("lab").attempt(1)
        self.said: list[str] = []
        self.then: list[Any] = []
        self.now = 0.0
        monkeypatch.setattr(ready.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(ready.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.then:
            self.then.pop(0)()

    def announce(self, bound: str = "0.0.0.0") -> None:
        found = endpoint.Endpoint(
            host="dgx06", bound=bound, ports={"http": 9250}, path="/", health="/h", job_id="1", pid=1, ready=1.0
        )
        rundir.append_event(self.attempt.events, "ready")
        endpoint.write(self.service.run.stage("lab"), found, "s3cret")

    def wait(self, answer: Answer | None = None, **options: Any) -> tuple[endpoint.Endpoint, str]:
        return ready.until_ready(self.service, lambda *_: answer or Answer(True, ""), self.said.append, **options)


@pytest.fixture
def waiting(slurm: World, monkeypatch: pytest.MonkeyPatch) -> Waiting:
    return Waiting(slurm, monkeypatch)


def test_slurm_is_asked_seldom_while_nothing_changes(waiting: Waiting) -> None:
    waiting.then = [lambda: None] * 590 + [waiting.announce]
    assert waiting.wait()[1] == "s3cret"
    assert 50 < waiting.now < 70
    assert len(waiting.world.asked) <= 7


def test_announcement_is_seen_at_the_next_look(waiting: Waiting) -> None:
    waiting.then = [lambda: None] * 30 + [waiting.announce]
    waiting.wait()
    assert waiting.now == pytest.approx(3.1)


def test_phases_are_told(waiting: Waiting) -> None:
    waiting.world.queue.clear()
    waiting.world.shows("PENDING", "1", reason="QOSGrpGRES", comment="lab-1")

    def start() -> None:
        waiting.world.queue.clear()
        waiting.world.shows("RUNNING", "1", comment="lab-1")
        rundir.append_event(waiting.attempt.events, "starting", host="dgx06")

    def stage() -> None:
        rundir.append_event(waiting.attempt.events, "staging", done=62, total=100, message="1.2 GB/s")

    def run() -> None:
        rundir.append_event(waiting.attempt.events, "running", message="")

    pause = [lambda: None] * 8
    waiting.then = [*pause, start, *pause, stage, *pause, run, *pause, waiting.announce]
    waiting.wait()
    told = list(dict.fromkeys(line.partition("  (")[0] for line in waiting.said))
    assert told == [
        "lab-1/lab: queued: your qos has no GPUs left",
        "lab-1/lab: starting on dgx01",
        "lab-1/lab: staging 62%  1.2 GB/s",
    ]
    assert waiting.said[-1].startswith("lab-1/lab: starting on dgx01  (")


def test_end_is_told_within_seconds(waiting: Waiting) -> None:
    def end() -> None:
        waiting.world.queue.clear()
        waiting.world.shows("FAILED", "1", comment="lab-1")
        rundir.write_json(
            waiting.attempt.outcome,
            {"state": "FAILED", "cause": "exit code 1", "started": 1, "ended": 2},
        )

    waiting.then = [lambda: None] * 20 + [end]
    with pytest.raises(NotReady, match=r"lab-1/lab has ended: FAILED \(exit code 1\)"):
        waiting.wait()
    assert waiting.now < 4
    waiting.attempt.stdout.write_text("a\nb\n")
    waiting.attempt.stderr.write_text("bad\n")
    assert waiting.service.last_lines() == ["a", "b", "bad"]


def test_cancelled_while_it_waits_in_the_queue_is_seen_by_slurm_alone(waiting: Waiting) -> None:
    waiting.world.queue.clear()
    waiting.world.shows("PENDING", "1", comment="lab-1")

    def cancel() -> None:
        waiting.world.queue.clear()
        waiting.world.shows("CANCELLED", "1", comment="lab-1")

    waiting.then = [lambda: None] * 20 + [cancel]
    with pytest.raises(NotReady, match="has ended: CANCELLED"):
        waiting.wait()
    assert waiting.now < 15


def test_announced_but_not_reached_is_told_with_what_to_do(waiting: Waiting) -> None:
    waiting.announce()
    with pytest.raises(NotReady, match="serves on dgx06:9250, but from this machine it gives no answer") as caught:
        waiting.wait(Answer(False, "gives no answer"))
    assert "hpc doctor" in caught.value.hint
    assert 9 < waiting.now < 15
    waiting.announce(bound="127.0.0.1")
    with pytest.raises(NotReady) as caught:
        waiting.wait(Answer(False, "refuses"), wait=False)
    assert "loopback alone" in caught.value.hint


def test_nobody_is_told_before_it_answers(waiting: Waiting) -> None:
    answers = [Answer(False, "refuses")] * 3 + [Answer(True, "")]
    waiting.announce()
    ready.until_ready(waiting.service, lambda *_: answers.pop(0), waiting.said.append)
    assert answers == []
    assert waiting.now > 3


# ---- small things


def test_lines_without_a_terminal_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    out = io.StringIO()
    with ready.line(out) as say:
        for share in range(100):
            say(f"x/y: staging {share}%  1.0 GB/s  (0:{share:02})")
        say("x/y: starting on dgx01  (1:41)")
    assert out.getvalue() == "x/y: staging 0%  1.0 GB/s  (0:00)\nx/y: starting on dgx01  (1:41)\n"


def test_folder_of_another_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = private.write("x", "secret")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setattr(private.os, "getuid", lambda: 12345)
    with pytest.raises(UsageError):
        private.folder()
