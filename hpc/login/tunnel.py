"""`hpc tunnel`: a service stage -> wait until it answers -> the two steps for a laptop; or what a message means."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hpc.core import rundir
from hpc.core import stage as stages
from hpc.core.endpoint import Endpoint
from hpc.core.errors import NotFound, UsageError
from hpc.core.rundir import RunDir
from hpc.core.site import Site
from hpc.login import asking, explain, forward, private, ready, steps
from hpc.login.asking import Answer
from hpc.login.explain import Forward, Message
from hpc.login.ready import Service
from hpc.login.states import UNKNOWN, Scheduler, StageState, states
from hpc.login.steps import Tunnel

_SEARCHED = 20
"""So many of the latest services are looked at for one that is at work."""

Runs = Sequence[tuple[RunDir, Mapping[str, Any]]]


@dataclass(frozen=True)
class Way:
    """How a service of that site is asked and reached from here."""

    service: Service
    site: Site

    def reach(self, endpoint: Endpoint) -> str:
        return asking.reach_of(endpoint, self.site)

    def line(self, endpoint: Endpoint) -> forward.Line:
        job = rundir.read_json(self.service.run.stage(self.service.stage).job) or {}
        python, code = job.get("python") or sys.executable, str(self.service.run.code)
        return forward.line(job_id=endpoint.job_id, node=endpoint.host, python=python, code=code, ports=endpoint.ports)

    def ask(self, endpoint: Endpoint, token: str) -> Answer:
        reach = self.reach(endpoint)
        if reach == "relay":
            return asking.through_relay(self.line(endpoint), endpoint.health, token)
        if reach == "jump":
            return asking.through_step(self.line(endpoint), endpoint.health, token)
        host = endpoint.bound if endpoint.bound.startswith("127.") else endpoint.host
        return asking.direct(host, endpoint.port, endpoint.health, token)

    def sockets(self, endpoint: Endpoint) -> Mapping[str, str]:
        return self.line(endpoint).sockets if self.reach(endpoint) == "relay" else {}


def choose(runs: Runs, stage: str | None, *, models: bool = False) -> Service:
    """The latest service among these runs that is at work, else the latest. NotFound where none of them has one.

    `models`: only services that answer with a model.
    """
    fits = _answers if models else _serves
    found = [Service(r, a, name) for r, a in runs for name in a["keys"] if stage in (None, name) and fits(r, name)]
    if not found:
        what = f"{runs[0][0].id} has" if len(runs) == 1 else "you have"
        kind, one = ("served model", "serve") if models else ("service", "jupyter")
        raise NotFound(f"{what} no {kind}{f' {stage}' if stage else ''}", hint=f"`hpc submit {one}` starts one")
    if len(found) == 1:
        return found[0]
    found = found[:_SEARCHED]
    rows = states([(f.run, f.alone()) for f in found], Scheduler())
    at_work = [f for f, row in zip(found, rows, strict=True) if row.active or row.state == UNKNOWN]
    if len(runs) == 1 and len(at_work) > 1:
        hint = f"name one: hpc tunnel {at_work[0].what}"
        raise UsageError(f"{runs[0][0].id} has several services: {', '.join(f.stage for f in at_work)}", hint=hint)
    return (at_work or found)[0]


def _serves(run: RunDir, name: str) -> bool:
    """Whether this stage is a service; of one that is not installed (any more), its config says what it listens on."""
    if name in stages.available():
        return stages.load(name).service
    return "bind" in (rundir.read_json(run.stage(name).config) or {})


def _answers(run: RunDir, name: str) -> bool:
    """Whether this stage is a service that answers with a model: it serves an engine."""
    if name in stages.available():
        stage = stages.load(name)
        return stage.service and any(thing.kind == "engine" for thing in stage.consumes.values())
    return _serves(run, name) and "engine" in (rundir.read_json(run.stage(name).config) or {})


def find(way: Way, *, host: str | None, first: int | None, wait: bool) -> Callable[[str], Tunnel]:
    """Login name -> the tunnel to a service, once that answers. NotReady where it does not."""
    steps.local_ports({"http": 0}, first)  # told before the wait
    host = steps.checked("--host", host or way.site.login_host or os.uname().nodename)
    service = way.service
    with ready.line(sys.stderr) as say:
        endpoint, token = ready.until_ready(service, way.ask, say, wait=wait)
    make = partial(
        steps.make,
        run=service.run.id,
        stage=service.stage,
        attempt=int(service.attempt().path.name.rpartition("-")[2]),
        endpoint=endpoint,
        token=token,
        reach=way.reach(endpoint),
        host=host,
        user=me(),
        first=first,
        ends=service.ends(),
        sockets=way.sockets(endpoint),
    )
    return lambda login: make(login=login)


def login_name(given: str | None, site: Site, *, quiet: bool) -> str | None:
    """The name to log in with: as given, HPC_LOGIN's, or typed where a person can be asked; None: one's own.

    A portal's names are for one time: they are printed, and never kept.
    """
    name = given or os.environ.get("HPC_LOGIN")
    if not name and site.login_host and not quiet and sys.stdin.isatty() and sys.stderr.isatty():
        print(f"Your login name at {site.login_host} (ENTER for {me()}): ", end="", file=sys.stderr, flush=True)
        name = sys.stdin.readline().strip()
    return steps.checked("--login", name) if name else None


def keep(tunnel: Tunnel, run: RunDir) -> Path:
    """Write the steps into a file that only its owner can read, replaced at each print. Each project has its own."""
    where = hashlib.sha256(os.fsencode(run.path.absolute())).hexdigest()[:8]
    return private.write(f"tunnel-{tunnel.run}-{tunnel.stage}-{where}.txt", steps.text(tunnel, time.time()))


def stop(way: Way) -> int:
    """End the relay that runs here for this service; harmless where none does."""
    found = way.service.announced()
    ended = found is not None and way.reach(found[0]) != "direct" and forward.stop(way.line(found[0]))
    print(f"{way.service.what}: {'the relay has ended' if ended else 'no relay runs here'}", file=sys.stderr)
    return 0


def me() -> str:
    """One's own name here; a number where the machine knows none."""
    return Scheduler().user


