"""Triton's command, the words for its log, and an end that leaves no process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.core.errors import HpcError
from hpc.inside import hints, triton

PORTS = {"http": 1, "grpc": 2, "metrics": 3}


def test_one_rank_on_loopback_alone() -> None:
    assert triton.argv(Path("/r"), PORTS, "p_") == [
        "tritonserver", "--model-repository=/r", "--http-address=127.0.0.1", "--http-port=1",
        "--grpc-address=127.0.0.1", "--grpc-port=2", "--metrics-address=127.0.0.1", "--metrics-port=3",
        "--disable-auto-complete-config",
        "--exit-timeout-secs=10", "--backend-config=python,shm-region-prefix-name=p_rank0_",
    ]  # fmt: skip


def test_ranks_of_one_node_start_by_mpirun_and_only_the_first_answers() -> None:
    words = triton.argv(Path("/r"), PORTS, "p_", world=4)
    text = " ".join(words)
    assert words[:3] == ["mpirun", "--allow-run-as-root", "--oversubscribe"]
    ranks = [part.split() for part in text.partition("--oversubscribe ")[2].split(" : ")]
    assert len(ranks) == 4
    assert all(rank[:6] == ["-n", "1", sys.executable, "-m", "hpc.inside.deaf", "tritonserver"] for rank in ranks)
    assert [any("http-port" in word for word in rank) for rank in ranks] == [True, False, False, False]
    assert ["--load-model=tensorrt_llm" in rank for rank in ranks] == [False, True, True, True]
    assert len({rank[-1] for rank in ranks}) == 4


def test_ranks_that_slurm_has_started_each_have_their_own_command() -> None:
    first = triton.of_rank(Path("/r"), PORTS, "p_", 0, wrapped=False)
    assert first == triton.argv(Path("/r"), PORTS, "p_")
    third = triton.of_rank(Path("/r"), PORTS, "q_", 3, wrapped=False)
    assert {"--allow-http=false", "--allow-grpc=false", "--allow-metrics=false", "--load-model=tensorrt_llm"} < set(
        third
    )
    assert third[-1].endswith("=q_rank3_")
    assert not [word for word in third if "-port" in word]
    wrapped = [triton.of_rank(Path("/r"), PORTS, "p_", rank, wrapped=True) for rank in (0, 3)]
    assert [words[:2] for words in wrapped] == [["trtllm-llmapi-launch", "tritonserver"]] * 2
    assert all("--http-port=1" in words for words in wrapped)  # the launcher starts it on the first one alone


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[ERROR] The application appears to have been direct launched; OMPI was not built with SLURM's PMI", "MPI"),
        ("Assertion failed: mpiSize == tp * pp (1 != 2)", "another number of GPUs"),
        ("Error Code 1: Version tag does not match. Current Version: 228, Serialized Engine Version: 237", "again"),
        ("Error Code 6: expecting compute 9.0 got compute 8.9", "another type of GPU"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", "kv_cache_free_gpu_mem_fraction"),
        ("[TensorRT-LLM][ERROR] maxTokensInPagedKvCache must be large enough for 1 sequence", "kv_cache"),
        ("Unable to initialize shared memory key 'x' to requested size: No space left on device", "/dev/shm"),
        ("HTTP end point doesn't support models with decoupled transaction policy", "streaming"),
        ("failed to start HTTP service: Socket '127.0.0.1:8001' already in use", "submit again"),
        ("LoRA task 0 not found in cache", "LoRA"),
        ("unpack_from requires a buffer of at least 252645139 bytes", "numpy"),
        ("Stub process 'tensorrt_llm_0_0' is not healthy.", "has ended"),
        ("ORTE was unable to reliably start one or more daemons", "NCCL_SOCKET_IFNAME"),
        ("AssertionError: num_key_value_heads must be divisible by tp_size", "tp_size"),
    ],
)
def test_known_lines_have_a_hint(line: str, told: str) -> None:
    assert told in hints.hint(line)


def test_what_every_cpu_machine_says_is_no_error() -> None:
    line = 'E1125 03:59:47.025297 6351 server.cc:241] "CudaDriverHelper has not been initialized."'
    assert (hints.hint(line), hints.is_error(line)) == ("", False)
    assert hints.hint("I1125 started HTTPService") == ""


FAMILY = """
import os, subprocess, sys, time, signal
children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]) for _ in range(2)]
if len(sys.argv) > 1:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
print("E1125 03:59:47.0 1 x.cc:1] expecting compute 9.0 got compute 8.9", flush=True)
print("up", flush=True)
time.sleep(300)
"""


def start(folder: Path, *words: str) -> triton.Triton:
    server = triton.Triton([sys.executable, "-c", FAMILY, *words], {}, folder / "pid")
    deadline = time.monotonic() + 20
    while not server.hints or len(triton.session(server.pid)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.watch()
    return server


@pytest.mark.parametrize("words", [(), ("deaf",)])
def test_the_end_leaves_no_process(tmp_path: Path, words: tuple[str, ...]) -> None:
    server = start(tmp_path, *words)
    assert int((tmp_path / "pid").read_text()) == server.pid
    assert "another type of GPU" in server.hints[0]
    server.end(0.5)
    assert triton.session(server.pid) == set()


def test_a_models_process_that_is_gone_is_seen(tmp_path: Path) -> None:
    server = start(tmp_path)
    assert not server.lost()
    os.kill(max(triton.session(server.pid) - {server.pid}), signal.SIGKILL)
    deadline = time.monotonic() + 5
    while not server.lost():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.ended() is None
    server.end(1)


def test_what_slurm_sends_to_all_of_a_job_does_not_reach_it(tmp_path: Path) -> None:
    server = start(tmp_path)
    for pid in triton.session(server.pid):
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)
    assert (server.ended(), server.lost()) == (None, False)
    server.end(1)


STUB_MPIRUN = f"""#!{sys.executable}
# A stub of Open MPI's mpirun: it starts what it is told as that does (a process group of its own, usual handlers, all
# signals unblocked), and ends it at SIGINT as that does: SIGTERM, then SIGKILL.
import os, signal, sys, time
ranks, words = [], sys.argv[1:]
while words[0].startswith("--"):
    del words[0]
