"""What it costs to start a container, by the way in which its image is opened, as an ordinary user."""

from __future__ import annotations

from collections.abc import Iterator

from ground import ground
from measure import Line, Pair

ROUNDS = 10
_SHIELDED = """\
import subprocess, sys
from hpc.node.shield import shielded
child = subprocess.Popen(sys.argv[1:])
with shielded(child.pid):
    sys.exit(child.wait())
"""
_PLAIN = "import subprocess, sys; sys.exit(subprocess.Popen(sys.argv[1:]).wait())"
PAYLOAD = ("python3", "-c", "pass")


def lines(rounds: int) -> Iterator[Line]:
    with ground() as here:
        image, sandbox = str(here.image), str(here.folder / "sandbox")
        here.run("apptainer", "--silent", "build", "--sandbox", sandbox, image)
        traced = str(here.write("shielded.py", _SHIELDED))
        plain = [here.python, "-c", _PLAIN, "apptainer", "--silent", "exec"]
        modes = {
            "the image, by squashfuse": [*plain, image, *PAYLOAD],
            "the image, by squashfuse that is shielded from signals": [
                here.python, traced, "apptainer", "--silent", "exec", image, *PAYLOAD,
            ],
            "a sandbox folder on the node's disk": [*plain, sandbox, *PAYLOAD],
            "--unsquash, into a temporary folder": [*plain, "--unsquash", image, *PAYLOAD],
        }  # fmt: skip
        taken = here.processes(modes, rounds)
        first, *others = modes
        for name in others:
            yield Pair(what=f"container start: {name}", ms=taken[name], against=first, against_ms=taken[first])
