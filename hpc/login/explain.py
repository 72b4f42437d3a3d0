"""PURE: what ssh, a browser or Jupyter says -> what it proves, why it comes, what to do. No live state."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message that people meet between their laptop and a service."""

    name: str
    pattern: str
    """A regular expression, without regard to case."""
    proves: str
    """What is known to work, or not to, by this message alone."""
    cause: str
    todo: str
    by: str = "ssh"
    service: bool = False
    """Whether the state of the service decides about the cause."""


@dataclass(frozen=True)
class Forward:
    """What a command in the text leads to: `localhost:9999:dgx06:9250`."""

    local: int
    host: str
    port: int


_AGAIN = "close the window of step 1, run `hpc tunnel` again and use what it prints"
_TUNNEL = "look at the window of step 1: it must be open, and silent"
_LOCAL = "`hpc tunnel --local-port N` prints the steps with another port of the laptop, e.g. 9998"
_LOGIN = (
    "get a new login name or key from your portal; `hpc tunnel --login NAME` prints step 1 with it, the job goes on"
)

MESSAGES = (
    Message(
        name="administratively prohibited",
        pattern=r"administratively prohibited|(remote )?port forwarding (is )?(disabled|not allowed)",
        proves="you are logged in; the login node's sshd allows no forwarding",
        cause="AllowTcpForwarding or PermitOpen in its sshd_config, or a restricted key",
        todo="use another login node with `hpc tunnel --host HOST`, or ask the administrators to allow forwarding",
    ),
    Message(
        name="open failed: no route",
        pattern=r"open failed: connect failed: (no route to host|network is unreachable)",
        proves="you are logged in; the login node finds no way to the compute node",
        cause="the node is down, or a firewall stands between login and compute nodes",
        todo="`hpc doctor` tries the other ways: reach = 'jump' or 'relay' in the site profile",
        service=True,
    ),
    Message(
        name="open failed: timed out",
        pattern=r"open failed: connect failed: (connection|operation) timed out",
        proves="you are logged in; the compute node does not answer the login node",
        cause="a firewall between login and compute nodes drops the packets, or the node hangs",
        todo="`hpc doctor` tries the other ways: reach = 'jump' or 'relay' in the site profile",
        service=True,
    ),
    Message(
        name="open failed: unknown name",
        pattern=r"open failed: (connect failed: )?(name or service not known|temporary failure in name|"
        r"nodename nor servname|no address associated)",
        proves="you are logged in; the login node does not know the compute node's name",
        cause="the command is for another cluster or mistyped, or the node's name needs a suffix there",
        todo=_AGAIN,
        service=True,
    ),
    Message(
        name="open failed: refused",
        pattern=r"open failed: connect failed: (connection refused|no such file|open failed)",
        proves="you are logged in, and the compute node was reached: nothing listens on that port there",
        cause="the service was not ready yet, its job is over, or it is on another node or port now",
        todo=_AGAIN,
        service=True,
    ),
    Message(
        name="open failed",
        pattern=r"channel \d+: open failed",
        proves="you are logged in; the login node could not reach the service",
        cause="the service is not ready, or its job is over",
        todo=_AGAIN,
        service=True,
    ),
    Message(
        name="local port in use",
        pattern=r"bind.*address already in use|cannot listen to port|only one usage of each socket address|"
        r"bind: 10048|could not request local forwarding",
        proves="nothing about the cluster: it is your laptop's port",
        cause="an earlier tunnel is still open on the laptop, or another program uses this port",
        todo=f"close the window of the earlier step 1; or {_LOCAL}",
    ),
    Message(
        name="local port not allowed",
        pattern=r"bind.*(permission denied|cannot assign|10013)|privileged ports can only be forwarded|"
        r"access (a socket|permissions).*forbidden",
        proves="nothing about the cluster: your laptop does not give out this port",
        cause="a port below 1024, or one that Windows keeps for itself (`netsh int ipv4 show excludedportrange tcp`)",
        todo=_LOCAL,
    ),
    Message(
        name="remote forwarding",
        pattern=r"remote port forwarding failed",
        proves="you are logged in; -R was asked for where -L is meant",
        cause="`ssh -R` leads the other way, from the cluster to the laptop",
        todo="use the command of step 1 as it is printed: it has -L",
    ),
    Message(
        name="too many keys",
        pattern=r"too many authentication failures",
        proves="the login node answers; it ended the talk after too many keys",
        cause="your ssh agent offered all of its keys, one after the other",
        todo="name the key: add `-o IdentitiesOnly=yes -i KEYFILE` to the command",
    ),
    Message(
        name="login refused",
        pattern=r"permission denied \(|permission denied, please try again|no supported authentication methods|"
        r"access denied|authentication failed|enter passphrase|password:\s*$",
        proves="the login node answers; it does not accept this login",
        cause="a one-time login name that has run out or is mistyped, or a key that it does not know",
        todo=_LOGIN,
    ),
    Message(
        name="ssh handshake",
        pattern=r"kex_exchange_identification|ssh_exchange_identification|banner exchange",
        proves="the login node's port was reached; its sshd ended the talk before it began",
        cause="too many connections at once, a gateway that wants a VPN, or an address that is blocked for a while",
        todo="wait a minute and repeat step 1; check the VPN",
    ),
    Message(
        name="login over",
        pattern=r"connection to \S+ closed by remote host|connection closed by (\S+ port|remote)|received disconnect",
        proves="the login node was reached; it ended the connection",
        cause="the login session was ended by the site or has run out, or the login node restarts",
        todo=f"repeat step 1; where it asks for a login again: {_LOGIN}",
    ),
    Message(
        name="host key",
        pattern=r"host key verification failed|remote host identification has changed|no matching host key",
        proves="something answers under the login node's name, with another key than the laptop remembers",
        cause="the login node was set up anew, or it is not the login node",
        todo="ask the site for its key's fingerprint; if it is right: `ssh-keygen -R HOST`, then step 1 again",
    ),
    Message(
        name="unknown host",
        pattern=r"could not resolve host|name or service not known|nodename nor servname|no such host is known|"
        r"ERR_NAME_NOT_RESOLVED|DNS_PROBE",
        proves="the laptop does not find the host by its name",
        cause="HOST is mistyped, the VPN is off, or the cluster's inner name was printed instead of the outer one",
        todo="`hpc tunnel --host HOST` with the name that you log in to; the site profile's login_host keeps it",
    ),
    Message(
        name="login node unreachable",
        pattern=r"connect to (host|address) .*(timed out|no route|unreachable)|ssh: connect to host .* port|"
        r"connection timed out|operation timed out",
        proves="the laptop gets no answer from the login node",
        cause="the VPN is off, HOST is wrong, or a firewall is in the way",
        todo="check that a plain `ssh HOST -l LOGIN` works; `hpc tunnel --host HOST` prints step 1 with another host",
    ),
    Message(
        name="connection broken",
        pattern=r"client_loop|broken pipe|connection reset by \S+ port|software caused connection abort|"
        r"timeout, server .* not responding",
        proves="the connection to the login node was there, and broke",
        cause="the network changed, the laptop slept, or the site ends idle connections",
        todo="repeat step 1: the job goes on. `-o ServerAliveInterval=30` in it keeps an idle tunnel open",
    ),
    Message(
        name="browser: refused",
        pattern=r"ERR_CONNECTION_REFUSED|refused to connect|unable to connect|can.t (establish a )?connect(ion)?|"
        r"failed to connect to (localhost|127)",
        proves="nothing listens on this port of the laptop",
        cause="the tunnel of step 1 is not open, or has another local port than the address",
        todo=_TUNNEL,
        by="browser",
    ),
    Message(
        name="browser: empty or reset",
        pattern=r"ERR_EMPTY_RESPONSE|ERR_CONNECTION_RESET|ERR_CONNECTION_CLOSED|connection (was )?reset|"
        r"empty reply from server|didn.t send any data|recv failure",
        proves="the tunnel is open on the laptop; nothing behind it answers",
        cause="the service is not ready or its job is over: the window of step 1 then says `open failed`",
        todo=_AGAIN,
        by="browser",
        service=True,
    ),
    Message(
        name="browser: https",
        pattern=r"ERR_SSL_PROTOCOL_ERROR|SSL_ERROR_RX_RECORD_TOO_LONG|wrong version number|PR_END_OF_FILE",
        proves="the tunnel works; the browser speaks https and the service http",
        cause="https:// in the address; inside the tunnel ssh encrypts",
        todo="open the address of step 2 as it is printed, with http://",
        by="browser",
    ),
    Message(
        name="browser: timed out",
        pattern=r"ERR_CONNECTION_TIMED_OUT|ERR_TIMED_OUT|took too long to respond|504 gateway",
        proves="the address does not lead to the laptop's own end of the tunnel, or nothing answers behind it",
        cause="the node's name stands in the browser's address, or a proxy is asked for localhost",
        todo="open the address of step 2 as it is printed, with localhost; take localhost out of the browser's proxy",
        by="browser",
        service=True,
    ),
    Message(
        name="jupyter: token",
        pattern=r"password or token|token authentication is enabled|log in with a token|\b401\b|invalid credentials",
        proves="the tunnel works, and JupyterLab answers",
        cause="the address has no token, or that of an earlier job: every job has its own",
        todo="open the whole address of step 2 as `hpc tunnel` prints it now, with ?token=…",
        by="jupyter",
        service=True,
    ),
    Message(
        name="jupyter: _xsrf",
        pattern=r"_xsrf|xsrf cookie",
        proves="the tunnel works, and JupyterLab answers",
        cause="the browser holds the cookies of an earlier JupyterLab on the same localhost port",
        todo="reload the page of step 2; else use a private window, or another port with `hpc tunnel --local-port N`",
        by="jupyter",
    ),
    Message(
        name="forbidden",
        pattern=r"\b403\b|forbidden",
        proves="the tunnel works, and the service answers; it does not accept the token",
        cause="the address has no token, or that of an earlier job; or the tunnel leads to somebody else's service",
        todo="run `hpc tunnel` again, and use both steps as it prints them now",
        by="jupyter",
        service=True,
    ),
    Message(
        name="jupyter: websocket",
        pattern=r"websocket|kernel (connection|disconnected|error)|connecting to kernel|server connection error|"
        r"a connection to the jupyter server could not be established|dead kernel",
        proves="the page was loaded; its connection to the running server is gone",
        cause="the tunnel was closed (a laptop that slept), or the job is over",
        todo=f"{_TUNNEL}; repeat step 1, then reload the page: kernels go on as long as the job does",
        by="jupyter",
        service=True,
    ),
    Message(
        name="connection refused",
        pattern=r"connection refused",
        proves="a machine was reached that does not listen on this port",
        cause="HOST is not the login node; or, in a browser or curl, the tunnel of step 1 is not open",
        todo=f"check HOST in the command; {_TUNNEL}",
        service=True,
    ),
)
"""The more particular ones first: of one line, the first that fits is taken."""

_FORWARD = re.compile(
    r"(?:localhost|127\.0\.0\.1|\s|^|-L):?(\d{2,5}):([A-Za-z][\w.-]*|\d+(?:\.\d+){3}):(\d{2,5})(?![\d:])"
)


def recognise(text: str) -> list[Message]:
    """What stands in the text, each message once, in the order of its lines."""
    return list(dict.fromkeys(m for line in text.splitlines() for m in _first(line)))


def _first(line: str) -> Iterator[Message]:
    found = next((m for m in MESSAGES if re.search(m.pattern, line, re.IGNORECASE)), None)
    if found is not None:
        yield found


def forwards(text: str) -> list[Forward]:
    """Where the ssh commands in the text lead.

    >>> forwards("ssh -L localhost:9999:dgx06:9250 login -l me")
    [Forward(local=9999, host='dgx06', port=9250)]
    """
    return [Forward(int(a), host, int(b)) for a, host, b in _FORWARD.findall(text)]
