"""The job's entry, with real processes: what the payload gets, and what is written of its end."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc.core import endpoint, imagelock, rundir
from hpc.core.digest import sha256
from hpc.core.rundir import AttemptDir, StageDir
from hpc.node.enter import Job, alive, process_start
from hpc.node.inplace import InPlace
from hpc.node.launch import Launch

LISTEN = """
import os, signal, sys, time
def say(text): os.write(1, text.encode())  # print breaks where a handler that prints interrupts it
def note(number, frame):
    say(f"got {{signal.Signals(number).name}}\\n")
    if number == {last}: sys.exit({code})
for number in (signal.SIGUSR2, signal.SIGTERM): signal.signal(number, note)
say("ready\\n")
while True: time.sleep(0.05)
"""

CLOCK = """
import pickle, time
from pathlib import Path
from types import SimpleNamespace
from hpc.node import enter
leap = Path({leap!r})
ahead = lambda: float(leap.read_text()) if leap.exists() else 0.0
enter.time = SimpleNamespace(time=lambda: time.time() + ahead(), sleep=time.sleep)
enter.enter(pickle.load(open({file!r}, "rb")))
"""
"""The entry of a job, by a clock that the test sets: a payload takes long to begin on a busy machine."""


def listener(last: int, code: int = 85) -> str:
    """A payload that prints every signal, and leaves at `last`."""
    return LISTEN.format(last=int(last), code=code)


def until(found: Callable[[], Any], what: str, timeout: float = 60) -> Any:
    """Ask until there is something."""
    deadline = time.monotonic() + timeout
    while not (value := found()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)
    return value


class Node:
    """One stage of one run, and `enter` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.stage = StageDir(folder / "run-1" / "second")
        self.attempt: AttemptDir = self.stage.attempt(1)
        self.attempt.path.mkdir(parents=True)
        self.processes: list[subprocess.Popen[str]] = []

    def job(self, code: str, **values: Any) -> Job:
        launch = Launch(
            kind="venv", argv=(sys.executable, "-c", code), env={"SET": "yes"}, passes=("SLURM_*", "HF_TOKEN")
        )
        usual = {"stage_dir": str(self.stage.path), "attempt": 1, "key": "k", "launch": launch, "mem_gb": 16}
        return Job(**{**usual, "heartbeat_s": 30, "limit_s": 3600, **values})

    def start(self, job: Job, **env: str) -> subprocess.Popen[str]:
        file = self.stage.path / "job.pickle"
        file.write_bytes(pickle.dumps(job))
        code = CLOCK.format(file=str(file), leap=str(self.stage.path / "leap"))
        clean = {k: v for k, v in os.environ.items() if k not in {"HF_TOKEN", "HF_HOME", "HF_TOKEN_PATH"}}
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**clean, "HOME": str(self.stage.path), "SLURM_JOB_ID": "77", **env},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def run(self, job: Job, **env: str) -> int:
        process = self.start(job, **env)
        _, self.stderr = process.communicate(timeout=60)
        return process.returncode

    def leap(self, seconds: float) -> None:
        """The entry's clock is so far ahead from now on."""
        rundir.write_text(self.stage.path / "leap", str(seconds))

    def ready(self) -> None:
        """The payload listens."""
        until(lambda: "ready" in self.stdout, "ready")

    @property
    def stdout(self) -> str:
        return self.attempt.stdout.read_text() if self.attempt.stdout.exists() else ""

    @property
    def outcome(self) -> dict[str, Any]:
        return rundir.read_json(self.attempt.outcome) or {}

    @property
    def phases(self) -> list[str]:
        return [e["phase"] for e in rundir.last_events(self.attempt.events)]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


def test_payload_that_ends_well_is_completed(node: Node) -> None:
    assert node.run(node.job("print('out')")) == 0
    assert node.stdout == "out\n"
    assert node.phases == ["starting", "done"]
    assert (node.outcome["state"], node.outcome["exit_code"], node.outcome["job_id"]) == ("COMPLETED", 0, "77")
    assert node.outcome["schema"] == "hpc.outcome/1"
    assert node.outcome["started"] <= node.outcome["ended"]


def test_exit_code_is_kept_and_passed_on(node: Node) -> None:
    assert node.run(node.job("import sys; print('bad', file=sys.stderr); sys.exit(7)")) == 7
    assert (node.outcome["state"], node.outcome["exit_code"]) == ("FAILED", 7)
    assert node.outcome["log_tail"] == ["bad"]
    assert node.phases == ["starting", "failed"]


