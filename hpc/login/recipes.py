"""Recipes, containers/NAME.def with NAME.requirements.txt: what each is made of, and values for its {{ arguments }}.

Three arguments are filled in here: `base` is another recipe's image, `wheels` a folder with the requirements' wheels,
`mirror` the Debian mirror of this machine. Any other is the user's to give.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc.core.assets import CONTAINERS
from hpc.core.digest import sha256
from hpc.core.errors import HpcError, RuntimeUnavailable, UsageError, did_you_mean
from hpc.core.rundir import tail

FILLED = ("base", "wheels", "mirror")
Run = Callable[[Sequence[str]], int]
"""Runs a command with its output in the log; its exit code."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One environment's recipe."""

    name: str
    path: Path

    @property
    def requirements(self) -> Path | None:
        path = self.path.with_name(f"{self.name}.requirements.txt")
        return path if path.is_file() else None

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names that stand in {{ }}, comments aside."""
        text = re.sub(r"^\s*#.*$", "", self.path.read_text(encoding="utf-8"), flags=re.M)
        return tuple(dict.fromkeys(re.findall(r"\{\{\s*(\w+)\s*\}\}", text)))

    def inputs(self, base: str | None, given: Mapping[str, str]) -> dict[str, str]:
        """Name -> sha256 of all that the image is made of."""
        files = [self.path, *([self.requirements] if self.requirements else [])]
        found = {file.name: sha256(file) for file in files}
        others = {k: v for k, v in given.items() if k not in FILLED}
        found.update({f"argument {k}": hashlib.sha256(v.encode()).hexdigest() for k, v in others.items()})
        return {**found, **({"base": base} if base else {})}


def key(inputs: Mapping[str, str]) -> str:
    """One digest of all inputs: an image with the same one need not be built again."""
    return hashlib.sha256(repr(sorted(inputs.items())).encode()).hexdigest()


def folders(root: Path) -> tuple[Path, ...]:
    """Where recipes lie: the project's own come first."""
    return tuple(dict.fromkeys((root / "containers", CONTAINERS)))


def names(root: Path) -> list[str]:
    return sorted({path.stem for folder in folders(root) for path in folder.glob("*.def")})


def find(name: str, root: Path) -> Recipe:
    """The recipe of that name; UsageError where there is none."""
    for folder in folders(root):
        if (folder / f"{name}.def").is_file():
            return Recipe(name=name, path=folder / f"{name}.def")
    raise UsageError(f"there is no recipe '{name}'", hint=did_you_mean(name, names(root)))


def pinned(name: str, root: Path) -> Path:
    """The requirements of that environment, for a venv; UsageError where there are none."""
    for folder in folders(root):
        path = folder / f"{name}.requirements.txt"
        if path.is_file():
            return path
    raise UsageError(
        f"{name} has no requirements, so it cannot be a venv", hint="write containers/NAME.requirements.txt"
    )


def refuse_unknown(recipe: Recipe, given: Mapping[str, str]) -> None:
    """UsageError where a value is missing that only the user can give, or one is given that nothing asks for."""
    for name in given:
        if name not in recipe.arguments:
            hint = did_you_mean(name, list(recipe.arguments)) if recipe.arguments else "it has no arguments"
            raise UsageError(f"{recipe.path.name} has no argument '{name}'", hint=hint)
    for name in recipe.arguments:
        if name not in given and name not in FILLED:
            raise UsageError(f"{recipe.path.name} needs a value for '{name}'", hint=f"--build-arg {name}=VALUE")


def mirror(release: str) -> str:
    """The Debian mirror that this machine's apt uses; UsageError where it has none."""
    columns = "$(SITE) $(CODENAME) $(COMPONENT)"
    try:
        listed = subprocess.run(["apt-get", "indextargets", "--format", columns], capture_output=True, text=True).stdout
    except OSError:  # no Debian
        listed = ""
    found = [line.split() for line in listed.splitlines()]
    sites = [words[0] for words in found if words[1:] == [release, "main"]]
    if not sites:
        raise UsageError(
            f"this machine's apt has no source of Debian {release}, so its mirror is not known",
            hint="--build-arg mirror=URL, for example the one of your site",
        )
    return sites[0]


def release(recipe: Recipe) -> str:
    """OSVersion of a debootstrap recipe."""
    found = re.search(r"^OSVersion:\s*(\S+)", recipe.path.read_text(encoding="utf-8"), re.M)
    return found[1] if found else "bookworm"


def python(minor: str) -> str:
    """A Python of this machine with the image's minor version: it chooses wheels that fit there."""
    for word in dict.fromkeys((sys.executable, f"python{minor}", "python3", "/usr/bin/python3")):
        program = shutil.which(word)
        if program and _minor(program) == minor:
            return program
    raise RuntimeUnavailable(
        f"the base image has Python {minor}, and this machine has none of that version to choose wheels with",
        hint=f"install or load python{minor}, or fill a folder with `pip wheel` elsewhere: --build-arg wheels=FOLDER",
    )


def _minor(program: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.run([program, "-I", "-c", code], capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def wheels(requirements: Path, folder: Path, program: str, run: Run, log: Path) -> Path:
    """A folder with a wheel of each requirement, and pip's own: the build then needs no network."""
    pip = with_pip(program, folder.with_name("pip"), run)
    argv = [pip, "-m", "pip", "wheel", "--use-pep517", "--progress-bar", "off", "--wheel-dir", str(folder)]
    if run([*argv, *pip_args(), "pip", "-r", str(requirements)]):
        raise pip_failed(log, requirements, "fill a folder with `pip wheel` there, bring it: --build-arg wheels=FOLDER")
    return folder


def pip_failed(log: Path, requirements: Path, way_out: str) -> HpcError:
    """What a failure of pip means: no index is in reach, or what it printed last."""
    lines = tail(log)
    if any("NewConnectionError" in line or "Failed to establish a new connection" in line for line in lines):
        return RuntimeUnavailable(
            f"no package index can be reached from this machine for {requirements.name}",
            hint=f"PIP_ARGS names another index; or do it where one can be reached: {way_out}",
        )
    said = "\n  ".join(lines[-12:])
    return HpcError(f"pip cannot fetch {requirements.name}:\n  {said}", hint="PIP_ARGS has options for pip")


def with_pip(program: str, folder: Path, run: Run) -> str:
    """The same Python where it has pip, else one in a new venv that has."""
    if subprocess.run([program, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return program
    if run([program, "-m", "venv", str(folder)]):
        raise RuntimeUnavailable(f"{program} has no pip and can make no venv", hint="on Debian: python3-venv")
    return str(folder / "bin" / "python")


def pip_args() -> list[str]:
    """Further options for pip, e.g. an index with CPU builds of torch."""
    return shlex.split(os.environ.get("PIP_ARGS", ""))
