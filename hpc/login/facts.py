"""What planning must know of this machine and cluster, gathered: paths, hashes, images, limits."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpc.core import config as configs
from hpc.core import imagelock, shape
from hpc.core import stage as stages
from hpc.core.digest import Digests, sha256
from hpc.core.errors import Refused, RuntimeUnavailable, UsageError
from hpc.core.limits import Limits
from hpc.core.plan import Environment
from hpc.core.rundir import RunsDir, read_json, write_json
from hpc.core.site import Site
from hpc.core.stage import Stage
from hpc.login import slurm
from hpc.login.settings import Settings
from hpc.node import images


class MachineFacts:
    """The Facts of `hpc.core.plan`, of the machine that `hpc` runs on."""

    def __init__(self, settings: Settings, say: Callable[[str], None] = lambda text: None) -> None:
        self._root = settings.project.root
        self._site = settings.site
        self._digests = Digests(RunsDir(settings.project.runs).digests, say)
        self._signatures = Signatures(RunsDir(settings.project.runs).signatures, settings.site)

    def path(self, text: str) -> str | None:
        path = self.place(text)
        return path if os.path.exists(path) else None

    def place(self, text: str) -> str:
        return os.path.normpath(self._root / expand(text))

    def digest(self, path: str) -> str:
        return self._digests.of(Path(path))

    def source(self, stage: Stage) -> bytes:
        return stages.source(stage)

    def document(self, path: str) -> dict[str, Any] | None:
        return read_json(Path(path) / "config.json")

    def weights(self, path: str) -> int | None:
        return shape.stored(Path(path))

    def environment(self, name: str) -> Environment:
        candidates = environment_paths(name, self._site, self._root)
        for path in candidates:
            try:
                if path.is_file():
                    return self._image(name, path)
                if (path / "bin" / "python3").exists():
                    return Environment(name=name, kind="venv", path=str(path), digest=venv_digest(path))
            except OSError as error:
                raise Refused(
                    f"the environment '{name}' cannot be read: {error.filename or path}: {error.strerror}",
                    hint=f"its owner must open it, and every folder on the way; or: hpc images build {name}",
                ) from error
        raise Refused(
            f"the environment '{name}' is not there: {' nor '.join(map(str, candidates))}",
            hint=f"hpc images build {name} (without Apptainer: --as venv), or name it in the site profile:"
            f" environments = {{ {name} = '…' }}",
        )

    def _image(self, name: str, path: Path) -> Environment:
        """An image by its lock; where the site demands a signature, by its content and that signature."""
        seen = imagelock.look(path)  # first: a change from here on is one that the node will see
        lock = imagelock.read(path)
        if lock is None and not images.plausible(path):
            raise Refused(f"the environment '{name}' is {path}, and that is no image", hint=f"hpc images build {name}")
        key = self._site.verify_key
        if key is None:
            digest = imagelock.digest(path, self._digests.of)
        else:  # who can replace an image can replace its lock: our own memory of the content is what counts
            digest = self._digests.of(path)
            if lock is not None:
                lock.refuse(path, digest)
            self._signatures.check(path, digest, self._root / expand(key))
        versions = lock.told() if lock is not None else {}
        return Environment(name=name, kind="sif", path=str(path), digest=digest, stat=seen, versions=versions)

    def limits(self) -> Limits | None:
        return slurm.partitions() if self._site.scheduler == "slurm" else None

    def save(self) -> None:
        """Keep the hashes that were computed."""
        self._digests.save()


class Signatures:
    """Good signatures, remembered by key and content: neither can change without another name."""

    def __init__(self, store: Path, site: Site) -> None:
        self._store = store
        self._site = site

    def check(self, image: Path, digest: str, key: Path) -> None:
        """VerificationFailed where the image bears no good signature of the key."""
        if not key.is_file():
            raise UsageError(f"there is no key {key}", hint="verify_key in the site profile names a public key in PEM")
        good = f"{sha256(key)}:{digest}"
        known = read_json(self._store) or {}
        if good in known:
            return
        images.Apptainer(container_program(self._site, here=True), self._store.parent).verify(image, key)
        with suppress(OSError):  # a memory that can't be written is no error
            self._store.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._store, {**known, good: str(image)})


def environment_paths(name: str, site: Site, root: Path) -> list[Path]:
    """Where an environment may lie: as the site names it, else its image, else its venv."""
    named = site.environments.get(name)
    if named:
        return [root / expand(named)]
    images = [root / expand(site.images) / f"{name}.sif"] if site.images else []
    return [*images, root / expand(site.venvs) / name]


def venv_digest(folder: Path) -> str:
    """A venv counts by the names and versions that are installed in it."""
    found = sorted(p.name for p in folder.glob("lib/python*/site-packages/*.dist-info"))
    return configs.key_of(found)


def link_targets(paths: Iterable[str]) -> tuple[str, ...]:
    """The folders outside that the links in these folders lead to: a model in the hub's cache is a folder of links.

    A container that sees only the folder itself would find them broken.
    """
    targets: dict[str, None] = {}
    for folder in (p for p in map(Path, paths) if p.is_dir()):
        for entry in folder.iterdir():
            target = entry.resolve()
            if entry.is_symlink() and folder.resolve() not in target.parents:
                targets[str(target.parent)] = None
    return tuple(targets)


def container_program(site: Site, *, here: bool = False) -> str:
    """The word that starts a container: as the site names it, else `apptainer`, else `singularity`.

    RuntimeUnavailable where this machine has none, and it is to start `here`, or the site has no other way to it.
    """
    words = [expand(site.apptainer)] if site.apptainer else ["apptainer", "singularity"]
    found = next(filter(shutil.which, words), None)
    if found is None and not here and (site.apptainer or site.setup):  # the nodes may have it, by a module perhaps
        return words[0]
    if found is None:
        raise RuntimeUnavailable(
            f"{site.apptainer or 'Apptainer'} is not on this machine",
            hint="make a venv: hpc images build NAME --as venv; or load its module"
            if here
            else "load its module, or say in the site profile how the nodes get it:"
            " setup = ['module load apptainer'], or apptainer = '/path'",
        )
    return found


def expand(text: str, env: Mapping[str, str] = os.environ) -> str:
    """~, $NAME and ${NAME:-default} of a path.

    >>> expand("${NOT_SET_ANYWHERE:-/x}/y", {})
    '/x/y'
    """
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: env.get(m[1]) or m[2], text)
    text = re.sub(r"\$\{?(\w+)\}?", lambda m: env.get(m[1], m[0]), text)
    return os.path.expanduser(text)
