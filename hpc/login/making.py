"""Makes an image: one maker at a time, into a hidden file, which is hashed and then put in its place in one step."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from hpc.core import imagelock
from hpc.core.digest import sha256
from hpc.core.errors import HpcError, UsageError
from hpc.core.imagelock import ImageLock
from hpc.login import recipes
from hpc.login.facts import expand
from hpc.login.recipes import Recipe
from hpc.login.settings import Settings
from hpc.node import images
from hpc.node.images import Apptainer

LEAST = 2 << 30
"""Bytes that must be free before anything is begun."""
_UNPACKED = 4
"""An image's tree and the image itself take about so many times its compressed parts."""
_OLD_S = 24 * 3600
_NGC = "nvcr.io"


def scratch(named: str | None, settings: Settings) -> Path:
    """Where builds work: --tmp, else APPTAINER_TMPDIR, else the site's scratch where this machine has it."""
    if named or os.environ.get("APPTAINER_TMPDIR"):
        return Path(expand(named or os.environ["APPTAINER_TMPDIR"])).absolute()
    site = Path(expand(settings.site.scratch)) if settings.site.scratch else None
    if site is not None and site.is_dir() and os.access(site, os.W_OK):
        return site
    return Path("/var/tmp")  # /tmp is memory on many machines


@dataclass(frozen=True)
class Maker:
    """Makes images in one folder."""

    apptainer: Apptainer
    folder: Path
    root: Path
    """The project: its recipes come first."""
    shared: Path | None
    """The site's folder: a base image that lies there is used."""
    say: Callable[[str], None]

    def build(self, recipe: Recipe, given: Mapping[str, str], *, force: bool = False) -> tuple[Path, bool]:
        """The recipe's image, and whether it was made now; where it is there and up to date nothing is done."""
        recipes.refuse_unknown(recipe, given)
        recipes.chain(recipe, self.root)  # refuses a circle
        image = self.folder / f"{recipe.name}.sif"
        base = self._base(recipe, given)
        inputs = recipe.inputs(imagelock.digest(base, sha256) if base else None, given)
        key = recipes.key(inputs)
        with self._alone(image):
            if not force and self._is(image, key):
                self.say(f"{image.name} is up to date")
                return image, False
            part = self._part(image)
            folder = self.apptainer.work / recipe.name
            folder.mkdir(exist_ok=True)
            arguments = self._arguments(recipe, given, base, folder)
            self._refuse_small(base, arguments.get("wheels"))
            copied = Path(shutil.copy(recipe.path, folder))
            self.say(f"{recipe.name}: building {image}")
            self.apptainer.build(copied, part, arguments, *login(None, recipe.source))
            self._finish(part, image, ImageLock(
                sha256="", size=0, made="built", source=recipe.path.name, recipe=key, inputs=inputs,
            ))  # fmt: skip
        return image, True

    def pull(self, name: str, source: str, auth: str | None, *, force: bool = False) -> Path:
        """The image of that address under this name: docker://…, oras://…, docker-archive:x.tar, or a SIF's path."""
        image = self.folder / f"{name}.sif"
        file = Path(expand(source)).absolute()
        kind, colon, rest = source.partition(":")
        if colon and not rest.startswith("//"):  # an archive: its path counts from here
            source = f"{kind}:{Path(expand(rest)).absolute()}"
            if not Path(expand(rest)).exists():
                raise UsageError(f"there is no {rest}", hint="docker-archive:FILE, oci-archive:FILE or oci:FOLDER")
        elif not colon and not file.is_file():
            raise UsageError(f"{source} is neither an address nor a file", hint="for example docker://HOST/IMAGE:TAG")
        secret, authfile = login(auth, source)
        with self._alone(image):
            part = self._part(image)
            if image.exists() and not force:
                raise UsageError(f"{image} is there already", hint="--force replaces it")
            self.say(f"{name}: {source} -> {image}")
            if colon:
                self.apptainer.pull(source, part, secret, authfile)
            else:
                images.refuse_full(self.folder, file.stat().st_size)
                shutil.copyfile(file, part)
            self._finish(part, image, ImageLock(sha256="", size=0, made="pulled", source=source))
        return image

    def sign(self, image: Path, key: Path) -> None:
        """The image with a signature more. Its content must be what its lock records."""
        images.refuse_full(image.parent, image.stat().st_size)
        with self._alone(image):
            lock = imagelock.read(image)
            part = self._part(image)
            shutil.copy(image, part)
            if lock is not None:
                lock.refuse(image, sha256(part))
            self.apptainer.sign(part, key)
            lock = lock or ImageLock(sha256="", size=0, made="signed", source=str(image))
            self._finish(part, image, replace(lock, signed=True))

    def _finish(self, part: Path, image: Path, lock: ImageLock) -> None:
        """Look into the complete file, hash it, put it in its place, write its lock."""
        self.say(f"{image.stem}: reading its versions and its sha256")
        lock = replace(
            lock,
            labels=self.apptainer.labels(part),
            versions=self.apptainer.versions(part),
            apptainer=self.apptainer.version(),
            sha256=sha256(part),
        )
        for name, version in lock.versions.items():
            label = lock.labels.get(f"org.hpc.{name}", version)
            if version != label and not version.startswith((f"{label}.", f"{label}+")):  # 3.12 of 3.12.3, 2 of 2+cpu
                self.say(f"warning: the label org.hpc.{name} says {label}, and {version} is installed")
        imagelock.install(part, image)
        imagelock.write(image, lock)

    def _base(self, recipe: Recipe, given: Mapping[str, str]) -> Path | None:
        """The image that the recipe stands on: as given, else in one of the two folders, else built now."""
        name = recipe.below
        if name is None or recipe.base is None:
            return None
        if recipe.base in given:
            return Path(given[recipe.base])
        for folder in (self.folder, self.shared):
            image = recipes.lying(name, [folder])
            if image and not recipes.outdated(name, image, (self.folder, self.shared), self.root):
                return image
        return self.build(recipes.find(name, self.root), {})[0]

    def _arguments(self, recipe: Recipe, given: Mapping[str, str], base: Path | None, folder: Path) -> dict[str, str]:
        """Every {{ argument }} of the recipe with its value."""
        found = dict(given)
        if recipe.base is not None:
            found[recipe.base] = str(base)
        if "mirror" in recipe.arguments and "mirror" not in found:
            found["mirror"] = recipes.mirror(recipes.release(recipe))
        if recipe.requirements is not None:
            shutil.copy(recipe.requirements, folder / "requirements.txt")
        if "wheels" in recipe.arguments and "wheels" not in found:
            found["wheels"] = str(self._wheels(recipe, base, folder))
        return found

    def _wheels(self, recipe: Recipe, base: Path | None, folder: Path) -> Path:
        if recipe.requirements is None or not (base or recipe.python):
            raise UsageError(
                f"{recipe.path.name} wants wheels, but has no requirements, or no Python to choose them for is known",
                hint=f"write {recipe.name}.requirements.txt beside it, label it org.hpc.python 3.12, or"
                " --build-arg wheels=FOLDER",
            )
        minor = recipe.python or self.apptainer.versions(base or Path()).get("python", "").rpartition(".")[0]
        if not minor:
            raise HpcError(f"{base} has no python3 that answers", hint=f"hpc images build {recipe.below} --force")
        program = recipes.python(minor)
        self.say(f"{recipe.name}: wheels for Python {minor}")
        work = self.apptainer

        def run(argv: Sequence[str]) -> int:
            return images.run(argv, work.log, work.tell, env=os.environ, cwd=folder)

        below = [r.requirements for r in recipes.chain(recipe, self.root)[1:] if r.requirements]
        return recipes.wheels(recipe.requirements, below, folder / "wheels", program, run, work.log)

    def _refuse_small(self, base: Path | None, wheels: str | None) -> None:
        parts = sum(p.stat().st_size for p in Path(wheels).glob("*.whl")) if wheels else 0
        parts += base.stat().st_size if base else 0
        images.refuse_full(self.apptainer.work, max(LEAST, _UNPACKED * parts))
        images.refuse_full(self.folder, max(LEAST, parts))

    def _is(self, image: Path, key: str) -> bool:
        lock = imagelock.read(image)
        return lock is not None and image.is_file() and lock.recipe == key and lock.untouched(image)

    @contextmanager
    def _alone(self, image: Path) -> Iterator[None]:
        """One maker of an image at a time; the others wait, and then find it made."""
        with _lock(image.with_name(f".{image.stem}.making")) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.say(f"{image.stem}: another process makes it; waiting")
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:  # a file system without locks: the last one wins, and each result is whole
                if error.errno not in {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF}:
                    raise
                self.say(f"{image.parent} has no locks: where two make {image.name} at once, the last one's is kept")
            else:
                _sweep(image)
            try:
                yield
            finally:
                self._part(image).unlink(missing_ok=True)

    def _part(self, image: Path) -> Path:
        """Hidden, on the same disk, and of our own: another may be in the making where there are no locks."""
        return image.with_name(f".{image.stem}.{socket.gethostname()}-{os.getpid()}.sif")


