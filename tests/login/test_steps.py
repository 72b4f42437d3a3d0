"""What a laptop is told: the command of each reach, ports that every laptop allows, names that are one word."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hpc.core.endpoint import Endpoint
from hpc.core.errors import UsageError
from hpc.login import steps

LAB = Endpoint(
    host="dgx06", bound="0.0.0.0", ports={"http": 9250}, path="/lab", health="/api/status", job_id="7", pid=1,
    ready=100.0,
)  # fmt: skip
TRITON = replace(LAB, ports={"http": 9000, "grpc": 9001, "metrics": 9002}, path="/")
SOCKETS = {name: f"/home/me/.local/state/hpc/relay-login-7-{name}.sock" for name in TRITON.ports}


def make(endpoint: Endpoint = LAB, **changes: Any) -> steps.Tunnel:
    values: dict[str, Any] = {
        "run": "jupyter-3", "stage": "jupyter", "attempt": 1, "token": "s3cret", "reach": "direct",
        "host": "ssh.axis.io", "login": "klm-v5", "user": "alice", "first": None, "ends": None, "sockets": {},
    }  # fmt: skip
    return steps.make(endpoint=endpoint, **{**values, **changes})


def test_direct_is_the_command_that_users_know() -> None:
    assert make().command == "ssh -N -L localhost:9999:dgx06:9250 ssh.axis.io -l klm-v5"
    assert make().url == "http://localhost:9999/lab?token=s3cret"


def test_all_ports_are_in_one_command() -> None:
    assert make(TRITON).command == (
        "ssh -N -L localhost:18000:dgx06:9000 -L localhost:18001:dgx06:9001 -L localhost:18002:dgx06:9002"
        " ssh.axis.io -l klm-v5"
    )


def test_jump_ends_on_the_node_as_its_user() -> None:
    loopback = replace(LAB, bound="127.0.0.1")
    assert make(loopback, reach="jump").command == (
        "ssh -N -J klm-v5@ssh.axis.io -L localhost:9999:localhost:9250 -l alice dgx06"
    )


def test_relay_ends_at_the_sockets() -> None:
    made = make(replace(LAB, bound="127.0.0.1"), reach="relay", sockets={"http": SOCKETS["http"]})
    assert made.command == f"ssh -N -L localhost:9999:{SOCKETS['http']} ssh.axis.io -l klm-v5"
    assert made.relay == {"http": SOCKETS["http"]}
    assert make().relay is None


def test_service_on_this_very_machine() -> None:
    made = make(replace(LAB, bound="127.0.0.1"))
    assert made.command == "ssh -N -L localhost:9999:localhost:9250 ssh.axis.io -l klm-v5"
    assert "On dgx06 itself: http://localhost:9250/lab?token=s3cret\n" in steps.text(made, 0)


def test_local_port_is_a_choice_within_what_every_laptop_allows() -> None:
    assert make(first=1024).command.startswith("ssh -N -L localhost:1024:")
    assert make(TRITON, first=20000).local_ports == {"http": 20000, "grpc": 20001, "metrics": 20002}
    for port in (-1, 80, 1023, 49152, 70000):
        with pytest.raises(UsageError):
            make(first=port)
    with pytest.raises(UsageError):
        make(TRITON, first=49150)


@pytest.mark.parametrize("name", ["klm-v5xx45", "alice", "a.b@realm", "A_1+x"])
def test_names_that_are_one_word(name: str) -> None:
    assert steps.checked("--login", name) == name


@pytest.mark.parametrize("name", ["", "-oProxyCommand=x", "a b", "a;b", "a\nb", "$(x)", "'a'", "한글"])
def test_names_that_a_shell_would_read_otherwise(name: str) -> None:
    with pytest.raises(UsageError):
        steps.checked("--login", name)


def test_text_has_both_steps_and_how_long_it_stays() -> None:
    lines = steps.text(make(ends=100 + 4 * 3600), 100).splitlines()
    assert lines[0].startswith("jupyter-3/jupyter is ready on dgx06:9250, until ")
    assert lines[0].endswith("(in 4 h 0 min)")
    assert "Step 1: in a terminal on your laptop (a second window; leave it open):" in lines
    assert f"    {make().command}" in lines
    assert "Step 2: in your browser:" in lines
    assert f"    {make().url}" in lines
    assert "until" not in steps.text(make(), 100)


def test_text_names_the_local_end_of_each_port() -> None:
    said = steps.text(make(TRITON), 100)
    assert "http: localhost:18000, grpc: localhost:18001, metrics: localhost:18002" in said
