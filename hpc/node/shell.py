"""A program beside a running stage, for `hpc shell`: in its container, with its environment and its binds.

    python -m hpc.node.shell STAGE_FOLDER ATTEMPT [PROGRAM ARGUMENTS]     a shell where no program is given

What the stage was started with is read from launch.json, which holds no secrets.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpc.core import rundir
from hpc.core.errors import HpcError
from hpc.node import launch
from hpc.node.inplace import InPlace, check
from hpc.node.shield import shielded

_OF_NODE = ("CUDA_VISIBLE_DEVICES", "SLURMD_NODENAME", "TERM")
"""Differ from node to node, and from terminal to terminal: those of this step count, where it has them."""
# the warning before the time limit goes to every process of the job: it must not end a shell. An interactive bash
# ignores only what it is told to by itself, which is done before its first prompt
_SHELL = """\
trap '' USR2; PS1=$1; PROMPT_COMMAND="trap '' USR2; unset PROMPT_COMMAND"; export PS1 PROMPT_COMMAND
if command -v bash >/dev/null 2>&1; then exec bash --norc; fi
unset PROMPT_COMMAND; exec sh"""
_PROGRAM = "trap '' USR2; exec \"$@\""


def start(
    document: Mapping[str, object], folder: Path, program: Sequence[str], here: Mapping[str, str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """(argv, environment) of the program beside the stage that launch.json tells of. `here`: this step's variables."""
    argv, env = list(document["argv"]), dict(document["env"])  # type: ignore[call-overload]
    contained = launch.is_container(argv)
    prefix = launch.FOR_CONTAINER if contained else ""
    known = {k: v for k, v in env.items() if launch.NOT_SHOWN not in v}
    known.update({prefix + k: here[k] for k in _OF_NODE if k in here})
    prompt = f"{folder.parent.name}/{folder.name}@{os.uname().nodename}:$PWD$ "
    inner = ("sh", "-c", _PROGRAM, "sh", *program) if program else ("sh", "-c", _SHELL, "sh", prompt)
    return (launch.beside(argv, inner, str(folder)) if contained else inner), known


def main(arguments: Sequence[str]) -> int:
    folder, attempt, *program = arguments
    stage_dir = rundir.StageDir(Path(folder))
    document = rundir.read_json(stage_dir.attempt(int(attempt)).launch)
    if document is None:
        print(f"{folder}: its container has not been started", file=sys.stderr)
        return 1
    try:
        _check_image(stage_dir, document["argv"])
    except HpcError as error:
        print(f"error: {error.message}\n  try: {error.hint}", file=sys.stderr)
        return error.exit_code
    argv, env = start(document, stage_dir.path, program, os.environ)
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: object) -> None:
        if child is not None and number in (signal.SIGTERM, signal.SIGHUP):
            child.send_signal(number)  # the others come from the terminal, which sends them to the child too

    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, pass_on)
    try:
        child = subprocess.Popen(argv, env=env, cwd=folder)
    except OSError as error:
        print(f"{argv[0]}: {error.strerror}", file=sys.stderr)
        return 1
    with shielded(child.pid):  # which ends the image's FUSE helper with this process, however that ends
        code = child.wait()
    return 128 - code if code < 0 else code


def _check_image(stage_dir: rundir.StageDir, argv: Sequence[str]) -> None:
    """An image that runs from where it lies may have become another one since the stage was started with it."""
    planned = (rundir.read_json(stage_dir.config) or {}).get("environment", {})
    if planned.get("path") in argv:
        check(InPlace(path=planned["path"], sha256=planned["digest"], stat=tuple(planned.get("stat", ()))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
