"""Each message that people meet is known, and what it proves; of the live state only what bears on the cause counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc.login import explain, tunnel

SAID = [
    ("channel 3: open failed: connect failed: Connection refused", "open failed: refused"),
    ("channel 2: open failed: connect failed: open failed", "open failed: refused"),
    ("channel 2: open failed: connect failed: No such file or directory", "open failed: refused"),
    ("channel 4: open failed: connect failed: No route to host", "open failed: no route"),
    ("channel 4: open failed: connect failed: Connection timed out", "open failed: timed out"),
    ("channel 3: open failed: connect failed: Name or service not known", "open failed: unknown name"),
    ("channel 3: open failed: connect failed: Temporary failure in name resolution", "open failed: unknown name"),
    ("channel 2: open failed: administratively prohibited: open failed", "administratively prohibited"),
    ("channel 5: open failed: unknown channel type: ", "open failed"),
    ("bind [127.0.0.1]:9999: Address already in use", "local port in use"),
    ("channel_setup_fwd_listener_tcpip: cannot listen to port: 9999", "local port in use"),
    ("Could not request local forwarding.", "local port in use"),
    ("bind [127.0.0.1]:9999: Only one usage of each socket address is normally permitted", "local port in use"),
    ("bind [127.0.0.1]:8000: Permission denied", "local port not allowed"),
    ("bind [127.0.0.1]:80: Permission denied", "local port not allowed"),
    ("Privileged ports can only be forwarded by root.", "local port not allowed"),
    ("An attempt was made to access a socket in a way forbidden by its access permissions.", "local port not allowed"),
    ("Error: remote port forwarding failed for listen port 9999", "remote forwarding"),
    ("Received disconnect from 1.2.3.4 port 22:2: Too many authentication failures", "too many keys"),
    ("klm-v5@ssh.axis.io: Permission denied (publickey,keyboard-interactive).", "login refused"),
    ("Permission denied, please try again.", "login refused"),
    ("klm-v5@ssh.axis.io's password: ", "login refused"),
    ("Connection to ssh.axis.io closed by remote host.", "login over"),
    ("Connection closed by 1.2.3.4 port 22", "login over"),
    ("Host key verification failed.", "host key"),
    ("@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @", "host key"),
    ("kex_exchange_identification: Connection closed by remote host", "ssh handshake"),
    ("kex_exchange_identification: read: Connection reset by peer", "ssh handshake"),
    ("banner exchange: Connection to 1.2.3.4 port 22: Connection refused", "ssh handshake"),
    ("ssh: Could not resolve hostname ssh.axis.io: Name or service not known", "unknown host"),
    ("ssh: Could not resolve hostname curiosity: No such host is known.", "unknown host"),
    ("DNS_PROBE_FINISHED_NXDOMAIN", "unknown host"),
    ("ssh: connect to host ssh.axis.io port 22: Connection timed out", "login node unreachable"),
    ("ssh: connect to host ssh.axis.io port 22: Connection refused", "login node unreachable"),
    ("connect to address 1.2.3.4 port 22: No route to host", "login node unreachable"),
    ("Connection timed out", "login node unreachable"),
    ("This site can't be reached. localhost refused to connect. ERR_CONNECTION_REFUSED", "browser: refused"),
    ("Unable to connect: Firefox can't establish a connection to the server at localhost:9999.", "browser: refused"),
    ("curl: (7) Failed to connect to localhost port 9999 after 0 ms: Couldn't connect to server", "browser: refused"),
    ("This page isn't working: localhost didn't send any data. ERR_EMPTY_RESPONSE", "browser: empty or reset"),
    ("The connection was reset", "browser: empty or reset"),
    ("ERR_CONNECTION_RESET", "browser: empty or reset"),
    ("curl: (52) Empty reply from server", "browser: empty or reset"),
    ("ERR_SSL_PROTOCOL_ERROR", "browser: https"),
    ("Error code: SSL_ERROR_RX_RECORD_TOO_LONG", "browser: https"),
    ("dgx06 took too long to respond. ERR_CONNECTION_TIMED_OUT", "browser: timed out"),
    ("Password or token: [Log in]", "jupyter: token"),
    ("Token authentication is enabled", "jupyter: token"),
    ("Invalid credentials", "jupyter: token"),
    ("'_xsrf' argument missing from POST", "jupyter: _xsrf"),
    ("403 : Forbidden", "forbidden"),
    ("403 GET /api/kernels (127.0.0.1): Forbidden", "forbidden"),
    ("WebSocket connection failed", "jupyter: websocket"),
    ("Server Connection Error: A connection to the Jupyter server could not be established.", "jupyter: websocket"),
    ("client_loop: send disconnect: Broken pipe", "connection broken"),
    ("client_loop: send disconnect: Connection reset", "connection broken"),
    ("Connection reset by 1.2.3.4 port 22", "connection broken"),
    ("Timeout, server ssh.axis.io not responding.", "connection broken"),
    ("ConnectionRefusedError: [Errno 111] Connection refused", "connection refused"),
]


@pytest.mark.parametrize(("text", "name"), SAID)
def test_message_is_known(text: str, name: str) -> None:
    assert [m.name for m in explain.recognise(text)] == [name]


def test_every_message_of_the_table_is_tested_and_complete() -> None:
    assert {name for _, name in SAID} == {m.name for m in explain.MESSAGES}
    for message in explain.MESSAGES:
        assert all((message.proves, message.cause, message.todo)), message.name


def test_what_is_not_known_is_not_guessed() -> None:
    assert explain.recognise("") == []
    assert explain.recognise("Last login: Tue Nov 24\n한글 hello\nWelcome to DGX OS") == []


def test_several_lines_are_told_once_each_in_their_order() -> None:
    text = (
        "bind [127.0.0.1]:9999: Address already in use\n"
        + 2 * "channel 3: open failed: connect failed: Connection refused\n"
    )
    assert [m.name for m in explain.recognise(text)] == ["local port in use", "open failed: refused"]


@pytest.mark.parametrize(
    ("text", "led"),
    [
        ("ssh -N -L localhost:9999:dgx06:9250 ssh.axis.io -l klm", [(9999, "dgx06", 9250)]),
        ("ssh -L 9999:dgx06.cluster:9250 h", [(9999, "dgx06.cluster", 9250)]),
        ("ssh -L 80:a:9250 -L127.0.0.1:18001:10.0.0.6:9001 h", [(80, "a", 9250), (18001, "10.0.0.6", 9001)]),
        ("at 12:30:11 from 10.0.0.1:22", []),
        ("ssh -N -L localhost:9999:/home/me/relay.sock host", []),
    ],
)  # fmt: skip
def test_where_a_pasted_command_leads(text: str, led: list[tuple[int, str, int]]) -> None:
    assert [(f.local, f.host, f.port) for f in explain.forwards(text)] == led


LIVE = {
    "what": "jupyter-3/jupyter", "state": "RUNNING", "phase": "ready on dgx06", "active": True,
    "address": "dgx06:9250", "ports": {"http": 9250}, "answers": True, "said": "answers",
}  # fmt: skip
REFUSED = "channel 3: open failed: connect failed: Connection refused"


def proved(monkeypatch: pytest.MonkeyPatch, text: str, **live: Any) -> dict[str, str]:
    monkeypatch.setattr(tunnel, "standing", lambda way: {**LIVE, **live})
    (match,) = tunnel.explained(text, None)["matches"]
    return {name: match[name] for name in ("cause", "todo")}


@pytest.mark.parametrize(
    ("live", "cause", "todo"),
    [
        ({}, "answers now: it was not ready when you tried", "prints both steps anew"),
        ({"what": ""}, "you have no service", "hpc submit jupyter"),
        ({"active": False, "phase": "FAILED broken", "address": ""}, "is over: FAILED broken", "hpc submit jupyter"),
        ({"address": "", "phase": "staging 62%"}, "does not answer yet: staging 62%", "waits for it"),
        ({"answers": False, "said": "gives no answer"}, "from this machine it gives no answer", "hpc doctor"),
    ],
)  # fmt: skip
def test_live_state_decides_about_the_cause(
    monkeypatch: pytest.MonkeyPatch, live: dict[str, Any], cause: str, todo: str
) -> None:
    found = proved(monkeypatch, REFUSED, **live)
    assert cause in found["cause"]
    assert todo in found["todo"]


@pytest.mark.parametrize("target", ["dgx05:9250", "dgx06:9311"])
def test_command_that_leads_elsewhere_is_named(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    text = f"$ ssh -N -L localhost:9999:{target} ssh.axis.io -l klm\n{REFUSED}"
    assert proved(monkeypatch, text)["cause"] == (
        f"the command leads to {target}, and the service is on dgx06:9250 now"
    )


def test_laptops_own_trouble_is_not_put_on_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    found = proved(monkeypatch, "bind [127.0.0.1]:9999: Address already in use", active=False)
    assert "earlier tunnel" in found["cause"]


def test_verb_says_by_its_exit_code_whether_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hpc.login import cli

    monkeypatch.chdir(tmp_path)
    assert cli.main(["tunnel", "--explain", REFUSED]) == 0
    assert "nothing listens on that port" in capsys.readouterr().out
    assert cli.main(["tunnel", "--explain", "what is this", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["matches"] == []
    assert cli.main(["tunnel", "--explain", REFUSED, "jupyter-9"]) == 7
