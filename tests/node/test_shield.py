"""The shield, with real processes: what it keeps from a helper, and that no helper is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.node import shield
from hpc.node.enter import process_start

from .test_enter import until


class Container:
    """A process with children, as Apptainer's is: one called like a FUSE helper, and another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.helper_program = folder / "squashfuse_ll"
        shutil.copy("/bin/sleep", self.helper_program)
        script = f"{self.helper_program} 600 & echo $!; sleep 600 & echo $!; wait; exit 3"
        self.process = subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.helper, self.other = (int(self.process.stdout.readline()) for _ in range(2))
        until(lambda: Path(f"/proc/{self.helper}/comm").read_text() == "squashfuse_ll\n", "the helper")

    def tracer(self) -> int:
        return int(Path(f"/proc/{self.helper}/status").read_text().partition("TracerPid:")[2].split()[0])

    def state(self) -> str:
        return Path(f"/proc/{self.helper}/stat").read_text().rpartition(")")[2].split()[0]


def gone(pid: int) -> bool:
    return process_start(pid) is None


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    made = Container(tmp_path)
    yield made
    for pid in (made.helper, made.other):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    made.process.kill()
    made.process.communicate()


def test_helper_is_found_by_its_parent_and_name(container: Container) -> None:
    assert shield.helpers(container.process.pid) == {container.helper}
    assert shield.helpers(os.getpid()) == set(), "a helper of another container is not ours"
    assert shield.helpers(2**22 + 1) == set()


@pytest.mark.parametrize("number", sorted(shield.SHIELDED))
def test_helper_outlives_the_schedulers_signals(container: Container, number: signal.Signals) -> None:
    with shield.shielded(container.process.pid):
        until(container.tracer, "a tracer")
        for _ in range(3):
            os.kill(container.helper, number)
            time.sleep(0.02)
        assert not gone(container.helper)
    until(lambda: gone(container.helper), "the helper's end with the block")
    assert not gone(container.other), "the payload is not the shield's"


def test_other_signals_still_reach_it(container: Container) -> None:
    with shield.shielded(container.process.pid):
        until(container.tracer, "a tracer")
        os.kill(container.helper, signal.SIGALRM)
        until(lambda: gone(container.helper), "the helper's end")
        os.kill(container.other, signal.SIGKILL)
        assert container.process.wait(10) == 3, "its parent hears of the end"


def test_suspended_helper_stays_so_until_it_is_resumed(container: Container) -> None:
    with shield.shielded(container.process.pid):
        until(container.tracer, "a tracer")
        os.kill(container.helper, signal.SIGSTOP)
        until(lambda: container.state() in "tT", "a stop")
        time.sleep(0.1)
        assert container.state() in "tT"
        os.kill(container.helper, signal.SIGCONT)
        until(lambda: container.state() == "S", "going on")


def test_helper_that_the_container_left_behind_is_ended(container: Container) -> None:
    with shield.shielded(container.process.pid):
        until(container.tracer, "a tracer")
        container.process.kill()
        container.process.wait()
        assert not gone(container.helper)
    until(lambda: gone(container.helper), "the helper's end")


def test_helper_ends_with_a_tracer_that_is_killed(container: Container) -> None:
    code = (
        "import sys, time\nfrom hpc.node.shield import shielded\n"
        f"with shielded({container.process.pid}): time.sleep(600)"
    )
    tracer = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: container.tracer() != 0, "a tracer")
    tracer.kill()
    tracer.wait()
    until(lambda: gone(container.helper), "the helper's end")


def test_where_tracing_is_not_allowed_the_reason_is_told(container: Container) -> None:
    reasons: list[str] = []
    with shield.shielded(container.process.pid):
        until(container.tracer, "a tracer")
        with shield.shielded(container.process.pid, reasons.append):  # only one can trace
            until(lambda: reasons, "a reason")
    assert reasons == ["Operation not permitted"]


def test_container_that_ends_at_once_is_no_trouble() -> None:
    process = subprocess.Popen(["/bin/true"])
    with shield.shielded(process.pid):
        process.wait()


def test_threads_of_the_shield_take_no_signal(container: Container) -> None:
    before = set(Path("/proc/self/task").iterdir())
    with shield.shielded(container.process.pid):
        until(container.tracer, "a tracer")
        threads = set(Path("/proc/self/task").iterdir()) - before
        assert threads
        for task in threads:
            blocked = int((task / "status").read_text().partition("SigBlk:")[2].split()[0], 16)
            assert blocked >> (signal.SIGUSR2 - 1) & 1