def test_signal_of_the_payload_is_told(node: Node) -> None:
    assert node.run(node.job("import os; os.kill(os.getpid(), 11)")) == 139
    assert (node.outcome["state"], node.outcome["signal"]) == ("FAILED", "SIGSEGV")


def test_program_that_is_not_there_is_an_outcome(node: Node) -> None:
    launch = Launch(kind="sif", argv=("/none/apptainer",), env={}, passes=())
    assert node.run(node.job("", launch=launch)) == 1
    assert node.outcome["cause"].startswith("/none/apptainer could not be started on this node: No such file")


def test_payload_sees_only_the_listed_environment(node: Node) -> None:
    node.run(node.job("import json, os; print(json.dumps(dict(os.environ)))"), MY_OWN="1", PYTHONPATH=os.getcwd())
    env = json.loads(node.stdout)
    assert (env["SET"], env["SLURM_JOB_ID"]) == ("yes", "77")
    assert not {"MY_OWN", "PYTHONPATH"} & set(env)


def test_payload_reads_no_input(node: Node) -> None:
    node.run(node.job("import sys; print(repr(sys.stdin.read()))"))
    assert node.stdout == "''\n"


def test_what_was_started_is_written_down(node: Node) -> None:
    job = node.job("pass")
    node.run(job, HF_TOKEN="hf_secret")
    written = rundir.read_json(node.attempt.launch)
    assert written is not None
    assert written["argv"] == list(job.launch.argv)
    assert written["env"]["HF_TOKEN"] == "(not shown)"


@pytest.mark.parametrize("place", ["default", "HF_HOME", "HF_TOKEN_PATH"])
def test_token_file_of_the_hub_reaches_the_payload_and_no_file(node: Node, tmp_path: Path, place: str) -> None:
    token, env = {
        "default": (node.stage.path / ".cache/huggingface/token", {}),
        "HF_HOME": (tmp_path / "hf" / "token", {"HF_HOME": str(tmp_path / "hf")}),
        "HF_TOKEN_PATH": (tmp_path / "my-token", {"HF_TOKEN_PATH": str(tmp_path / "my-token")}),
    }[place]
    token.parent.mkdir(parents=True, exist_ok=True)
    token.write_text("hf_secret\n")
    code = "import hashlib, os; print(hashlib.sha256(os.environ['HF_TOKEN'].encode()).hexdigest())"
    assert node.run(node.job(code), **env) == 0
    assert node.stdout.strip() == hashlib.sha256(b"hf_secret").hexdigest()
    written = [p for p in node.attempt.path.rglob("*") if p.is_file() and b"hf_secret" in p.read_bytes()]
    assert written == []


# ---- signals


def test_usr2_reaches_the_payload_once(node: Node) -> None:
    process = node.start(node.job(listener(signal.SIGTERM)))
    node.ready()
    for _ in range(3):
        process.send_signal(signal.SIGUSR2)
        until(lambda: "got SIGUSR2" in node.stdout, "USR2")
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert node.stdout.split() == ["ready", "got", "SIGUSR2", "got", "SIGTERM"]


def test_preempted_stage_that_saves_can_be_resumed(node: Node) -> None:
    process = node.start(node.job(listener(signal.SIGUSR2)))
    node.ready()
    process.send_signal(signal.SIGUSR2)
    assert process.wait(60) == 85
    assert (node.outcome["state"], node.outcome["resumable"]) == ("PREEMPTED", True)
    assert node.outcome["cause"].endswith("and its work was saved")


def test_term_leaves_an_outcome_before_the_kill_that_follows(node: Node) -> None:
    process = node.start(node.job(listener(last=0)))
    node.ready()
    process.send_signal(signal.SIGTERM)
    until(lambda: node.outcome, "a provisional outcome")
    process.kill()
    process.wait(60)
    assert node.outcome["state"] == "CANCELLED"


def test_term_after_hpc_cancel_is_known_as_asked_for(node: Node) -> None:
    node.attempt.stop.write_text("{}")
    process = node.start(node.job(listener(last=0)))
    node.ready()
    process.send_signal(signal.SIGTERM)
    until(lambda: node.outcome, "a provisional outcome")
    assert node.outcome["cause"] == "cancelled by hpc cancel"


def test_cancelled_service_leaves_no_token_however_slowly_it_ends(node: Node) -> None:
    process = node.start(node.job(listener(last=0)))
    node.ready()
    where = endpoint.Endpoint(
        host="n", bound="0.0.0.0", ports={"http": 1}, path="/", health="/h", job_id="77", pid=1, ready=1.0
    )
    endpoint.write(node.stage, where, "secret")
    node.attempt.stop.write_text("{}")
    process.send_signal(signal.SIGTERM)
    until(lambda: not node.stage.token.exists(), "the token is gone")
    assert process.poll() is None  # the payload is still at work
    assert not node.stage.endpoint.exists()


