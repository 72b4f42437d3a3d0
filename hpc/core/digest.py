"""Content hashes of files and folders; each large file is read once, then known by its size and times."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from hpc.core.errors import UsageError
from hpc.core.rundir import read_json, write_json

_CHUNK = 1 << 20
_SMALL = 1 << 16


def sha256(path: Path) -> str:
    """The file's sha256 as 64 hex digits (hashlib is several times faster than coreutils' sha256sum)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def tree(path: Path, hash_file: Callable[[Path], str] = sha256) -> dict[str, str]:
    """Relative name -> sha256 of every file below a folder (or of the one file), sorted by name."""
    if path.is_file():
        return {path.name: hash_file(path)}
    found = {}
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if f != "__pycache__")
        for name in sorted(files):
            file = Path(folder) / name
            found[str(file.relative_to(path))] = hash_file(file)
    return found


class Digests:
    """Hashes remembered in a file between calls, by path, size, change time and inode."""

    def __init__(self, store: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self._store = store
        self._say = say
        self._known: dict[str, list[str]] = {}
        self._loaded = self._changed = False

    def of(self, path: Path) -> str:
        """The content hash of a file, or of all files of a folder; UsageError where it isn't there."""
        if os.path.isdir(path):
            listing = json.dumps(tree(path, self._file), sort_keys=True)
            return hashlib.sha256(listing.encode()).hexdigest()
        return self._file(path)

    def save(self) -> None:
        """Keep what was learnt; a cache that can't be written is no error."""
        if self._changed:
            try:
                self._store.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._store, {**(read_json(self._store) or {}), **self._known})  # others learn too
            except OSError:
                pass

    def _file(self, path: Path) -> str:
        try:
            with open(path, "rb") as file:  # opening asks the file server; a stat alone may be told by an old memory
                stat = os.fstat(file.fileno())
        except OSError as error:
            raise UsageError(
                f"cannot read {path}: {error.strerror}", hint="check the path, and that you may read it"
            ) from error
        if stat.st_size < _SMALL:
            return sha256(path)
        if not self._loaded:
            self._known, self._loaded = read_json(self._store) or {}, True
        seen = f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
        name = str(path.resolve())
        known = self._known.get(name)
        if not (isinstance(known, list) and len(known) == 2 and known[0] == seen):
            if stat.st_size > 1 << 30:
                self._say(f"reading {path} ({stat.st_size / 2**30:.1f} GiB) once, to know its content")
            known = self._known[name] = [seen, sha256(path)]
            self._changed = True
        return known[1]
