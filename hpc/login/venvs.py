"""`hpc images build NAME --as venv`: the environment without Apptainer, from the same pinned requirements.

<venvs>/NAME            a link to the folder below: put in its place in one step, when all is installed
        NAME@DIGEST     the venv, named by its requirements and its Python; earlier ones stay: jobs may use them
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hpc.core.errors import HpcError, UsageError
from hpc.login import recipes
from hpc.node import images

_LEAST = 2 << 30


def build(
    name: str, requirements: Sequence[Path], folder: Path, say: Callable[[str], None], *, force: bool = False
) -> Path:
    """The venv of that name, made with the Python that runs `hpc`; where it is there and up to date nothing is done."""
    link = folder / name
    if link.exists() and not link.is_symlink():
        raise UsageError(f"{link} is there, and was not made by hpc images", hint="remove it, or --to another folder")
    texts = [path.read_text(encoding="utf-8") for path in requirements]
    made_of = "".join(texts) + sys.version + os.path.realpath(sys.executable)
    venv = folder / f"{name}@{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    if not force and link.is_symlink() and os.readlink(link) == venv.name and (venv / "bin" / "python3").exists():
        say(f"{link} is up to date")
        return link
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}", hint="--to names another folder") from error
    images.refuse_full(folder, _LEAST)
    if venv.exists() and link.is_symlink() and os.readlink(link) == venv.name:  # --force: jobs may use it
        venv = Path(tempfile.mkdtemp(prefix=f"{venv.name}-", dir=folder))
        venv.chmod(0o755)
    elif venv.exists():  # half made
        shutil.rmtree(venv)
    say(f"{name}: making {venv}")
    with tempfile.TemporaryDirectory() as work:
        _install(requirements, venv, Path(work), lambda text: say(f"  {text}"))
    new = folder / f".{name}.{os.getpid()}"
    new.symlink_to(venv.name)
    os.replace(new, link)
    return link


def _install(requirements: Sequence[Path], venv: Path, work: Path, tell: Callable[[str], None]) -> None:
    def run(*argv: str) -> int:
        return images.run(argv, work / "log", tell, env=os.environ, cwd=work)

    pip: Sequence[str] = [str(venv / "bin" / "python"), "-m", "pip"]
    code = run(sys.executable, "-m", "venv", str(venv))
    if code:  # Debian without python3-venv: the pip that installed hpc can serve another environment
        code = run(sys.executable, "-m", "venv", "--without-pip", str(venv))
        pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python")]
    pip = [*pip, "install", "--no-compile", "--progress-bar", "off", "--no-input", *recipes.pip_args()]
    if code:
        raise HpcError(f"{sys.executable} can make no venv", hint="on Debian: apt-get install python3-venv")
    if run(*pip, *(word for path in requirements for word in ("-r", str(path)))):
        way_out = "fill a folder with `pip wheel` there, bring it: PIP_ARGS='--no-index --find-links FOLDER'"
        raise recipes.pip_failed(work / "log", requirements[0], way_out)
