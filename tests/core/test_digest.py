"""Content hashes: a large file is read once, and a change is always seen."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from hpc.core import digest
from hpc.core.digest import Digests, sha256, tree
from hpc.core.errors import UsageError

LARGE = b"x" * (1 << 17)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "digests.json"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are really read from now on."""
    read: list[Path] = []
    real = digest.sha256

    def count(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(digest, "sha256", count)
    return read


def test_sha256_is_sha256(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"abc" * 10**6)
    assert sha256(file) == hashlib.sha256(b"abc" * 10**6).hexdigest()


def test_large_file_is_read_once(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    file.write_bytes(LARGE)
    read = counted(monkeypatch)
    first = Digests(store)
    value = first.of(file)
    assert first.of(file) == value
    first.save()
    assert Digests(store).of(file) == value
    assert read == [file]


@pytest.mark.parametrize("entry", ["text", [], ["seen"], {"a": 1}])
def test_entry_that_is_none_of_ours_is_made_anew(tmp_path: Path, store: Path, entry: object) -> None:
    file = tmp_path / "f"
    file.write_bytes(LARGE)
    value = Digests(store).of(file)
    store.parent.mkdir()
    store.write_text(json.dumps({str(file): entry}))
    assert Digests(store).of(file) == value


def test_changed_content_of_the_same_size_and_time_is_seen(tmp_path: Path, store: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(LARGE)
    before = file.stat()
    digests = Digests(store)
    old = digests.of(file)
    digests.save()
    with open(file, "r+b") as changed:
        changed.write(b"y")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p or rsync -t would
    assert Digests(store).of(file) != old


def test_replaced_file_is_seen(tmp_path: Path, store: Path) -> None:
    file, other = tmp_path / "f", tmp_path / "g"
    file.write_bytes(LARGE)
    other.write_bytes(LARGE[:-1] + b"y")
    digests = Digests(store)
    old = digests.of(file)
    os.replace(other, file)
    assert digests.of(file) != old


def test_small_files_are_always_read(tmp_path: Path, store: Path) -> None:
    file = tmp_path / "f"
    file.write_text("a")
    digests = Digests(store)
    digests.of(file)
    digests.save()
    assert not store.exists()


def test_folder_counts_by_names_and_contents(tmp_path: Path, store: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "a").write_text("a")
    digests = Digests(store)
    same = digests.of(one)
    assert digests.of(two) == same
    (two / "sub" / "a").rename(two / "sub" / "b")
    assert digests.of(two) != same


def test_tree_leaves_byte_code_out_and_sorts(tmp_path: Path) -> None:
    for name in ("b", "a", "__pycache__/x.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert list(tree(tmp_path)) == ["a", "b"]


def test_tree_of_a_file_is_the_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("x")
    assert tree(file) == {"f": sha256(file)}


def test_missing_file_is_a_usage_error(tmp_path: Path, store: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*/none: No such file"):
        Digests(store).of(tmp_path / "none")


def test_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    file = tmp_path / "f"
    file.write_bytes(LARGE)
    digests = Digests(tmp_path / "cache" / "digests.json")
    assert digests.of(file) == sha256(file)
    digests.save()


def test_very_large_file_is_announced(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    with open(file, "wb") as sparse:
        sparse.truncate((1 << 30) + 1)
    monkeypatch.setattr(digest, "sha256", lambda path: "0" * 64)
    said: list[str] = []
    Digests(store, said.append).of(file)
    assert said == [f"reading {file} (1.0 GiB) once, to know its content"]


def test_cache_that_is_broken_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "digests.json").write_text("{")
    file = tmp_path / "f"
    file.write_bytes(LARGE)
    assert Digests(tmp_path / "digests.json").of(file) == sha256(file)


def test_two_that_learn_at_once_both_keep_it(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in "fg"]
    both = Digests(store), Digests(store)
    for file, digests in zip(files, both, strict=True):
        file.write_bytes(LARGE)
        digests.of(file)
    for digests in both:
        digests.save()
    read = counted(monkeypatch)
    assert [Digests(store).of(file) for file in files] == [hashlib.sha256(LARGE).hexdigest()] * 2
    assert read == []
