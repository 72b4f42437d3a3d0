"""
The Hugging Face hub: which files a repository has, what each must be, and why it says no.

The token comes from HF_TOKEN, or from the file `token` in the hub's folder (HF_HOME), which only its owner may read.
It is sent to the hub alone, and never shown.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from hpc.core.errors import HpcError, UsageError
from hpc.core.rundir import read_json, write_json
from hpc.inside.transfer import Expected, Remote

Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Repo:
    """A name on the hub, with the revision that was asked for."""

    name: str
    revision: str | None
    kind: Kind

    @staticmethod
    def of(text: str, kind: Kind) -> Repo:
        name, _, revision = text.partition("@")
        return Repo(name, revision or None, kind)

    def __str__(self) -> str:
        return self.name + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Entry:
    """One file of a repository."""

    path: str
    size: int | None
    sha256: str | None
    """Of a large file;"""
    git: str | None
    """git's name of a small one."""

    @property
    def digest(self) -> str:
        """Its name in a store of files."""
        return self.sha256 or f"git-{self.git}"

    @property
    def expected(self) -> Expected:
        return Expected(size=self.size, sha256=self.sha256, git=None if self.sha256 else self.git)


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    repo: Repo
    commit: str
    entries: tuple[Entry, ...]

    def only(self, patterns: Sequence[str], without: Sequence[str] = ()) -> Listing:
        """Those that match a pattern."""
        chosen = [
            e
            for e in self.entries
            if any(fnmatch(e.path, p) for p in patterns) and not any(fnmatch(e.path, p) for p in without)
        ]
        return Listing(self.repo, self.commit, tuple(chosen))


def offline() -> bool:
    """Whether the hub must not be asked."""
    return any(os.environ.get(name, "").lower() in ("1", "true", "on", "yes") for name in _OFFLINE)


_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def token(home: str | None) -> str | None:
    """The user's token, or None. UsageError where others may read its file."""
    given = os.environ.get("HF_TOKEN")
    if given:
        return given.strip()
    folder = home or os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    path = Path(folder) / "token"
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    if stat.S_IMODE(mode) & 0o077:
        raise UsageError(f"{path} holds a token that others may read", hint=f"chmod 600 {path}")
    return text or None


def listing(repo: Repo, token: str | None, memory: Path) -> Listing:
    """The repository's files, asked of the hub; offline, or where it can't be reached, as they were seen last.

    HpcError with the reason and the way out.
    """
    known = memory / f"{repo.kind}--{str(repo).replace('/', '--')}.json"
    if offline():
        return _remembered(repo, known) or _offline(repo)
    try:
        found = _ask(repo, token)
    except OSError as error:
        remembered = _remembered(repo, known)
        if remembered is not None:
            return remembered
        raise unreachable(repo, error) from error
    memory.mkdir(parents=True, exist_ok=True)
    write_json(known, {"commit": found.commit, "entries": [asdict(entry) for entry in found.entries]})
    return found


def _ask(repo: Repo, token: str | None) -> Listing:
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    try:
        info: Any = HfApi(endpoint=_endpoint(), token=token or False).repo_info(
            repo.name, repo_type=repo.kind, revision=repo.revision, files_metadata=True, timeout=30
        )
    except hub.GatedRepoError as error:
        raise gated(repo, token) from error
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as error:
        raise HpcError(
            f"the hub has no {repo.kind} '{repo.name}'"
            + (f" with revision '{repo.revision}'" if repo.revision else "")
            + ", or it is private",
            hint="check the name; for a private one set HF_TOKEN"
            if token is None
            else "check the name, and that your token's account may read it",
        ) from error
    except hub.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise gated(repo, token) from error
        raise
    except Exception as error:  # the client's own errors of the network are no OSErrors
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise OSError(str(error)) from error
        raise
    entries = (
        Entry(
            path=found.rfilename,
            size=found.size,
            sha256=(found.lfs or {}).get("sha256")
            if isinstance(found.lfs, dict)
            else getattr(found.lfs, "sha256", None),
            git=found.blob_id,
        )
        for found in info.siblings
    )
    return Listing(repo, info.sha, tuple(entries))


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def remote(found: Listing, entry: Entry, token: str | None) -> Remote:
    """Where the file is, at just this commit."""
    from huggingface_hub import hf_hub_url

    return Remote(
        url=hf_hub_url(
            found.repo.name, entry.path, repo_type=found.repo.kind, revision=found.commit, endpoint=_endpoint()
        ),
        expected=entry.expected,
        headers={"Authorization": f"Bearer {token}"} if token else None,
    )


def cached(found: Listing, entry: Entry) -> Path | None:
    """The same file in the hub's own cache, where the user has fetched it before."""
    from huggingface_hub import constants

    folder = f"{found.repo.kind}s--{found.repo.name.replace('/', '--')}"
    path = Path(constants.HF_HUB_CACHE) / folder / "blobs" / (entry.sha256 or entry.git or "")
    return path if path.is_file() else None


def gated(repo: Repo, token: str | None) -> HpcError:
    """The refusal of a gated repository, explained."""
    if token is None:
        return HpcError(
            f"'{repo.name}' is gated, and no token was given",
            hint=f"accept its licence on the page of {repo.name} on the hub; then set HF_TOKEN, or run `hf auth login`"
            " and set fetch.hub_home to the folder of its token",
        )
    return HpcError(
        f"'{repo.name}' is gated, and your token may not read it",
        hint=f"accept its licence on the page of {repo.name} on the hub, with the account that the token belongs to;"
        " a fine-grained token also needs the right to read gated repositories",
    )


def unreachable(repo: Repo, error: Exception) -> HpcError:
    """No network here, explained."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return HpcError(
        f"cannot get '{repo.name}' from the hub, which {os.uname().nodename} does not reach: {line}",
        hint='where only the login node has a network, set network = "login" in the site profile:'
        " fetch then runs there",
    )


def _remembered(repo: Repo, known: Path) -> Listing | None:
    found = read_json(known)
    if found is None:
        return None
    return Listing(repo, found["commit"], tuple(Entry(**entry) for entry in found["entries"]))


def _offline(repo: Repo) -> Listing:
    """What the hub's own cache has of the repository; HpcError where that is nothing."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub

    try:
        folder = Path(
            snapshot_download(
                repo.name,
                repo_type=repo.kind,
                revision=repo.revision,
                cache_dir=constants.HF_HUB_CACHE,
                local_files_only=True,
            )
        )
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, OSError, ValueError) as error:
        raise HpcError(
            f"HF_HUB_OFFLINE is set, and '{repo}' is neither in the cache of the runs nor in the hub's own",
            hint="unset HF_HUB_OFFLINE where there is a network, or fetch it there once",
        ) from error
    entries = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.resolve().name  # a file of the cache is named by its content
        large = len(name) == 64
        entries.append(
            Entry(
                path=str(path.relative_to(folder)),
                size=path.stat().st_size,
                sha256=name if large else None,
                git=None if large else name,
            )
        )
    return Listing(repo, folder.name, tuple(entries))
