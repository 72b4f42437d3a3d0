"""Every error that a user can cause, each with its exit code.

HpcError              1   the job, or what was asked, failed
  UsageError          2   the command line, the settings or the data are wrong
  Refused             3   the plan cannot work
  RuntimeUnavailable  4   Slurm or Apptainer cannot be reached, or rejected the job
  NotReady            5   the endpoint does not answer yet
  VerificationFailed  6   an image, data set or engine is not what it should be
  NotFound            7   no such run, job, or stage in that run
  Stopped             8   ended by preemption or a time limit; it can be resumed
  Interrupted       130   the user left; the job goes on
"""

from __future__ import annotations

STOPPED = 85
"""Exit code of a stage, inside the image, that was asked to end, saved its work and left."""


class HpcError(Exception):
    """What is wrong, in one sentence; `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint)


class UsageError(HpcError):
    """The command line, the settings or the data are wrong."""

    exit_code = 2


class Refused(HpcError):
    """The plan cannot work; nothing was submitted."""

    exit_code = 3


class RuntimeUnavailable(HpcError):
    """Slurm or the container runtime cannot be reached, or it rejected the job."""

    exit_code = 4


class NotReady(HpcError):
    """The endpoint does not answer yet."""

    exit_code = 5


class VerificationFailed(HpcError):
    """An image, a data set or an engine is not what it should be."""

    exit_code = 6


class NotFound(HpcError):
    """There is no such run or job, or that run has no such stage."""

    exit_code = 7


class Stopped(HpcError):
    """Ended by preemption or a time limit; submitting again resumes it."""

    exit_code = 8


class Interrupted(HpcError):
    """The user left; the job goes on."""

    exit_code = 130


def _rebuild(kind: type[HpcError], message: str, hint: str) -> HpcError:
    return kind(message, hint=hint)


def did_you_mean(word: str, known: list[str]) -> str:
    """A hint for an unknown word: the nearest known one, else all of them.

    >>> did_you_mean("finetun", ["prepare", "finetune"])
    "did you mean 'finetune'?"
    >>> did_you_mean("xyz", ["prepare", "finetune"])
    'choose from: finetune, prepare'
    """
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"choose from: {', '.join(sorted(known))}"
