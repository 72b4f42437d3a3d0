"""Waiting until a service answers the login node, with one line that says where it stands; or why it never will."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from hpc.core import endpoint as endpoints
from hpc.core import rundir
from hpc.core.endpoint import Endpoint
from hpc.core.errors import Interrupted, NotReady
from hpc.core.rundir import AttemptDir, RunDir
from hpc.login import view
from hpc.login.asking import Answer
from hpc.login.states import SERVING, UNKNOWN, Scheduler, StageState, states

_LOOK_S = 0.1
"""Between two looks for the announcement: one small file."""
_STATE_S = 0.5
"""Between two looks at the run's other files."""
_ASK_S = 10.0
"""Between two questions to Slurm, unless the run's files tell of a change."""
_AGAIN_S = 1.0
"""Between two requests to a service that is announced and does not answer here."""
_PATIENCE_S = 10.0
"""So long may it be announced, at work, and not answer here."""
_LINE_S = 30.0
"""Between two lines that say the same where there is no terminal."""

Say = Callable[[str], None]
Ask = Callable[[Endpoint, str], Answer]


@dataclass(frozen=True)
class Service:
    """A service stage of one run."""

    run: RunDir
    asked: Mapping[str, Any]
    stage: str

    @property
    def what(self) -> str:
        return f"{self.run.id}/{self.stage}"

    def attempt(self) -> AttemptDir:
        """Of its latest submission."""
        job = rundir.read_json(self.run.stage(self.stage).job) or {}
        return self.run.stage(self.stage).attempt(job.get("attempt", 1))

    def alone(self) -> dict[str, Any]:
        """The run's document, as if this were its only stage."""
        return {**self.asked, "keys": {self.stage: self.asked["keys"][self.stage]}}

    def state(self, scheduler: Scheduler) -> StageState:
        return states([(self.run, self.alone())], scheduler)[0]

    def announced(self) -> tuple[Endpoint, str] | None:
        """Where it says that it answers, and its token."""
        folder = self.run.stage(self.stage)
        endpoint = endpoints.read(folder)
        try:
            return (endpoint, folder.token.read_text(encoding="utf-8")) if endpoint else None
        except FileNotFoundError:  # it ends at this moment
            return None

    def ends(self) -> float | None:
        """The job's time limit, seconds since 1970: from its start, as its node wrote it down."""
        limit_min = (rundir.read_json(self.run.stage(self.stage).job) or {}).get("limit_min")
        events = rundir.last_events(self.attempt().events, size=1 << 20)
        start = next((e["t"] for e in reversed(events) if e["phase"] == "starting" and "host" in e), None)
        return start + limit_min * 60 if start and limit_min else None

    def last_lines(self) -> list[str]:
        """Of its log, as far as it has one: a server's own words may be in either of the two."""
        attempt = self.attempt()
        return [*rundir.tail(attempt.stdout)[-5:], *rundir.tail(attempt.stderr)[-10:]]


def until_ready(service: Service, ask: Ask, say: Say, *, wait: bool = True) -> tuple[Endpoint, str]:
    """Where it answers, asked from here, and its token.

    NotReady where it has ended, was never submitted, or cannot be reached; without `wait` also where it does not
    answer yet.
    """
    look = _Look(service)
    begin, asked_at = time.monotonic(), 0.0
    silent: float | None = None
    answer: Answer | None = None
    try:
        while True:
            found = service.announced()
            if found is None:
                silent = answer = None
            elif answer is None or time.monotonic() - asked_at > _AGAIN_S:
                answer, asked_at = ask(*found), time.monotonic()
                if answer.ok:
                    return found
                silent = silent or asked_at
            state = look.state()
            if not state.active and state.state != UNKNOWN:
                raise dead(service, state)
            patient = wait and silent is not None and time.monotonic() - silent < _PATIENCE_S
            if found and answer and state.phase in SERVING and not patient:
                raise unreached(service, found[0], answer)
            if not wait:
                raise not_yet(service, state, look.scheduler)
            say(f"{service.what}: {phase(state)}  ({view.clock(time.monotonic() - begin)})")
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        hint = f"hpc tunnel {service.what} waits again; hpc cancel {service.what} ends it"
        raise Interrupted(f"no longer waiting; {service.what} goes on", hint=hint) from None