for line in " ".join(words).split(" : "):
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
        argv = line.split()[2:]
        os.execvp(argv[0], argv)
    ranks.append(pid)
def stop(number, frame):
    for chosen in (signal.SIGTERM, signal.SIGKILL):
        for pid in ranks:
            os.kill(pid, chosen)
        time.sleep(0.2)
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
for pid in ranks:
    os.waitpid(pid, 0)
"""
STUB_SERVER = f"""#!{sys.executable}
# A stub of tritonserver with the process of one model, which hears SIGTERM as Triton does.
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print("unhealthy: expecting compute 9.0 got compute 8.9", flush=True)
time.sleep(300)
"""


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[triton.Triton]:
    """Two ranks of one node, each with the process of a model."""
    for name, text in (("mpirun", STUB_MPIRUN), ("tritonserver", STUB_SERVER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o700)
    words = triton.argv(Path("/r"), PORTS, "p_", world=2, program=str(tmp_path / "tritonserver"))
    server = triton.Triton([str(tmp_path / words[0]), *words[1:]], {}, tmp_path / "pid")
    deadline = time.monotonic() + 20
    while len(below(server.pid)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)  # until each of them is what it is to be
    server.watch()
    known = below(server.pid)
    yield server
    server.end(2)
    for pid in known:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def below(pid: int) -> list[int]:
    """All that a process has started, by their parents: ranks, then their models' processes."""
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(one for child in children for one in below(child))]


def runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_what_slurm_sends_to_all_of_a_job_does_not_reach_ranks_that_mpirun_has_started(ranks: triton.Triton) -> None:
    before = below(ranks.pid)
    assert len(before) == 4
    assert len({os.getpgid(pid) for pid in before}) == 2, "the stub does as Open MPI does"
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        for pid in (ranks.pid, *before):
            os.kill(pid, number)
    time.sleep(0.3)
    assert below(ranks.pid) == before
    assert (ranks.ended(), ranks.lost()) == (None, False)


def test_a_models_process_of_a_rank_that_is_gone_is_seen(ranks: triton.Triton) -> None:
    assert not ranks.lost()
    os.kill(below(ranks.pid)[-1], signal.SIGKILL)
    deadline = time.monotonic() + 5
    while not ranks.lost():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ranks.ended() is None


@pytest.mark.parametrize("killed", [False, True])
def test_the_end_leaves_no_process_of_any_rank(ranks: triton.Triton, killed: bool) -> None:
    known = below(ranks.pid)
    if killed:  # as the kernel does where memory is short
        os.kill(ranks.pid, signal.SIGKILL)
    ranks.end(2)
    assert len(known) == 4
    assert not [pid for pid in known if runs(pid)]


def test_without_a_server_it_says_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(HpcError, match="no Triton"):
        triton.program(tmp_path)


def test_the_wheels_server_gets_its_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minor = "{}.{}".format(*sys.version_info[:2])
    wheel = tmp_path / "site" / "pytriton" / "tritonserver"
    for name in ("bin/tritonserver", "backends/python/libtriton_python.so", "backends/python/utils.py",
                 f"python_backend_stubs/{minor}/triton_python_backend_stub"):  # fmt: skip
        path = wheel / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (wheel / "bin" / "tritonserver").write_text('#!/bin/sh\necho "$@"\n')
    (wheel / "bin" / "tritonserver").chmod(0o700)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    own = tmp_path / "own"
    own.mkdir()
    program, env = triton.program(own)
    made = sorted(path.name for path in (own / "backends" / "python").iterdir())
    assert made == ["libtriton_python.so", "triton_python_backend_stub", "utils.py"]
    assert env["ORT_DISABLE_TELEMETRY"] == "1"
    assert env["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1:glibc.malloc.hugetlb=0", "the last one counts"
    shown = subprocess.run([program, "--x=a b"], check=True, capture_output=True, text=True).stdout
    assert shown == f"--backend-directory={own}/backends --x=a b\n"


def test_sweep_takes_its_own_alone() -> None:
    mine, other = (Path("/dev/shm") / f"{name}-{os.getpid()}" for name in ("hpc-sweep", "other-sweep"))
    for path in (mine, other):
        path.write_text(json.dumps(1))
    try:
        triton.sweep(mine.name)
        assert (mine.exists(), other.exists()) == (False, True)
    finally:
        other.unlink()