def explained(text: str, way: Way | None) -> dict[str, Any]:
    """What the messages in the text mean, proved by how the service stands at this moment: `hpc.explain/1`."""
    live = standing(way)
    led = explain.forwards(text)
    matches = [
        {**{k: v for k, v in asdict(m).items() if k not in {"pattern", "service"}}, **_proved(m, live, led)}
        for m in explain.recognise(text)
    ]
    return {"matches": matches, "live": live}


def standing(way: Way | None) -> dict[str, Any]:
    """How the service stands: its state, where it says that it answers, and what came of asking it just now."""
    if way is None:
        return {"what": "", "state": "", "phase": "you have no service", "address": "", "answers": False, "said": ""}
    service = way.service
    state, found = service.state(Scheduler()), service.announced()
    answer = way.ask(*found) if found else None
    return {
        "what": service.what,
        "state": state.state,
        "phase": _phase(state, found[0] if found and answer and answer.ok else None),
        "active": state.active,
        "address": found[0].address if found else "",
        "ports": dict(found[0].ports) if found else {},
        "answers": bool(answer and answer.ok),
        "said": answer.said if answer else "",
    }


def _phase(state: StageState, answering: Endpoint | None) -> str:
    if answering:
        return f"ready on {answering.address}"
    return ready.phase(state) if state.active else f"{state.state} {state.reason}".strip()


def _proved(message: Message, live: Mapping[str, Any], led: Sequence[Forward]) -> dict[str, str]:
    """The cause and the next step, where the live state knows better than the message."""
    if not message.service:
        return {}
    what = live["what"]
    if not what:
        return {"cause": "you have no service", "todo": "`hpc submit jupyter` starts one"}
    if not live["active"]:
        again = f"`hpc submit {what.partition('/')[2]}` starts it again"
        return {"cause": f"{what} is over: {live['phase']}", "todo": f"`hpc logs {what}` says more; {again}"}
    if not live["address"]:
        cause = f"{what} does not answer yet: {live['phase']}"
        return {"cause": cause, "todo": f"`hpc tunnel {what}` waits for it, and then prints the steps"}
    node = live["address"].rpartition(":")[0]
    elsewhere = [f for f in led if f.host not in (node, "localhost") or f.port not in live["ports"].values()]
    if elsewhere:
        there = f"{elsewhere[0].host}:{elsewhere[0].port}"
        cause = f"the command leads to {there}, and the service is on {live['address']} now"
        return {"cause": cause, "todo": f"close its window; `hpc tunnel {what}` prints the right one"}
    if not live["answers"]:
        cause = f"{what} serves on {live['address']}, but from this machine it {live['said']}"
        return {"cause": cause, "todo": "`hpc doctor` tries direct, jump and relay"}
    cause = f"{what} answers now: it was not ready when you tried, or the steps were those of an earlier start"
    return {"cause": cause, "todo": f"try again; if it is the same: `hpc tunnel {what}` prints both steps anew"}


def tell(found: Mapping[str, Any]) -> None:
    """What was explained, for people."""
    for match in found["matches"]:
        print(f"{match['name']} (said by {match['by']})")
        print(f"  proves:  {match['proves']}")
        print(f"  cause:   {match['cause']}")
        print(f"  do:      {match['todo']}")
        print()
    if not found["matches"]:
        print("no message that is known here; paste all that was said, with the command of step 1\n")
    live = found["live"]
    if not live["what"]:
        print("now: you have no service; `hpc submit jupyter` starts one")
        return
    print(f"now: {live['what']}: {live['phase']}")
    if live["address"]:
        print(f"     asked from this machine, it {live['said']}")
