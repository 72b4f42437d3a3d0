"""PURE: the paths that a stage's config names: made absolute, and left out of its key."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

from hpc.core import config as configs


def absolute(config: Any, known: Mapping[str, str], files: Mapping[str, str]) -> Any:
    """The config with every path that it names made absolute."""
    changes: dict[str, Any] = dict(known)
    for name in (f.name for f in dataclasses.fields(config)):
        value = getattr(config, name)
        if isinstance(value, str) and value in files:
            changes[name] = files[value]
        elif isinstance(value, tuple) and any(_path(v, files) in files for v in value):
            changes[name] = tuple(_named(v, files) for v in value)
    return dataclasses.replace(config, **{k: v for k, v in changes.items() if hasattr(config, k)})


def content(config: Any, known: Mapping[str, str], files: Mapping[str, str]) -> dict[str, Any]:
    """The config as it counts in the key: a path counts by its content, not by where it lies."""
    gone = {*known.values(), *files.values()}
    return {k: _kept(v, gone) for k, v in configs.encode(config).items()}


def _kept(value: Any, paths: set[str]) -> Any:
    """The value without its paths; of NAME=PATH the name stays."""
    if isinstance(value, list) and any(_path(v, paths) in paths for v in value):
        names = [v.partition("=")[0] for v in value if v not in paths]
        return names or None
    return None if isinstance(value, str) and value in paths else value


def _path(entry: Any, paths: Container[str]) -> Any:
    """The path in an entry of a list: all of it, or what follows NAME=.

    >>> _path("a=1.jsonl", {"a=1.jsonl"}), _path("stars=adapters/stars", {"adapters/stars"})
    ('a=1.jsonl', 'adapters/stars')
    """
    return entry if entry in paths else str(entry).partition("=")[2]


def _named(entry: str, files: Mapping[str, str]) -> str:
    path = _path(entry, files)
    return entry.removesuffix(path) + files[path] if path in files else entry
