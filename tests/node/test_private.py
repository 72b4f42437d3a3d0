"""A private service answers on a socket that was opened outside its network."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.core import endpoint
from hpc.core.endpoint import FIRST_PORT, HANDED, LAST_PORT
from hpc.core.errors import HpcError
from hpc.node import launch, private

CHECKOUT = Path(private.__file__).resolve().parents[2]
ALONE = f"""
import os, socket
from hpc.inside import alone
alone.become()
assert alone.is_alone() and os.getuid() == {os.getuid()}, "not alone"
own = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))  # its own loopback is up, and has all ports
socket.create_connection(own.getsockname())
assert os.listdir("/dev/shm") == []
handed = socket.socket(fileno=int(os.environ["{HANDED}"].split("=")[1]))
print("up", flush=True)
client, _ = handed.accept()
client.sendall(b"in")
"""


def test_a_socket_is_opened_where_it_is_asked_for() -> None:
    with private.sockets_for("127.0.0.1", ("http", "grpc")) as sockets:
        assert list(sockets) == ["http", "grpc"]
        for number in sockets.values():
            with socket.socket(fileno=os.dup(number)) as seen:
                address, port = seen.getsockname()
            assert (address, FIRST_PORT <= port <= LAST_PORT) == ("127.0.0.1", True)
            socket.create_connection((address, port)).close()
        told = endpoint.handing(sockets)
        assert told == {HANDED: f"http={sockets['http']} grpc={sockets['grpc']}"}
        assert endpoint.handed(told) == sockets
    for number in endpoint.handed(told).values():  # the port itself may be another program's at once
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)
    with private.sockets_for("", ("http",)) as sockets:
        assert (sockets, endpoint.handing(sockets)) == ({}, {})


def test_an_address_that_is_not_here_is_told() -> None:
    with pytest.raises(HpcError), private.sockets_for("192.0.2.1", ("http",)):
        pass


def test_the_container_has_nothing_of_the_nodes_network_and_memory() -> None:
    def argv(private: bool) -> list[str]:
        return list(
            launch.container(
                program="apptainer", image="/i.sif", inner=("x",), env={}, passes=(), binds=(), gpus=False, cwd="/",
                private=private,
            ).argv
        )  # fmt: skip

    assert [word for word in argv(True) if word not in argv(False)] == ["--net", "--network", "none", "--contain"]
    assert launch.beside(argv(True), ("sh",), "/w")[-2:] == ("/i.sif", "sh")


def test_a_stage_without_an_image_leaves_the_network_itself() -> None:
    """It still answers on the socket from outside, and on nothing else."""
    with private.sockets_for("127.0.0.1", ("http",)) as sockets, socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # outside nobody else can listen on it, nor does this
        port = held.getsockname()[1]
        env = {**os.environ, **endpoint.handing(sockets), "PYTHONPATH": str(CHECKOUT), "PORT": str(port)}
        process = subprocess.Popen(
            [sys.executable, "-c", ALONE], env=env, pass_fds=tuple(sockets.values()), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            _, said = process.communicate()
            assert "cannot be kept from other users" in said, said
            pytest.skip("this machine lets nobody make namespaces")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        with socket.socket(fileno=os.dup(sockets["http"])) as seen:
            address = seen.getsockname()
        with socket.create_connection(address) as client:
            assert client.recv(2) == b"in"
        process.communicate(timeout=60)
