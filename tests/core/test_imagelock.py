"""The lock of an image: what it says, when it is believed without reading the image, what happens when it is wrong."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hpc.core import imagelock
from hpc.core.digest import sha256
from hpc.core.errors import VerificationFailed
from hpc.core.imagelock import ImageLock


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A recorded image."""
    path = tmp_path / "train.sif"
    path.write_bytes(b"an image")
    versions = {"torch": "2.13.0", "six": "1.17.0", "python": "3.11.2"}
    imagelock.write(path, ImageLock(sha256=sha256(path), size=0, made="built", source="train.def", versions=versions))
    return path


def unread(path: Path) -> str:
    raise AssertionError(f"{path} was read")


def test_a_lock_comes_back_as_it_was_written(image: Path) -> None:
    lock = imagelock.read(image)
    assert lock is not None
    assert (lock.sha256, lock.size, lock.made) == (sha256(image), 8, "built")
    assert lock.told() == {"python": "3.11.2", "torch": "2.13.0"}, "what people ask for, not all of it"
    assert lock.by
    assert lock.at


def test_an_untouched_image_is_known_without_reading_it(image: Path) -> None:
    assert imagelock.digest(image, unread) == sha256(image)


def test_a_changed_image_is_refused_with_both_digests(image: Path) -> None:
    recorded = sha256(image)
    stat = image.stat()
    image.write_bytes(b"an imagE")
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a change that hides itself, as far as it can
    with pytest.raises(VerificationFailed) as caught:
        imagelock.digest(image, sha256)
    assert recorded in caught.value.message
    assert sha256(image) in caught.value.message
    assert "--force" in caught.value.hint


def test_an_image_that_was_moved_with_its_lock_is_read_once_and_then_known(image: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "train.sif"
    moved.parent.mkdir()
    for file in (image, imagelock.of(image)):
        shutil.copy(file, moved.parent)
    assert imagelock.digest(moved, sha256) == sha256(image)
    lock = imagelock.read(moved)
    assert lock is not None
    imagelock.renew(moved, lock)
    assert imagelock.digest(moved, unread) == sha256(image)


def test_an_image_without_a_lock_is_read(image: Path) -> None:
    imagelock.of(image).unlink()
    assert imagelock.read(image) is None
    assert imagelock.digest(image, sha256) == sha256(image)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "hpc.image/2"}', '{"schema": "hpc.image/1"}'])
def test_a_file_that_is_no_lock_counts_as_none(image: Path, text: str) -> None:
    imagelock.of(image).write_text(text)
    assert imagelock.read(image) is None


def test_a_lock_of_a_later_version_with_more_fields_is_read(image: Path) -> None:
    path = imagelock.of(image)
    path.write_text(path.read_text().replace("{", '{"news": 1,', 1))
    assert imagelock.read(image) is not None