def test_better_end_overwrites_the_provisional_outcome(node: Node) -> None:
    process = node.start(node.job(listener(signal.SIGTERM, code=0)))
    node.ready()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert node.outcome["state"] == "COMPLETED"


def test_interrupt_is_a_request_to_end(node: Node) -> None:
    process = node.start(node.job(listener(signal.SIGTERM)))
    node.ready()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 85
    assert "got SIGTERM" in node.stdout


def test_signals_go_to_the_thread_that_acts_on_them(node: Node) -> None:
    """CONT and TERM together: the kernel may give the second one to another thread, if that one takes it."""
    process = node.start(node.job(listener(signal.SIGTERM)))
    until(node.attempt.heartbeat.exists, "the heartbeat's thread")
    threads = [t for t in Path(f"/proc/{process.pid}/task").iterdir() if t.name != str(process.pid)]
    assert threads
    for thread in threads:
        blocked = int((thread / "status").read_text().partition("SigBlk:")[2].split()[0], 16)
        heard = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGCONT)
        assert [n.name for n in heard if not blocked >> (n - 1) & 1] == []


def test_cont_changes_nothing(node: Node) -> None:
    process = node.start(node.job(listener(signal.SIGTERM)))
    node.ready()
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert "SIGCONT" not in node.stdout
    assert node.outcome["state"] == "CANCELLED"


def test_payload_ends_with_the_entry_even_by_kill(node: Node) -> None:
    process = node.start(node.job("import os, time; print('ready', os.getpid(), flush=True); time.sleep(600)"))
    node.ready()
    payload = int(node.stdout.split()[1])
    assert process_start(payload)
    process.kill()
    process.wait(60)
    until(lambda: process_start(payload) is None, "the payload's end")


# ---- the time limit, where no scheduler enforces it


def test_limit_is_warned_of_and_then_enforced(node: Node) -> None:
    process = node.start(node.job(listener(signal.SIGTERM), limit_s=200, signal_delay_s=100, enforce=True))
    node.ready()
    time.sleep(0.5)  # two looks of the entry
    assert node.stdout.split() == ["ready"]
    node.leap(101)
    until(lambda: "got SIGUSR2" in node.stdout, "the warning")
    time.sleep(0.5)
    assert process.poll() is None
    node.leap(201)
    assert process.wait(60) == 85
    assert node.stdout.split() == ["ready", "got", "SIGUSR2", "got", "SIGTERM"]
    assert (node.outcome["state"], node.outcome["resumable"]) == ("TIMEOUT", True)
    assert 200 <= node.outcome["ended"] - node.outcome["started"] < 300


