"""The part in building engines of a rank that is not the first one."""

from __future__ import annotations

from hpc.core.errors import HpcError
from hpc.core.stage import Context
from hpc.inside import engines
from hpc.inside.meeting import Meeting

_TOLD_S, _TELL_S = 900, 20
"""So long it waits for the first one's word, and for the first one to tell why it failed."""


def build(ctx: Context, ranks: Meeting) -> None:
    """Run the program that the first one runs: MPI tells it which engines it builds."""
    try:
        told = ranks.told(_TOLD_S)
        engines.refuse_kinds([*engines.gpus(), tuple(told["cards"])])
        engines.run_program(told["argv"], ctx, cwd=ctx.folder)
        ranks.done()
    except HpcError as error:
        ranks.fail(error)
        ranks.until_over(_TELL_S)
        raise
