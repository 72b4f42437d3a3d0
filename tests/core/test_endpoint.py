"""The announcement of a service, and the address that a person opens."""

from __future__ import annotations

from pathlib import Path

from hpc.core import endpoint
from hpc.core.endpoint import Endpoint
from hpc.core.rundir import StageDir

ONE = Endpoint(
    host="dgx06", bound="0.0.0.0", ports={"http": 9250, "grpc": 9251}, path="/lab", health="/api/status",
    job_id="7", pid=11, ready=1.5,
)  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = StageDir(tmp_path)
    assert endpoint.read(folder) is None
    endpoint.write(folder, ONE, "secret")
    assert endpoint.read(folder) == ONE
    assert folder.token.read_text() == "secret"
    endpoint.clear(folder)
    endpoint.clear(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_ends_leaves_what_a_later_one_announced(tmp_path: Path) -> None:
    folder = StageDir(tmp_path)
    endpoint.write(folder, ONE, "secret")
    endpoint.clear(folder, "6")
    assert endpoint.read(folder) == ONE
    endpoint.clear(folder, "7")
    assert endpoint.read(folder) is None


def test_first_port_is_the_one_to_open() -> None:
    assert (ONE.port, ONE.address) == (9250, "dgx06:9250")


def test_page_has_the_token_in_its_query() -> None:
    assert endpoint.page(ONE, "s", 9999) == "http://localhost:9999/lab?token=s"


def test_announcement_of_another_version_is_none(tmp_path: Path) -> None:
    StageDir(tmp_path).endpoint.write_text('{"schema": "hpc.endpoint/2", "where": "elsewhere"}')
    assert endpoint.read(StageDir(tmp_path)) is None
