"""The test cluster as Python sees it: bring it up, run things on it as an ordinary user, break it."""

from __future__ import annotations

import fcntl
import os
import pwd
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent / "cluster"
PATH = "/usr/local/bin:/usr/bin:/bin"


class CommandError(AssertionError):
    """A command ended with another exit code than 0; the message shows what it printed."""

    def __init__(self, result: subprocess.CompletedProcess[str], argv: tuple[str, ...]) -> None:
        self.result = result
        super().__init__(f"exit {result.returncode}: {shlex.join(argv)}\n{result.stdout}{result.stderr}")


class Cluster:
    """laptop, login, dgx01 to dgx04 and mig01, with the users alice and bob."""

    nodes = ("dgx01", "dgx02", "dgx03", "dgx04", "mig01")

    def __init__(self) -> None:
        self.dir = Path(os.environ.get("HPC_CLUSTER_DIR", "/tmp/hpc-cluster"))
        self.image_dir = Path(os.environ.get("HPC_TEST_IMAGES", "/var/cache/hpc-test"))

    def up(self) -> None:
        """Bring it up; nothing happens where it is up already."""
        self._script("cluster.sh", "up")

    def down(self) -> None:
        """Take it down, with all that runs on it."""
        self._script("cluster.sh", "down")

    def forget_jobs(self) -> None:
        """While it is down: the controller without accounting loses its state, and numbers its jobs from 1 again.

        Only that one: with accounting, sacct would answer by the old records of the same numbers.
        """
        for entry in (self.dir / "state-none").iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def is_up(self) -> bool:
        """Whether its controller runs and answers."""
        status = subprocess.run([SCRIPTS / "cluster.sh", "status"], check=False, capture_output=True)
        return status.returncode == 0

    def stop(self, name: str) -> None:
        """Stop one daemon: slurmctld, slurmdbd, mariadbd, slurmd-dgx02, sshd."""
        self._script("cluster.sh", "stop", name)

    def start(self, name: str) -> None:
        """Start a stopped daemon again; sshd-dgx01 is one that `up` leaves out."""
        self._script("cluster.sh", "start", name)

    def freeze(self, name: str) -> None:
        """Make a daemon hang: it is there, and does not answer."""
        self._script("cluster.sh", "freeze", name)

    def thaw(self, name: str) -> None:
        """Let a frozen daemon go on."""
        self._script("cluster.sh", "thaw", name)

    def images(self, name: str, venv: Path) -> Path:
        """The path of NAME.sif, built by the hpc of that venv if what it is made of has changed."""
        return Path(self._script("images.sh", name, str(self.image_dir), str(venv)).splitlines()[-1])

    def run(
        self,
        user: str,
        *argv: str,
        node: str = "login",
        cwd: str | Path | None = None,
        env: dict[str, str] | None = None,
        timeout: float = 60,
        check: bool = True,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run argv to its end as the user on a node; env adds to a login's clean environment."""
        pipe = subprocess.PIPE
        stdin = subprocess.DEVNULL if input is None else pipe
        process = self.popen(user, *argv, node=node, cwd=cwd, env=env, stdin=stdin, stdout=pipe, stderr=pipe)
        try:
            stdout, stderr = process.communicate(input, timeout)
        except BaseException:  # a time-out, or Ctrl-C: the children hold the pipes too
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        result = subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)
        if check and result.returncode:
            raise CommandError(result, argv)
        return result

    def popen(
        self,
        user: str,
        *argv: str,
        node: str = "login",
        cwd: str | Path | None = None,
        env: dict[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start argv as the user on a node, in a process group of its own; options are Popen's."""
        account = pwd.getpwnam(user)
        place = ("/usr/bin/nsenter", f"--net=/run/netns/{node}", f"--uts=/run/hpc-cluster-uts/{node}", "--")
        person = ("/usr/bin/setpriv", f"--reuid={user}", f"--regid={account.pw_gid}", "--init-groups", "--")
        clean = {"HOME": account.pw_dir, "USER": user, "LOGNAME": user, "PATH": PATH, "LANG": "C.UTF-8"}
        return subprocess.Popen(  # nsenter and setpriv exec: the pid is argv's own
            (*place, *person, *argv),
            cwd=cwd or account.pw_dir,
            env={**clean, **(env or {})},
            text=True,
            umask=0o022,
            start_new_session=True,
            **options,
        )

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """What is made once for all tests is made by one of those that run side by side; the others find it."""
        with open(self.dir / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _script(self, script: str, *args: str) -> str:
        argv = (str(SCRIPTS / script), *args)
        result = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if result.returncode:
            raise CommandError(result, argv)
        return result.stdout
