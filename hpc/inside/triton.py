"""One Triton server: how it is started, when it is ready, whether its models' processes live, and how it ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpc.core.errors import HpcError
from hpc.inside import deaf, hints
from hpc.inside.meeting import Meeting

_EXIT_TIMEOUT_S = 10
_KEPT = 20
"""Last errors of its log that are kept to be told."""


def argv(
    repository: Path, ports: Mapping[str, int], shm: str, *, world: int = 1, program: str = "tritonserver"
) -> list[str]:
    """The command; with `world` > 1 one rank per GPU on this node, of which the first answers.

    Ranks after the first load the engine alone and open no port. The first mpirun argument list is the leader's.
    """
    if world == 1:
        return _server(program, repository, shm, 0, ports)
    words = ["mpirun", "--allow-run-as-root", "--oversubscribe"]
    for rank in range(world):
        server = _server(program, repository, shm, rank, ports if rank == 0 else None)
        words += [*([":"] if rank else []), "-n", "1", sys.executable, "-m", "hpc.inside.deaf", *server]
    return words


def of_rank(
    repository: Path, ports: Mapping[str, int], shm: str, rank: int, *, wrapped: bool, program: str = "tritonserver"
) -> list[str]:
    """The command of one rank, where Slurm has started a task for each; the first one answers.

    `wrapped`: the ranks are those of TensorRT-LLM's LLM API, whose launcher starts the server on the first one alone.
    """
    words = _server(program, repository, shm, rank, ports if rank == 0 or wrapped else None)
    return ["trtllm-llmapi-launch", *words] if wrapped else words


_HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""The engine's weights, which every token reads, in pages of 2 MiB where the kernel gives them to who asks: up to a
quarter of a token's time went into looking up small ones. See docs/adr/0039."""
PORTS = ("http", "grpc", "metrics")
"""What it listens on, as its options name them."""


def _server(program: str, repository: Path, shm: str, rank: int, ports: Mapping[str, int] | None = None) -> list[str]:
    listens = [f"--allow-{name}=false" for name in PORTS]
    listens += ["--model-control-mode=explicit", "--load-model=tensorrt_llm"]
    if ports is not None:
        listens = [word for name in PORTS for word in (f"--{name}-address=127.0.0.1", f"--{name}-port={ports[name]}")]
    return [
        program, f"--model-repository={repository}", *listens, "--disable-auto-complete-config",
        f"--exit-timeout-secs={_EXIT_TIMEOUT_S}", f"--backend-config=python,shm-region-prefix-name={shm}rank{rank}_",
    ]  # fmt: skip


def program(own: Path) -> tuple[str, Mapping[str, str]]:
    """How tritonserver is started here: the image's, or that of this Python's nvidia-pytriton, whose layout is made."""
    found = shutil.which("tritonserver") or (
        "/opt/tritonserver/bin/tritonserver" if Path("/opt/tritonserver/bin/tritonserver").exists() else None
    )
    if found:
        return found, {}
    wheel = next((Path(p) / "pytriton" for p in sys.path if (Path(p) / "pytriton/tritonserver").is_dir()), None)
    if wheel is None:
        raise HpcError("there is no Triton here", hint="serve with the environment serve-cpu, trtllm or triton")
    minor = "{}.{}".format(*sys.version_info[:2])
    backends = own / "backends" / "python"
    backends.mkdir(parents=True, exist_ok=True)
    stubs = wheel / "tritonserver" / "python_backend_stubs" / minor
    sources = [*(wheel / "tritonserver" / "backends" / "python").iterdir(), stubs / "triton_python_backend_stub"]
    for source in sources:
        link = backends / source.name
        link.unlink(missing_ok=True)
        link.symlink_to(source)
    script = own / "tritonserver"
    script.write_text(
        f'#!/bin/sh\nexec "{wheel}/tritonserver/bin/tritonserver" --backend-directory="{backends.parent}" "$@"\n'
    )
    script.chmod(0o700)
    libraries = [str(wheel.parent / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # the stub's Python is the first on PATH
    tunables = ":".join(filter(None, (_HUGE_PAGES, os.environ.get("GLIBC_TUNABLES"))))
    return str(script), {
        "LD_LIBRARY_PATH": ":".join(libraries), "PATH": path, "ORT_DISABLE_TELEMETRY": "1", "GLIBC_TUNABLES": tunables,
    }  # fmt: skip


class Triton:
    """The running server, in a session of its own, which a rank that mpirun starts does not leave."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], pid_file: Path) -> None:
        self.errors: deque[str] = deque(maxlen=_KEPT)
        self.hints: list[str] = []
        self.others: Meeting | None = None
        """Its ranks that other tasks have started."""
        self._stubs: frozenset[int] = frozenset()
        self._process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env={**os.environ, **env}, start_new_session=True, preexec_fn=_deaf,
        )  # fmt: skip
        pid_file.write_text(str(self._process.pid))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._process.poll()

    def watch(self) -> None:
        """From now on a model's process that is gone is a failure: Triton itself goes on, and says it is ready."""
        self._stubs = frozenset(session(self.pid)) - {self.pid}

    def lost(self) -> bool:
        """True where a model's process is gone."""
        return not all(_runs(pid, self.pid) for pid in self._stubs)

    def end(self, within_s: float) -> int:
        """Ask it to end, make it end, and all that it started; its exit code."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGINT)
            try:
                self._process.wait(within_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
        code = self._process.wait()
        end_session(self.pid)
        self._reader.join(5)
        return code

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._take(line)

    def _take(self, line: str) -> None:
        if hints.harmless(line):
            return
        print(line, end="", flush=True)
        if hints.is_error(line):
            self.errors.append(line.strip())
        text = hints.hint(line)
        if text and text not in self.hints:
            self.hints.append(text)
            print(f"hint: {text}", flush=True)


def _deaf() -> None:
    """In the child, before exec. SIGKILL where we ourselves are gone."""
    deaf.now()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def session(leader: int) -> set[int]:
    """The processes of a session that run."""
    numbers = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return {pid for pid in numbers if _runs(pid, leader)}


def _runs(pid: int, leader: int) -> bool:
    """Whether this process is one of that session, and has not ended (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[3]) == leader and fields[0] != "Z"


def end_session(leader: int) -> None:
    """SIGKILL to what is left of it, until nothing is: a server that was killed leaves its models' processes."""
    deadline = time.monotonic() + 5
    while (left := session(leader)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def sweep(prefix: str) -> None:
    """Remove what stays in /dev/shm of a server that did not end by itself."""
    for path in Path("/dev/shm").glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            path.unlink()
