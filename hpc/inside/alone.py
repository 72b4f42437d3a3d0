"""A network and a shared memory that no other user of the node reaches: looked for, else made (Linux, unshare(2))."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

from hpc.core.errors import HpcError

_NEWUSER, _NEWNET, _NEWNS = 0x10000000, 0x40000000, 0x00020000
_SIOCSIFFLAGS, _UP_RUNNING = 0x8914, 0x41
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18


def is_alone() -> bool:
    """True where this process sees no network but its own loopback."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return {line.partition(":")[0].strip() for line in lines} <= {"lo"}


def become() -> None:
    """Leave the node's network, sockets that are open excepted. HpcError where the system does not let us.

    For a stage that runs without an image; Apptainer does it for the others. It must be called while there is one
    thread.
    """
    if is_alone():
        return
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWUSER | _NEWNET | _NEWNS):
        raise _refused(os.strerror(ctypes.get_errno()))
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        _loopback_up()
    except OSError as error:
        raise _refused(str(error.strerror)) from error
    libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"mode=0700"):
        raise _refused(os.strerror(ctypes.get_errno()))


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _UP_RUNNING))


def _refused(why: str) -> HpcError:
    return HpcError(
        f"the server cannot be kept from other users of this machine: {why}",
        hint="serve from an image; or set serve.private = false where nobody else is on the machine",
    )
