"""Recipes, containers/NAME.def with NAME.requirements.txt: what each is made of, and values for its {{ arguments }}.

A recipe `From: {{ NAME }}` stands on the environment NAME, and that argument is its image (Apptainer's arguments have
no hyphen: {{ serve_cpu }} is serve-cpu). Two more are filled in: `wheels` is a folder with the requirements' wheels,
`mirror` the Debian mirror of this machine. Any other has a default in %arguments, or is the user's to give.
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

from hpc.core import imagelock
from hpc.core.assets import CONTAINERS
from hpc.core.digest import sha256
from hpc.core.errors import HpcError, RuntimeUnavailable, UsageError, did_you_mean
from hpc.core.rundir import tail

FILLED = ("wheels", "mirror")
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
    def text(self) -> str:
        """The recipe without its comments."""
        return re.sub(r"^\s*#.*$", "", self.path.read_text(encoding="utf-8"), flags=re.M)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names that stand in {{ }}."""
        return tuple(dict.fromkeys(re.findall(r"\{\{\s*(\w+)\s*\}\}", self.text)))

    @property
    def defaults(self) -> Mapping[str, str]:
        """What %arguments gives."""
        section = re.search(r"^%arguments\b.*\n((?:(?!%).*\n?)*)", self.text, re.M)
        return dict(re.findall(r"^\s*(\w+)\s*=\s*(.*?)\s*$", section[1], re.M)) if section else {}

    @property
    def source(self) -> str:
        """The address of an image in a registry that it stands on, arguments not filled in; "" where it is none."""
        return f"docker://{self._header('From')}" if self._header("Bootstrap") == "docker" else ""

    @property
    def base(self) -> str | None:
        """The argument whose value is the image of the environment that it stands on."""
        found = re.fullmatch(r"\{\{\s*(\w+)\s*\}\}", self._header("From"))
        return found[1] if found and self._header("Bootstrap") == "localimage" else None

    @property
    def below(self) -> str | None:
        """The environment that it stands on; None where it stands on none of ours."""
        if self.base is None:
            return None
        name = self.base.replace("_", "-")
        return name if any((f / f"{name}.def").is_file() for f in (self.path.parent, CONTAINERS)) else self.base

    @property
    def python(self) -> str:
        """The minor version of its image's Python where a label says it: an image in a registry cannot be asked."""
        found = re.search(r"^\s*org\.hpc\.python\s+(\S+)", self.text, re.M)
        return found[1] if found else ""

    def meaning(self, argument: str) -> str:
        """What the recipe's comment `# argument: …` says of it, with the defaults of others filled in."""
        found = re.search(rf"^#\s*{argument}:\s*(.+)$", self.path.read_text(encoding="utf-8"), re.M)
        text = found[1].strip() if found else ""
        return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda m: self.defaults.get(m[1], m[0]), text)

    def inputs(self, below: str | None, given: Mapping[str, str]) -> dict[str, str]:
        """Name -> sha256 of all that the image is made of; `below` is that of what it stands on."""
        files = [self.path, *([self.requirements] if self.requirements else [])]
        found = {file.name: sha256(file) for file in files}
        others = {k: v for k, v in given.items() if k not in (*FILLED, self.base)}
        found.update({f"argument {k}": hashlib.sha256(v.encode()).hexdigest() for k, v in others.items()})
        return {**found, **({self.below: below} if self.below and below else {})}

    def _header(self, key: str) -> str:
        found = re.search(rf"^{key}:\s*(.*?)\s*$", self.text, re.M | re.I)
        return found[1] if found else ""


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


def chain(recipe: Recipe, root: Path) -> list[Recipe]:
    """The recipe, and below it those that it stands on; UsageError where one stands on itself."""
    found = [recipe]
    while (name := found[-1].below) and name in names(root):
        if name in [r.name for r in found]:
            raise UsageError(f"{found[-1].path} stands on itself, {name}", hint="give one of the two another name")
        found.append(find(name, root))
    return found


def pinned(name: str, root: Path) -> list[Path]:
    """The requirements of that environment and of those below it, for a venv; UsageError where it has none."""
    if name in names(root):
        recipe = find(name, root)
        if recipe.source:
            raise UsageError(
                f"{name} stands on an image of {recipe.source.split('/')[2]}, so it cannot be a venv",
                hint=f"hpc images build {name} makes the image",
            )
        own, *below = [r.requirements for r in chain(recipe, root)]
        if own:
            return [own, *filter(None, below)]
    for folder in folders(root):  # without a recipe it is a venv alone
        path = folder / f"{name}.requirements.txt"
        if path.is_file():
            return [path]
    raise UsageError(
        f"{name} has no requirements, so it cannot be a venv", hint="write containers/NAME.requirements.txt"
    )


def lying(name: str, places: Sequence[Path | None]) -> Path | None:
    """The first NAME.sif in these folders."""
    found = (folder / f"{name}.sif" for folder in places if folder)
    return next((path for path in found if path.is_file()), None)


def outdated(name: str, image: Path, places: Sequence[Path | None], root: Path) -> bool:
    """Whether a built image's recipe, its requirements or what it stands on are others than when it was built.

    What it stands on counts where it lies in one of these folders. What was pulled or brought is never outdated.
    """
    lock = imagelock.read(image)
    if lock is None or not lock.recipe or name not in names(root):
        return False
    recipe, *rest = chain(find(name, root), root)
    below = lying(recipe.below, places) if recipe.below else None
    if rest and below and outdated(rest[0].name, below, places, root):
        return True
    under = imagelock.read(below) if below else None
    now = recipe.inputs(under.sha256 if under else None, {})
    return any(lock.inputs.get(k) != v for k, v in now.items())


def refuse_unknown(recipe: Recipe, given: Mapping[str, str]) -> None:
    """UsageError where a value is missing that only the user can give, or one is given that nothing asks for."""
    for name in given:
        if name not in recipe.arguments:
            hint = did_you_mean(name, list(recipe.arguments)) if recipe.arguments else "it has no arguments"
            raise UsageError(f"{recipe.path.name} has no argument '{name}'", hint=hint)
    for name in recipe.arguments:
        if name not in (*given, *FILLED, recipe.base, *recipe.defaults):
            meaning = recipe.meaning(name) or "VALUE"
            raise UsageError(
                f"{recipe.path.name} needs a value for '{name}'",
                hint=f"hpc images build {recipe.name} --build-arg {name}={meaning}",
            )


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


def wheels(requirements: Path, below: Sequence[Path], folder: Path, program: str, run: Run, log: Path) -> Path:
    """A folder with a wheel of each requirement, and pip's own: the build then needs no network.

    What the requirements of the environments below pin keeps its version.
    """
    pip = with_pip(program, folder.with_name("pip"), run)
    argv = [pip, "-m", "pip", "wheel", "--use-pep517", "--progress-bar", "off", "--wheel-dir", str(folder)]
    pins = [word for path in below for word in ("-c", str(path))]
    if run([*argv, *pip_args(), "pip", "-r", str(requirements), *pins]):
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
