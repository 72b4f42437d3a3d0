"""Errors as a notebook shows them: what is wrong and what to do, without a traceback."""

from __future__ import annotations

from hpc.core.errors import HpcError


class LabError(HpcError):
    """What is wrong and what to do; a notebook shows these two sentences and no traceback."""

    def _render_traceback_(self) -> list[str]:  # asked for by IPython
        return [f"error: {self.message}", *([f"  try: {self.hint}"] if self.hint else [])]


def told(error: HpcError) -> LabError:
    """The same, as a notebook shows it."""
    made = LabError(error.message, hint=error.hint)
    made.exit_code = error.exit_code
    return made