class _Look:
    """The stage's state; Slurm is asked seldom, and when the run's files tell of a change."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.scheduler = Scheduler()
        self._signs = self._read_signs()
        self._asked = self._looked = time.monotonic()
        self._known = service.state(self.scheduler)

    def state(self) -> StageState:
        now = time.monotonic()
        if now - self._looked < _STATE_S:
            return self._known
        self._looked, signs = now, self._read_signs()
        ending = self._service.attempt().outcome.exists() and now - self._asked > _AGAIN_S
        if ending or signs != self._signs or now - self._asked > _ASK_S:
            self.scheduler, self._asked, self._signs = Scheduler(), now, signs
        self._known = self._service.state(self.scheduler)
        return self._known

    def _read_signs(self) -> tuple[object, ...]:
        """What changes when the job starts, is cancelled or ends, and not in between."""
        attempt = self._service.attempt()
        started = next((e["t"] for e in reversed(rundir.last_events(attempt.events)) if "host" in e), None)
        return attempt, started, attempt.outcome.exists(), attempt.stop.exists()


def phase(state: StageState) -> str:
    """Where a service stands that does not answer yet, in words."""
    if state.state == UNKNOWN:
        return f"unknown: {state.reason}"
    if state.state == "PENDING":
        return f"queued: {state.reason}" if state.reason else "queued"
    if state.state != "RUNNING":
        return state.state.lower()
    if state.phase in SERVING:
        return f"ready on {state.node}; it does not answer this machine yet"
    if state.phase in {"staging", "checking"}:  # of the image, on the node
        share = f" {min(1.0, state.done / state.total):.0%}" if state.done and state.total else ""
        return f"{state.phase}{share}  {state.message}".rstrip()
    return f"starting on {state.node}  {state.message}".rstrip()


def dead(service: Service, state: StageState) -> NotReady:
    """Why it will never answer."""
    what = "was not submitted" if state.state == "NOT_SUBMITTED" else f"has ended: {state.state}"
    reason = f" ({state.reason})" if state.reason else ""
    again = f"hpc submit {service.stage} starts it again"
    log = f"; hpc logs {service.what} shows all of its log" if state.attempt else ""
    own = f"{state.hint}; " if state.hint and "submit again" not in state.hint else ""
    return NotReady(f"{service.what} {what}{reason}", hint=f"{own}{again}{log}")


def not_yet(service: Service, state: StageState, scheduler: Scheduler) -> Exception:
    if state.state == UNKNOWN and scheduler.problem is not None:
        return scheduler.problem
    hint = f"hpc tunnel {service.what} waits for it"
    return NotReady(f"{service.what} does not answer yet: {phase(state)}", hint=hint)


def unreached(service: Service, endpoint: Endpoint, answer: Answer) -> NotReady:
    """It answers on its node, and not here."""
    hint = "the site profile's `reach` does not fit: `hpc doctor` tries direct, jump and relay"
    if endpoint.bound.startswith("127."):
        hint = "it listens on its node's loopback alone: set reach = 'relay' or 'jump' in the site profile, as it was"
    return NotReady(f"{service.what} serves on {endpoint.address}, but from this machine it {answer.said}", hint=hint)


@contextmanager
def line(out: IO[str]) -> Iterator[Say]:
    """One line that is written anew on a terminal; elsewhere one whenever it says something new."""
    if out.isatty():

        def draw(text: str) -> None:
            out.write(f"\r\033[K{text}")
            out.flush()

        try:
            yield draw
        finally:
            draw("")
        return
    last, when = "", -_LINE_S

    def say(text: str) -> None:
        nonlocal last, when
        head = text.partition("  ")[0].partition("%")[0].rstrip("0123456789 ")
        if head != last or time.monotonic() - when >= _LINE_S:
            last, when = head, time.monotonic()
            print(text, file=out, flush=True)

    yield say
