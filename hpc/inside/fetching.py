"""What the stage fetch does: models and data sets from the hub, a URL or a path, into folders of the run, checked."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from hpc.core.errors import HpcError, UsageError, VerificationFailed
from hpc.core.rundir import write_text
from hpc.core.stage import Context
from hpc.inside import families, hub, meta, models, sources, transfer, weights
from hpc.inside.chat import Template

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
DATA_FILES = tuple(f"*{suffix}" for suffix in sources.SUFFIXES)

_AT_ONCE = 4
_PIECE = 64 << 20
"""Bytes that are copied between two looks at whether to stop."""
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_URL = re.compile(r"https?://[^\s#]+(#sha256=[0-9a-f]{64})?")


class StoppedError(Exception):
    """The scheduler asked to end; what is there of the files is kept."""


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def url_of(text: str) -> tuple[str, str | None]:
    """
    (address, sha256 or None). UsageError for what is no address.

    >>> url_of("https://a.org/b.gguf#sha256=" + "0" * 64)[0]
    'https://a.org/b.gguf'
    """
    if not _URL.fullmatch(text):
        raise UsageError(f"'{text}' is not a URL", hint="https://HOST/FILE, with #sha256=… where the content is known")
    address, _, digest = text.partition("#sha256=")
    return address, digest or None


@dataclass(frozen=True)
class Fetcher:
    """Fetches into a store that all runs share; a run's folder then holds links to the store's files.

    What lies at a path of the user's is copied: whoever saves there writes into the same file, weights too.
    """

    ctx: Context
    hub_home: str | None
    pickles: tuple[str, ...]
    family: families.Family = "own"

    @property
    def store(self) -> Path:
        return self.ctx.cache / "fetch"

    def model(self, given: str, target: Path) -> dict[str, Any]:
        """The model in `target`, as verified safetensors; where it came from."""
        with models.written_whole(target) as part:
            if is_url(given):
                source = self._model_of_url(given, part)
            elif Path(given).exists():
                source = self._model_of_path(Path(given), part)
            else:
                source = self._model_of_hub(given, part)
            if self.family != "own" and not Template(part):
                write_text(part / "chat_template.jinja", families.text(self.family))
            return {**source, "bytes": weights.check(part)}

    def dataset(self, given: str, patterns: Sequence[str], target: Path) -> dict[str, Any]:
        """A data set's files, in a folder of its name below `target`."""
        if is_url(given):
            address, digest = url_of(given)
            path = self._url(address, digest)
            name = _name(address)
            _place(path, target / name)
            return {"source": address, "files": 1, "sha256": digest or _sha256(path)}
        if Path(given).exists():
            for path in sources.files(Path(given)):
                self._take(path, target / Path(given).name / (path.relative_to(given) if Path(given).is_dir() else ""))
            return {"source": given}
        repo = hub.Repo.of(given, "dataset")
        token = hub.token(self.hub_home)
        found = hub.listing(repo, token, self.store / "hub").only(patterns or DATA_FILES)
        if not found.entries:
            raise HpcError(f"the data set '{repo}' has no file that matches", hint="see fetch.dataset_files")
        self._repo(found, token, target / repo.name.rpartition("/")[2])
        return {"source": given, "commit": found.commit, "files": len(found.entries)}

    def _model_of_hub(self, given: str, part: Path) -> dict[str, Any]:
        repo = hub.Repo.of(given, "model")
        token = hub.token(self.hub_home)
        everything = hub.listing(repo, token, self.store / "hub")
        found = everything.only(MODEL_FILES, without=("original/*", "*/*"))
        names = {entry.path for entry in everything.entries}
        if any(name.endswith(".safetensors") for name in names):
            self._repo(found, token, part)
            return {"source": given, "commit": found.commit}
        if "params.json" in names and "config.json" not in names:
            with self._aside() as folder:
                self._repo(everything.only(("*.json", "*.pth", "*.chk", "*.model")), token, folder)
                self._meta(folder, part)
            return {"source": given, "commit": found.commit, "converted": "Meta's shards"}
        pickles = weights.refuse((n for n in names if "/" not in n), f"'{repo.name}'", self.pickles)
        if not pickles:
            gguf = sorted(name for name in names if name.endswith(".gguf"))
            raise HpcError(
                f"'{repo.name}' has no safetensors" + (f", only GGUF files: {', '.join(gguf[:3])}" if gguf else ""),
                hint=f"give the address of one: HUB/{repo.name}/resolve/main/FILE.gguf"
                if gguf
                else "take another model",
            )
        with self._aside() as folder:
            self._repo(everything.only([*MODEL_FILES, *pickles], without=("*/*", "*.index.json")), token, folder)
            self._unpickled(folder, [folder / name for name in pickles], part)
        return {"source": given, "commit": found.commit, "converted": pickles}

    def _model_of_url(self, given: str, part: Path) -> dict[str, Any]:
        address, digest = url_of(given)
        name = _name(address)
        if not name.endswith((".gguf", *_ARCHIVES)):
            raise UsageError(
                f"{address} is not a model", hint="a URL leads to a .gguf file, or to a .tar of a model's folder"
            )
        path = self._url(address, digest)
        try:
            if name.endswith(".gguf"):
                _check_gguf(path, address)
                _place_all(models.local(str(path), self.ctx.cache), part)
            else:
                with self._aside() as folder:
                    _place_into(self._folder_in(path, folder), part, self)
        except VerificationFailed:
            if digest is None:  # else it is what was asked for
                path.unlink(missing_ok=True)
            raise
        return {"source": address, "sha256": digest or _sha256(path)}

    def _folder_in(self, archive: Path, folder: Path) -> Path:
        """The model's folder in an archive: where config.json or params.json is."""
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise VerificationFailed(
                f"{archive.name} cannot be unpacked: {error}", hint="was it whole at its source?"
            ) from error
        for name in ("config.json", "params.json"):
            found = sorted(folder.rglob(name), key=lambda path: len(path.parts))
            if found:
                return found[0].parent
        raise VerificationFailed(f"{archive.name} holds no model", hint="one has a config.json, or Meta's params.json")

    def _model_of_path(self, path: Path, part: Path) -> dict[str, Any]:
        if path.is_file():
            _place_all(models.local(str(path), self.ctx.cache), part)
            return {"source": str(path), "converted": "GGUF"}
        return {"source": str(path), **self.of_folder(path, part)}

    def of_folder(self, folder: Path, part: Path) -> dict[str, Any]:
        """A model's folder, in whatever form, as safetensors in `part`."""
        if meta.is_folder(folder):
            self._meta(folder, part)
            return {"converted": "Meta's shards"}
        names = [path.name for path in folder.iterdir()]
        if not any(name.endswith(".safetensors") for name in names):
            pickles = weights.refuse(names, str(folder), self.pickles)
            if pickles:
                self._unpickled(folder, [folder / name for name in pickles], part)
                return {"converted": pickles}
        models.inspect(str(folder))
        for path in sorted(folder.iterdir()):
            if path.is_file() and any(path.match(pattern) for pattern in MODEL_FILES):
                self._take(path, part / path.name)
        return {}

    def _meta(self, folder: Path, part: Path) -> None:
        meta.check(folder, self.pickles, self.ctx.progress)
        instruct = self.family == "llama-3" or (self.family == "own" and meta.is_instruct(folder))
        third = meta.convert(folder, part, self.ctx.progress, instruct=instruct)
        if third and instruct and not Template(part):
            write_text(part / "chat_template.jinja", families.text("llama-3"))

    def _unpickled(self, folder: Path, pickles: Sequence[Path], part: Path) -> None:
        weights.converted(pickles, part, self.ctx.progress)
        for path in sorted(folder.iterdir()):
            if any(path.match(p) for p in MODEL_FILES) and not path.name.endswith((".index.json", ".safetensors")):
                self._take(path, part / path.name)

    def _take(self, source: Path, target: Path) -> None:
        """A file of our own, linked, or a copy of the user's."""
        source = source.resolve()
        if any(source.is_relative_to(ours.resolve()) for ours in (self.ctx.cache, self.ctx.folder)):
            _place(source, target)
            return
        tell = transfer.Rate(source.stat().st_size, self.ctx.progress, f"copy of {source.name}").of(source.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as given, open(target, "xb") as copy:
            while _copy_some(given.fileno(), copy.fileno()):
                tell(os.lseek(given.fileno(), 0, os.SEEK_CUR))
                if self.ctx.stopping():
                    raise StoppedError

    def _repo(self, found: hub.Listing, token: str | None, target: Path) -> None:
        """All files of the listing in `target`, each checked; several at once."""
        total = sum(entry.size or 0 for entry in found.entries)
        _room(self.store, total - sum(e.size or 0 for e in found.entries if (self.store / e.digest).exists()))
        rate = transfer.Rate(total, self.ctx.progress, found.repo.name)

        def one(entry: hub.Entry) -> None:
            blob = self.store / entry.digest
            self._from_cache(found, entry, blob)
            if not blob.exists():
                self._online(found, entry, token, blob, rate.of(entry.path))
            rate.of(entry.path)(blob.stat().st_size)
            _place(blob, target / entry.path)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for done in [pool.submit(one, entry) for entry in found.entries]:
                try:
                    done.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def _from_cache(self, found: hub.Listing, entry: hub.Entry, blob: Path) -> None:
        """Take a file over from the hub's own cache, where it is whole there."""
        cached = None if blob.exists() else hub.cached(found, entry)
        if cached is None:
            return
        try:
            transfer.verify(cached, entry.expected, entry.path)
        except VerificationFailed:
            if hub.offline():
                raise
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        _place(cached, blob)

    def _online(
        self, found: hub.Listing, entry: hub.Entry, token: str | None, blob: Path, tell: Callable[[int], None]
    ) -> None:
        if hub.offline():
            raise HpcError(
                f"HF_HUB_OFFLINE is set, and {entry.path} of '{found.repo}' is not there yet",
                hint="unset HF_HUB_OFFLINE where there is a network, or fetch it there once",
            )
        try:
            whole = transfer.download(hub.remote(found, entry, token), blob, tell, self.ctx.stopping)
        except transfer.HttpError as error:
            if error.status in (401, 403):
                raise hub.gated(found.repo, token) from error
            raise HpcError(f"the hub does not give {entry.path} of '{found.repo}': {error}") from error
        except OSError as error:
            raise _failed(error, hub.unreachable(found.repo, error)) from error
        if not whole:
            raise StoppedError

    def _url(self, address: str, digest: str | None) -> Path:
        """The file at an address, in the store."""
        name = _name(address)
        target = self.store / "url" / sha256(f"{address}#{digest}".encode()).hexdigest()[:16] / name
        rate = transfer.Rate(0, self.ctx.progress, name)
        if hub.offline() and not target.exists():
            raise HpcError(f"HF_HUB_OFFLINE is set, and {address} was not fetched before", hint="unset HF_HUB_OFFLINE")
        renew = digest is None and not hub.offline()
        if digest is None and not renew:
            print(f"HF_HUB_OFFLINE is set: the copy of {address} that is there is used", flush=True)
        try:
            remote = transfer.Remote(url=address, expected=transfer.Expected(sha256=digest), renew=renew)
            if not transfer.download(remote, target, rate.of(name), self.ctx.stopping):
                raise StoppedError
        except transfer.HttpError as error:
            raise HpcError(f"{address}: the server says {error}", hint="check the address") from error
        except OSError as error:
            away = HpcError(
                f"cannot get {address} on {os.uname().nodename}: {error}",
                hint='where only the login node has a network, set network = "login" in the site profile',
            )
            raise _failed(error, away) from error
        return target

    @contextmanager
    def _aside(self) -> Iterator[Path]:
        """A folder for what is converted, beside the store."""
        folder = self.ctx.folder / "fetch.part"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _check_gguf(path: Path, address: str) -> None:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise VerificationFailed(
                f"what {address} gives is no GGUF file", hint="perhaps a page that says why: look at it in a browser"
            )


def _place_into(folder: Path, part: Path, fetcher: Fetcher) -> None:
    fetcher.of_folder(folder, part)


def _place_all(folder: Path, part: Path) -> None:
    for path in sorted(folder.iterdir()):
        _place(path.resolve(), part / path.name)


def _place(source: Path, target: Path) -> None:
    """The file at another place: the same file where the file system can, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        return
    except OSError:
        part = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(source, part)
        os.replace(part, target)


def _copy_some(source: int, target: int) -> int:
    """Some bytes from where both stand; how many, 0 at the end. Where it can, the file system shares their blocks."""
    with suppress(OSError):  # an old kernel, two file systems; what else is wrong is met below
        if copied := os.copy_file_range(source, target, _PIECE):
            return copied
    chunk = os.read(source, _PIECE)
    left = memoryview(chunk)
    while left:
        left = left[os.write(target, left) :]
    return len(chunk)


def _room(store: Path, wanted: int) -> None:
    store.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store).free
    if wanted > free:
        raise HpcError(
            f"{transfer.size(wanted)} are to be fetched, and {store} has room for {transfer.size(free)}",
            hint="set `runs` in hpc.toml to a file system with more room",
        )


def _failed(error: OSError, away: HpcError) -> HpcError:
    """No room is another trouble than no network."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HpcError(f"no room is left: {error.strerror}", hint="set `runs` in hpc.toml to a larger file system")
    return away


def _name(address: str) -> str:
    from urllib.parse import unquote, urlsplit

    return Path(unquote(urlsplit(address).path)).name or "file"


def _sha256(path: Path) -> str:
    from hpc.core import digest

    return digest.sha256(path)