def test_payload_that_does_not_listen_is_killed_at_the_limit(node: Node) -> None:
    deaf = (
        "import signal, time\n"
        "for number in (signal.SIGUSR2, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    process = node.start(node.job(deaf, limit_s=100, signal_delay_s=0, enforce=True))
    node.ready()
    node.leap(101)
    until(lambda: node.outcome, "SIGTERM")  # it leaves a provisional outcome
    assert process.poll() is None
    node.leap(200)
    assert process.wait(60) == 137
    assert (node.outcome["state"], node.outcome["signal"]) == ("TIMEOUT", "SIGKILL")


def test_limit_is_left_to_the_scheduler_where_there_is_one(node: Node) -> None:
    assert node.run(node.job("import time; time.sleep(1.5)", limit_s=1, signal_delay_s=0)) == 0
    assert node.outcome["state"] == "COMPLETED"


# ---- the heartbeat


def test_heart_beats_while_the_payload_runs_and_stops_with_it(node: Node) -> None:
    process = node.start(node.job(listener(signal.SIGTERM), heartbeat_s=1))
    until(node.attempt.heartbeat.exists, "a first beat")
    first = node.attempt.heartbeat.stat().st_mtime_ns
    until(lambda: node.attempt.heartbeat.stat().st_mtime_ns > first, "a second beat")
    node.ready()
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert node.attempt.heartbeat.stat().st_mtime <= node.outcome["ended"] + 0.1


# ---- waiting for inputs


@pytest.fixture
def first(node: Node) -> StageDir:
    """The stage before: submitted, and at work in this very process."""
    stage = StageDir(node.stage.path.parent / "first")
    stage.attempt(1).path.mkdir(parents=True)
    process = {"pid": os.getpid(), "start": process_start(os.getpid())}
    rundir.write_json(stage.job, {"attempt": 1})
    rundir.write_json(stage.attempt(1).process, process)
    return stage


def waits(node: Node, first: StageDir) -> Job:
    return replace(node.job("print('ran')"), waits=((str(first.path), "k1"),))


def test_waits_until_the_input_has_its_manifest(node: Node, first: StageDir) -> None:
    process = node.start(waits(node, first))
    until(lambda: node.phases == ["starting"], "starting")
    rundir.write_json(first.manifest, {"key": "another"})
    time.sleep(0.5)  # two looks of the entry: it must not take the other key
    assert process.poll() is None
    assert node.stdout == ""
    rundir.write_json(first.manifest, {"key": "k1"})
    assert process.wait(60) == 0
    assert node.stdout == "ran\n"


def test_time_limit_does_not_count_the_waiting(node: Node, first: StageDir) -> None:
    process = node.start(replace(waits(node, first), limit_s=100, signal_delay_s=0, enforce=True))
    until(lambda: node.phases == ["starting"], "starting")
    node.leap(200)
    rundir.write_json(first.manifest, {"key": "k1"})
    assert process.wait(60) == 0
    assert node.stdout == "ran\n"


@pytest.mark.parametrize("state", ["FAILED", "TIMEOUT", "CANCELLED"])
def test_input_that_ended_badly_cancels(node: Node, first: StageDir, state: str) -> None:
    rundir.write_json(first.attempt(1).outcome, {"state": state})
    assert node.run(waits(node, first)) == 1
    assert (node.outcome["state"], node.stdout) == ("CANCELLED", "")
    assert node.outcome["cause"] == f"its input stage first did not complete ({state})"


def test_input_that_was_cancelled_before_it_began_cancels(node: Node, first: StageDir) -> None:
    rundir.write_json(first.attempt(1).stop, {})
    node.run(waits(node, first))
    assert node.outcome["cause"] == "its input stage first did not complete (CANCELLED)"


def test_input_whose_process_is_gone_cancels(node: Node, first: StageDir) -> None:
    rundir.write_json(first.job, {"attempt": 1})
    rundir.write_json(first.attempt(1).process, {"pid": os.getpid(), "start": "another"})
    node.run(waits(node, first))
    assert node.outcome["cause"] == "its input stage first did not complete (LOST)"


def test_input_of_another_machine_is_waited_for_while_its_heart_beats(node: Node, first: StageDir) -> None:
    elsewhere = {"pid": os.getpid(), "start": "another", "host": "login2", "heartbeat_s": 30}
    rundir.write_json(first.attempt(1).process, elsewhere)
    process = node.start(waits(node, first))
    until(node.attempt.heartbeat.exists, "a beat of the one that waits")
    time.sleep(0.5)  # two looks of the entry
    assert process.poll() is None
    os.utime(first.attempt(1).process, (time.time() - 200,) * 2)
    assert process.wait(60) == 1
    assert node.outcome["cause"] == "its input stage first did not complete (LOST)"


def test_input_that_was_never_submitted_cancels(node: Node, first: StageDir) -> None:
    first.job.unlink()
    node.run(waits(node, first))
    assert node.outcome["cause"] == "its input stage first did not complete (NEVER SUBMITTED)"


def test_term_while_waiting_is_cancelled(node: Node, first: StageDir) -> None:
    process = node.start(waits(node, first))
    until(lambda: node.phases == ["starting"], "starting")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert (node.outcome["state"], node.outcome["cause"]) == ("CANCELLED", "cancelled before it began")


# ---- requeued by Slurm


def test_requeued_job_keeps_the_earlier_outcomes(node: Node) -> None:
    for code in (3, 4):
        node.run(node.job(f"raise SystemExit({code})"))
    node.run(node.job("pass"))
    kept = [json.loads((node.attempt.path / f"outcome-{n}.json").read_text())["exit_code"] for n in (0, 1)]
    assert kept == [3, 4]
    assert node.outcome["state"] == "COMPLETED"


def test_requeued_job_forgets_the_earlier_error(node: Node) -> None:
    rundir.write_json(node.attempt.error, {"cause": "old", "hint": ""})
    node.run(node.job("raise SystemExit(9)"))
    assert node.outcome["cause"] == "the stage ended with exit code 9"


def test_requeued_job_appends_to_the_logs(node: Node) -> None:
    node.run(node.job("print('one')"))
    node.run(node.job("print('two')"))
    assert node.stdout == "one\ntwo\n"


# ---- which process is which


def test_process_is_known_by_number_and_start() -> None:
    start = process_start(os.getpid())
    assert start is not None
    assert alive(os.getpid(), start)
    assert not alive(os.getpid(), "1")


def test_ended_process_is_not_alive_even_before_it_is_reaped() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    until(lambda: process_start(process.pid) is None, "a zombie counts as ended")
    process.wait()


def test_name_with_blanks_and_brackets_is_read(tmp_path: Path) -> None:
    odd = tmp_path / "a ) b"
    odd.symlink_to("/bin/sleep")
    process = subprocess.Popen([odd, "60"])
    try:
        until(lambda: process_start(process.pid) is not None, "a start time")
        assert (process_start(process.pid) or "").isdigit()
    finally:
        process.kill()
        process.wait()


def test_signal_that_comes_while_the_end_is_written_changes_nothing(node: Node) -> None:
    """On a slow file system the outcome takes a while to be on the disk, and the time limit may come then."""
    file = node.stage.path / "job.pickle"
    file.write_bytes(pickle.dumps(node.job("pass")))
    code = (
        "import os, pickle, signal\nreal = os.fsync\n"
        "def slow(descriptor):\n    os.kill(os.getpid(), signal.SIGTERM)\n    real(descriptor)\n"
        "os.fsync = slow\nfrom hpc.node.enter import enter\n"
        f"enter(pickle.load(open({str(file)!r}, 'rb')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert node.outcome["state"] == "COMPLETED"


# ---- the image


def test_image_that_changed_since_it_was_planned_with_never_runs(node: Node, tmp_path: Path) -> None:
    image = tmp_path / "train.sif"
    image.write_bytes(b"an image")
    planned = InPlace(path=str(image), sha256=sha256(image), stat=imagelock.look(image))
    image.write_bytes(b"an imagE")
    assert node.run(node.job("print('it ran')", image=planned)) == 6
    assert (node.outcome["state"], node.outcome["exit_code"]) == ("FAILED", 6)
    assert planned.sha256 in node.outcome["cause"]
    assert sha256(image) in node.outcome["cause"]
    assert not node.attempt.launch.exists()
    assert node.phases == ["starting", "checking", "failed"]


def test_image_that_is_what_was_planned_with_runs(node: Node, tmp_path: Path) -> None:
    image = tmp_path / "train.sif"
    image.write_bytes(b"an image")
    planned = InPlace(path=str(image), sha256=sha256(image), stat=imagelock.look(image))
    assert node.run(node.job("print('it ran')", image=planned)) == 0
    assert "checking" not in node.phases


# ---- the token of a service


def serving(node: Node, last: int = signal.SIGTERM, code: int = 85) -> str:
    """A payload that has announced itself, and leaves at that signal."""
    words = f"""
from pathlib import Path
from hpc.core import endpoint
from hpc.core.rundir import StageDir
folder = StageDir(Path({str(node.stage.path)!r}))
where = endpoint.Endpoint(
    host="n", bound="", ports={{"http": 1}}, path="/", health="/", job_id="77", pid=1, ready=0)
endpoint.write(folder, where, endpoint.token_of(folder))
"""
    return words + listener(last, code)


def ends(node: Node, *numbers: int, **values: Any) -> str | None:
    """One start that gets these signals; the token that is left, None where none is."""
    process = node.start(node.job(serving(node), **values), PYTHONPATH=os.pathsep.join(sys.path))
    until(lambda: endpoint.read(node.stage), "announced")
    for number in numbers:
        process.send_signal(number)
    process.communicate(timeout=60)
    assert endpoint.read(node.stage) is None
    return node.stage.token.read_text() if node.stage.token.exists() else None


def test_token_stays_for_the_same_job_and_no_other(node: Node) -> None:
    first = ends(node, signal.SIGTERM)
    assert first
    assert ends(node, signal.SIGTERM) == first, "requeued: the same attempt starts again"
    node.stage.attempt(2).path.mkdir()
    assert ends(node, signal.SIGTERM, attempt=2) not in (None, first)


def test_token_goes_where_the_end_is_known_to_be_the_last(node: Node) -> None:
    assert ends(node, signal.SIGTERM, limit_s=1) is None, "the time limit"
    rundir.write_json(node.attempt.stop, {})
    assert ends(node, signal.SIGTERM) is None, "hpc cancel"


def test_token_goes_where_no_scheduler_could_start_it_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "5")
    assert ends(node, signal.SIGTERM) is None
