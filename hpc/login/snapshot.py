"""The code that a run's jobs import, and what the user's project looked like: kept at submission."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from hpc.core import config as configs
from hpc.core.assets import PACKAGES, TEMPLATES

_FOLDERS = ("hpc/core", "hpc/node", "hpc/inside", "stages")


def files() -> list[tuple[str, Path]]:
    """(name in the snapshot, file) of everything that runs off the login node."""
    found = [("hpc/__init__.py", PACKAGES / "hpc" / "__init__.py")]
    for folder in _FOLDERS:
        found += [(f"{folder}/{p.name}", p) for p in sorted((PACKAGES / folder).glob("*.py"))]
    found += [(f"templates/{p.relative_to(TEMPLATES)}", p) for p in sorted(TEMPLATES.rglob("*")) if p.is_file()]
    return found


def digest() -> str:
    """The content of `files()` as one short key."""
    return configs.key_of(*[part for name, path in files() for part in (name, path.read_bytes())])


def copy(target: Path) -> None:
    """Copy `files()` to a new folder."""
    for name, path in files():
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def git_state(root: Path) -> tuple[dict[str, Any] | None, str]:
    """(commit and whether it has changes, the uncommitted patch) of the user's project; (None, "") outside git.

    `changed` is None where git did not tell in time.
    """
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return None, ""
    patch = _git(root, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv", "--no-color")
    status = _git(root, "status", "--porcelain", "--untracked-files=normal") or ""
    untracked = [line[3:] for line in status.splitlines() if line.startswith("??")]
    changed = None if patch is None else bool(patch)
    return {"commit": head.strip(), "changed": changed, "untracked": untracked}, patch or ""


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
