"""The ranks of one training: who this process is, and what all of them must decide alike."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from hpc.core.errors import HpcError

MEANT = "HPC_WORLD_SIZE"
"""How many ranks the plan asked for; set by `hpc.inside.ranks`."""


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def check() -> None:
    """HpcError where other than as many ranks as were planned have been started. From here on each ends with torchrun.

    torchrun gives each a session of its own: what kills the job's process group would leave them at work.
    """
    meant = int(os.environ.get(MEANT, "1"))
    if meant > 1:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if world() != meant:
        raise HpcError(
            f"{world()} ranks were started, and {meant} were planned",
            hint="a stage on several GPUs is started by hpc.inside.ranks",
        )


def any_of(flag: bool) -> bool:
    """True on every rank where it is true on one. All ranks must call it."""
    return summed([float(flag)])[0] > 0


def summed(values: Sequence[float]) -> list[float]:
    """The values added up over the ranks. All must call it."""
    if world() == 1:
        return list(values)
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(local_rank())
        distributed.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", local_rank()) if distributed.get_backend() == "nccl" else torch.device("cpu")
    found = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(found)
    result: list[float] = found.tolist()
    return result


def leave() -> None:
    """Part from the others: done with the work, before any of them ends."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def end(code: int) -> NoReturn:
    """End this process, and do not take the interpreter apart: a thread of the group's that needs it then would abort.

    Where others have not come to an end, the group cannot be left first. What asked to be told of the end is told:
    trackers send what they have. See docs/adr/0035.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def barrier() -> None:
    """Until every rank is here."""
    summed([0.0])
