"""`hpc tunnel --via HOST`: opens the way to a service, shows its address once it answers, and keeps it open."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hpc.core.errors import HpcError, Interrupted, NotReady, RuntimeUnavailable, UsageError
from hpc.login import explain, opened, route, ssh, via
from hpc.login.link import Guard, Link
from hpc.login.route import Service
from hpc.login.via import Place

_LOOK_S = 0.5
_PROBE_S = 2.0
_ANSWER_S = 5.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_LATE = "no answer in time"
_OVER = (5, 7)
"""Exit codes of `hpc tunnel` on the login node: it is dead; there is none."""


def run(there: Place, options: argparse.Namespace) -> int:
    """Until the service ends (0: by itself), or Ctrl-C, which is Interrupted: the job goes on."""
    if options.login:
        there = there.as_user(options.login)
    tunnel = Tunnel(there, options)
    with _ended_by_signals():
        try:
            return tunnel.keep()
        except (KeyboardInterrupt, _Ended):
            name = tunnel.service.name if tunnel.service else ""
            raise Interrupted(
                f"the tunnel is closed; {name or 'the job'} goes on",
                hint=f"{there.command()} cancel {name} ends it" if name else "",
            ) from None
        finally:
            tunnel.close()


class _Ended(BaseException):
    """SIGTERM or SIGHUP."""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    def end(number: int, frame: object) -> None:
        raise _Ended

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Silent(RuntimeUnavailable):
    """The way is open, and the service does not answer."""


class Tunnel:
    """One service, the login to its cluster, and the local ports that lead to it."""

    def __init__(self, there: Place, options: argparse.Namespace) -> None:
        self.service: Service | None = None
        self._there = there
        self._addresses = sys.stderr if options.json else sys.stdout
        self._options = options
        self._guard = Guard()
        self._login = Link(there.host, self._guard)
        self._node: Link | None = None
        self._leading = self._login
        """The connection whose ports lead to the service."""
        self._local: dict[str, int] = {}

    def keep(self) -> int:
        self._login.open()
        self._lead(self._ask())
        self._announce()
        while True:
            why = self._watch()
            if self._options.once:
                raise NotReady(f"the tunnel is closed: {why}", hint="the same command opens it again")
            _say(f"{why}; looking for it again")
            try:
                self._again()
            except HpcError as error:
                if error.exit_code not in _OVER:
                    raise
                return self._over(error)

    def close(self) -> None:
        opened.forget(self._local)
        for link in (self._node, self._login):
            if link is not None:
                link.close()
        self._guard.close()

    def _again(self) -> None:
        """Log in anew where that is needed, ask where the service is now, lead there; again and again, if need be."""
        wait_s, told = _FIRST_WAIT_S, ""
        while True:
            try:
                if not self._login.alive:
                    self._login.open(show=False)
                before = self._url()
                self._lead(self._ask())
                return self._ready_again(before)
            except ssh.LoginRefused:
                raise
            except RuntimeUnavailable as error:
                if error.message != told:
                    told = error.message
                    _say(f"{told}; trying again until Ctrl-C")
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _ready_again(self, before: str) -> None:
        assert self.service is not None
        _say(f"{self.service.name} is ready again on {self.service.address}")
        if self._url() != before:  # each start of a service has its own token
            _say("the page has another address now:")
            print(self._url(), file=self._addresses, flush=True)

    def _url(self) -> str:
        return self.service.url(self._local) if self.service else ""

    def _ask(self) -> Service:
        """Where the service answers; the login node waits until it does, and says meanwhile what it waits for."""
        target = [self.service.name] if self.service else [self._options.target] if self._options.target else []
        flags = ["--no-wait"] if self._options.no_wait and not self.service else []
        if self._options.local_port:
            flags.append(f"--local-port={self._options.local_port}")
        return route.service(self._question(["tunnel", *target, *flags, "--json"]), self._there.host)

    def _question(self, argv: Sequence[str]) -> Any:
        """The JSON that this hpc command prints there, or the error that it prints, as ours."""
        command = via.remote(argv, self._there.folder, os.environ)
        process = ssh.start(self._login.command(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        said = ssh.Said(process, show=lambda line: not line.startswith(("error: ", "  try: ")))
        try:
            out, _ = process.stdout.read() if process.stdout else b"", process.wait()
        finally:
            process.kill()
        if process.returncode == via.SSH_FAILED and not self._login.alive:
            raise self._login.failure()
        code = via.outcome(process.returncode, said.end(), self._there)
        try:
            document = json.loads(out)
        except ValueError:
            document = None
        if not code:
            return document
        if not isinstance(document, dict) or document.get("schema") != "hpc.error/1":
            document = {"error": f"hpc on {self._there.host} failed with exit code {code}", "hint": "see above"}
        error = HpcError(document["error"], hint=document["hint"])
        if code == RuntimeUnavailable.exit_code:
            error = RuntimeUnavailable(error.message, hint=error.hint)
        error.exit_code = code
        raise error

    def _lead(self, service: Service) -> None:
        """Open the way there, on the local ports of before where they are free. Silent where nothing answers."""
        self.service = service
        link = self._leading = self._link(service)
        wishes = self._local or service.document["local_ports"]
        if not self._local or not link.leads(service.forwards(self._local)):
            link.cancel()
            local = route.choose(wishes, route.is_free)
            if local != dict(wishes):
                _say(f"local port {_numbers(wishes)} is taken; {_numbers(local)} is used instead")
            link.forward(service.forwards(local))
            opened.forget(self._local)
            self._local = local
        try:
            opened.note(self._local, service.token)
        except (OSError, UsageError) as error:  # a full home, or none
            _say(f"other commands here cannot use the tunnel: {error}")
        deadline = time.monotonic() + _ANSWER_S
        while (why := self._problem()) is not None:
            if time.monotonic() > deadline or self._login.lost or link.lost:
                words = link.last_words()
                known = explain.recognise(words)
                raise Silent(
                    f"the tunnel is open, but {service.name} on {service.address} does not answer: {words or why}",
                    hint=known[0].cause if known else f"{self._there.command()} doctor tries the ways to it",
                )
            time.sleep(0.1)

    def _link(self, service: Service) -> Link:
        """The connection whose far end reaches the service: the login node's, or one to the node itself."""
        if service.document["reach"] != "jump":
            return self._login
        host = f"{service.document['user']}@{service.node}"
        if self._node is None or self._node.host != host or not self._node.alive:
            if self._node is not None:
                self._node.close()
            self._node = Link(host, self._guard, through=self._login)
            self._node.open()
        return self._node

    def _problem(self) -> str | None:
        """What is wrong with the answer through the tunnel; None: it is 200."""
        assert self.service is not None
        url = f"{self.service.base(self._local).replace('localhost', '127.0.0.1')}{self.service.document['health']}"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self.service.token}"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_ANSWER_S):
                return None
        except urllib.error.HTTPError as error:
            error.close()
            return f"it answers {error.code}"
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            return _LATE if isinstance(reason, TimeoutError) else str(reason)

    def _watch(self) -> str:
        """Stay until something is wrong: what."""
        assert self.service is not None
        late, probed = 0, time.monotonic()
        while True:
            time.sleep(_LOOK_S)
            if self._login.lost or self._leading.lost:
                return f"the connection to {self._there.host} is lost"
            if time.monotonic() - probed < _PROBE_S:
                continue
            why = self._problem()
            probed = time.monotonic()
            late = late + 1 if why == _LATE else 0  # busy, perhaps
            if why is not None and late in (0, 3):
                return f"{self.service.name} does not answer any more"

    def _announce(self) -> None:
        assert self.service is not None
        if self._options.json:
            document = {"schema": route.SCHEMA, **self.service.told(self._local)}
            print(json.dumps(document, ensure_ascii=False, indent=1), flush=True)
            self._options.json = False  # it is the one document: what comes later is said on stderr
        else:
            _say(f"{self.service.name} is ready on {self.service.address}")
            print(self._url(), flush=True)
            for name, port in list(self._local.items())[1:]:
                print(f"{name}: localhost:{port}", flush=True)
            _say("the tunnel stays open until Ctrl-C; the job goes on after it")
        if self._options.open:
            from hpc.login.browser import show

            if not show(self._url()):
                _say("no browser was found: open the address by hand")

    def _over(self, error: HpcError) -> int:
        """Say how it ended. 0 where it ended by itself, as after File > Shut Down."""
        assert self.service is not None
        try:
            (row,) = self._question(["status", self.service.name, "--json"])["stages"]
        except (HpcError, KeyError, TypeError, ValueError):
            raise error from None
        if row["state"] == "COMPLETED":
            _say(f"{self.service.name} has ended; the tunnel is closed")
            return 0
        raise NotReady(
            f"{self.service.name} has ended: {row['state']}{': ' if row['reason'] else ''}{row['reason'] or ''}",
            hint=row["hint"] or error.hint,
        )


def _numbers(ports: Mapping[str, int]) -> str:
    return ", ".join(str(port) for port in ports.values())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
