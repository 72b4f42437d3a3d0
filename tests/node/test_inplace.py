"""An image without a copy on the node: read again only where its file was touched, and refused where it is another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc.core import imagelock
from hpc.core.digest import sha256
from hpc.core.errors import HpcError, VerificationFailed
from hpc.node import inplace
from hpc.node.inplace import InPlace, check


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "train.sif"
    path.write_bytes(os.urandom(100_000))
    return path


@pytest.fixture
def planned(image: Path) -> InPlace:
    return InPlace(path=str(image), sha256=sha256(image), stat=imagelock.look(image))


def overwrite(image: Path) -> None:
    with open(image, "r+b") as file:
        file.seek(500)
        file.write(b"x" if file.read(1) != b"x" else b"y")


def replace(image: Path) -> None:
    other = image.with_name("other")
    other.write_bytes(bytes(100_000))
    os.replace(other, image)


def test_an_untouched_image_is_not_read(planned: InPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace, "sha256", lambda path: pytest.fail("it was read"))
    check(planned)


@pytest.mark.parametrize("change", [overwrite, replace, lambda image: os.truncate(image, 99_999)])
def test_a_changed_image_is_refused_with_both_digests(
    image: Path, planned: InPlace, change: Callable[[Path], None]
) -> None:
    stat = image.stat()
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    change(image)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as somebody would who wants it unseen
    with pytest.raises(VerificationFailed) as refused:
        check(planned)
    assert refused.value.exit_code == 6
    assert planned.sha256 in refused.value.message
    assert sha256(image) in refused.value.message


def test_the_same_content_in_another_file_is_read_and_runs(image: Path, planned: InPlace) -> None:
    copy = image.with_name("copy")
    copy.write_bytes(image.read_bytes())
    os.replace(copy, image)
    told: list[int] = []
    check(planned, lambda: told.append(1))
    assert told == [1]


def test_an_image_that_is_gone_is_said(image: Path, planned: InPlace) -> None:
    image.unlink()
    with pytest.raises(HpcError, match="cannot be read: No such file") as error:
        check(planned)
    assert error.value.hint == "do all nodes see it?"
