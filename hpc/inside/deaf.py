"""
A program that does not hear what Slurm sends to all of a job, and would end it under running requests.

python3 -m hpc.inside.deaf PROGRAM [ARGUMENT…]: for the ranks of mpirun, which unblocks all signals in what it starts.
"""

from __future__ import annotations

import os
import signal
import sys


def now() -> None:
    """This process, and all that it starts. SIGINT is how we end it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP})


if __name__ == "__main__":
    now()
    os.execvp(sys.argv[1], sys.argv[1:])