def _lock(path: Path) -> IO[bytes]:
    """The file whose lock keeps others out. All who may make images here can open it, whoever made it first."""
    try:
        return open(path, "r+b")
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with suppress(OSError):  # whatever the umask; another's file is as it is
            os.fchmod(descriptor, 0o666)
        return open(descriptor, "r+b")
    except PermissionError:  # made by an earlier hpc, or on purpose; not on NFS, which locks only what can be written
        return open(path, "rb")


def _sweep(image: Path) -> None:
    """Remove what killed makers left. A lock may hold on one machine only, so those of others must be old."""
    for left in image.parent.glob(f".{image.stem}.*.sif"):
        with suppress(OSError):
            ours = left.name.startswith(f".{image.stem}.{socket.gethostname()}-")
            if ours or time.time() - left.stat().st_mtime > _OLD_S:
                left.unlink()


def login(auth: str | None, source: str) -> tuple[dict[str, str], Path | None]:
    """A registry login for one call: (environment, file). One line in a file is NGC's API key, JSON is Docker's own.

    Neither is ever an argument: every user of a machine can read those.
    """
    host = source.removeprefix("docker://").partition("/")[0]
    path = Path(expand(auth)).absolute() if auth else Path(expand("${XDG_CONFIG_HOME:-~/.config}/hpc/ngc.key"))
    if not auth and (host != _NGC or not path.is_file()):
        return {}, None
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the login file {path} cannot be read", hint="--auth names it") from error
    if stat.S_IMODE(mode) & 0o077:
        raise UsageError(f"{path} can be read by others, and holds a secret", hint=f"chmod 600 {path}")
    if text.startswith("{"):
        return {}, path
    if host != _NGC or not text or "\n" in text:
        raise UsageError(
            f"{path} is no login for {host}",
            hint='one line is an API key of NGC; for other registries a JSON file: {"auths": {"HOST": {"auth": "…"}}}',
        )
    return {"APPTAINER_DOCKER_USERNAME": "$oauthtoken", "APPTAINER_DOCKER_PASSWORD": text}, None
