"""A rank of a served engine that is not the first one: a server without ports, which lives as long as the first."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from hpc.core.errors import HpcError
from hpc.inside import triton
from hpc.inside.meeting import Meeting
from hpc.inside.triton import Triton

_LOOK_S = 0.2
_END_S = 15
_TOLD_S = 20


def follow(meeting: Meeting, *, within_s: float, wrapped: bool) -> None:
    """Serve until the first rank has ended. HpcError, told to the first one too, where this one ends before."""
    try:
        told = meeting.told(within_s)
        _serve(meeting, Path(told["repository"]), wrapped)
    except HpcError as error:
        meeting.fail(error)
        meeting.until_over(_TOLD_S)
        raise


def _serve(meeting: Meeting, repository: Path, wrapped: bool) -> None:
    shm = f"hpc{os.getpid()}_{os.urandom(4).hex()}_"
    with tempfile.TemporaryDirectory(prefix="hpc-serve-") as own:
        program, env = triton.program(Path(own))
        ports = dict.fromkeys(triton.PORTS, 0)  # of no use: the first rank's server alone is started by the launcher
        argv = triton.of_rank(repository, ports, shm, meeting.rank, wrapped=wrapped, program=program)
        server = Triton(argv, env, Path(own) / "pid")
        print(f"rank {meeting.rank} of {meeting.world} on {os.uname().nodename}", flush=True)
        try:
            while not meeting.is_over():
                code = server.ended()
                if code:
                    said = f": {server.errors[-1]}" if server.errors else ""
                    hint = server.hints[-1] if server.hints else "its log lies in the attempt's folder of that rank"
                    raise HpcError(f"Triton ended by itself, with exit code {code}{said}"[:400], hint=hint)
                time.sleep(_LOOK_S)
        finally:
            server.end(_END_S)
            triton.sweep(shm)
