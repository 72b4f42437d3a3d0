"""`hpc images`: each verb as one function of what was asked. Making an image is in `making`."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hpc.core import imagelock, passport
from hpc.core import stage as stages
from hpc.core.digest import sha256
from hpc.core.errors import HpcError, Interrupted, NotFound, UsageError, VerificationFailed, did_you_mean
from hpc.core.passport import Passport
from hpc.login import making, recipes, venvs, view
from hpc.login.facts import container_program, environment_paths, expand
from hpc.login.making import Maker
from hpc.login.settings import Settings, load, locate
from hpc.node import images

Answer = Mapping[str, Any]


def run(options: argparse.Namespace) -> tuple[int, str, Answer]:
    """The exit code, the document's schema, and the document. What a person reads is printed unless --json is given."""
    settings = load(locate(), site=options.site)
    verb = options.verb or "list"
    if verb in {"build", "pull"} and not re.fullmatch(r"\w[\w.-]*", options.name):
        raise UsageError(f"'{options.name}' is no name for an environment", hint="letters, digits, - and . make one")
    try:
        document = _VERBS[verb](options, settings)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted", hint="nothing half made is left; the same command begins anew") from error
    return int(document.get("exit_code", 0)), f"hpc.images.{verb}/1", document


def _list(options: argparse.Namespace, settings: Settings) -> Answer:
    root, site = settings.project.root, settings.site
    folder = _folder(options, settings) if options.to else _shared(settings)
    lying = {path.stem for path in _sifs(folder)} if folder else set()
    rows = []
    for name in sorted({*recipes.names(root), *site.environments, *lying}):
        asked = folder if options.to or name in lying else None
        candidates = [asked / f"{name}.sif"] if asked else environment_paths(name, site, root)
        path = next((p for p in candidates if p.exists()), candidates[0])
        rows.append({"name": name, "path": str(path), **_standing(name, path, folder, root)})
    if not options.json:
        shown = [
            (r["name"], r["state"], _size(r["size"]), ", ".join(f"{k} {v}" for k, v in r["versions"].items()) or "-",
             r["path"])
            for r in rows
        ]  # fmt: skip
        view.table(("NAME", "STATE", "SIZE", "VERSIONS", "PATH"), shown, sys.stdout)
    return {"folder": str(folder) if folder else None, "images": rows}


def _standing(name: str, path: Path, folder: Path | None, root: Path) -> dict[str, Any]:
    """What can be said of an environment without reading the image."""
    if not path.is_file():
        kind = "venv" if (path / "bin" / "python3").exists() else None
        return {"kind": kind, "state": kind or "missing", "size": None, "sha256": None, "signed": False, "versions": {}}
    lock = imagelock.read(path)
    found = {"kind": "sif", "size": path.stat().st_size, "sha256": None, "signed": False, "versions": {}}
    if lock is None:
        return {**found, "state": "unrecorded"}
    state = "recorded" if lock.untouched(path) else "touched"
    if recipes.outdated(name, path, (folder,), root):
        state = "outdated"
    return {**found, "state": state, "sha256": lock.sha256, "signed": lock.signed, "versions": lock.told()}


def _build(options: argparse.Namespace, settings: Settings) -> Answer:
    if not options.submit:
        if options.wait or options.partition:
            raise UsageError("--wait and --partition are for a job's build", hint="add --submit")
        return _told(options, build(options, settings, _say))
    from hpc.login.building import submit

    root = settings.project.root
    if options.kind == "venv":
        recipes.pinned(options.name, root)
        target = _venvs(options, settings) / options.name
    else:  # what is wrong with the command is said before a job waits for it
        recipe = recipes.find(options.name, root)
        recipes.refuse_unknown(recipe, dict(_argument(text, recipe) for text in options.build_arg))
        target = _folder(options, settings) / f"{options.name}.sif"
    document = submit(options, settings, target, _say)
    return _told(options, document) if document["state"] == "COMPLETED" else document


def build(options: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Make an image or a venv here; what it is."""
    root = settings.project.root
    if options.kind == "venv":
        pinned = recipes.pinned(options.name, root)
        made = venvs.build(options.name, pinned, _venvs(options, settings), say, force=options.force)
        return {"name": options.name, "kind": "venv", "path": str(made)}
    with ExitStack() as stack:
        maker = _maker(options, settings, stack, say)
        recipe = recipes.find(options.name, root)
        given = dict(_argument(text, recipe) for text in options.build_arg)
        image, fresh = maker.build(recipe, given, force=options.force)
    return _made(image, fresh)


def _venvs(options: argparse.Namespace, settings: Settings) -> Path:
    return Path(expand(options.to)).absolute() if options.to else settings.project.root / expand(settings.site.venvs)


def _argument(text: str, recipe: recipes.Recipe) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--build-arg {text}: not NAME=VALUE", hint="for example --build-arg mirror=URL")
    return name, str(Path(value).absolute()) if name in {recipe.base, "wheels"} else value


def _pull(options: argparse.Namespace, settings: Settings) -> Answer:
    with ExitStack() as stack:
        image = _maker(options, settings, stack).pull(options.name, options.source, options.auth, force=options.force)
    return _told(options, _made(image, True))


def _sign(options: argparse.Namespace, settings: Settings) -> Answer:
    image = _image(options.name, options, settings)
    key = Path(options.key)
    if not key.is_file():
        raise UsageError(f"there is no key {key}", hint="openssl genpkey -algorithm ed25519 -out private.pem")
    with ExitStack() as stack:
        options.to = str(image.parent)
        _maker(options, settings, stack).sign(image, key)
    return _told(options, _made(image, True))


def _verify(options: argparse.Namespace, settings: Settings) -> Answer:
    folder = _folder(options, settings)
    engine = passport.read(Path(options.engine)) if options.engine else None
    names = options.names or ([_serving(engine)] if engine else [])
    chosen = [_image(n, options, settings) for n in names] if names else list(_sifs(folder))
    demanded = settings.site.verify_key
    key = settings.project.root / expand(demanded) if demanded else None
    if options.key:
        key = Path(options.key).absolute()
    rows = []
    for image in chosen:
        problem = ""
        try:
            _check(image, key, settings)
            if engine is not None:
                _fits(engine, image)
        except VerificationFailed as error:
            problem = f"{error.message}; try: {error.hint}"
        lock = imagelock.read(image)
        signed = None if key is None else not problem
        rows.append({"path": str(image), "ok": not problem, "problem": problem, "signature_checked": signed is not None,
                     "sha256": lock.sha256 if lock else None})  # fmt: skip
        if not options.json:
            print(problem or f"{image}: {'ok, signed' if key else 'ok'}", flush=True)
    return {"images": rows, "exit_code": 0 if all(row["ok"] for row in rows) else VerificationFailed.exit_code}


def _serving(engine: Passport) -> str:
    """The environment that serves such an engine."""
    serve = stages.load("serve")
    return serve.environment(serve.config(engine=engine.engine))


def _fits(engine: Passport, image: Path) -> None:
    """VerificationFailed where the image's record says that it cannot run the engine."""
    lock = imagelock.read(image)
    passport.refuse(engine, image=lock.sha256 if lock else "", versions=lock.told() if lock else {})


def _stage(options: argparse.Namespace, settings: Settings) -> Answer:
    from hpc.login.staging import stage

    return stage(options, settings, _say)


def _check(image: Path, key: Path | None, settings: Settings) -> None:
    """The content against the lock, and the signature against the key; VerificationFailed where one is wrong."""
    lock = imagelock.read(image)
    if lock is None and key is None:
        raise VerificationFailed(
            f"{image} has no record and no key was given: there is nothing to compare it with",
            hint=f"`hpc images pull {image.stem} {image} --force` records it as it is",
        )
    if lock is not None:
        if image.stat().st_size > 1 << 30:
            _say(f"reading {image} ({_size(image.stat().st_size)})")
        lock.refuse(image, sha256(image))
        imagelock.renew(image, lock)
    if key is not None:
        images.Apptainer(container_program(settings.site, here=True), Path()).verify(image, key)


_VERBS = {"list": _list, "build": _build, "pull": _pull, "sign": _sign, "stage": _stage, "verify": _verify}


def _maker(
    options: argparse.Namespace, settings: Settings, stack: ExitStack, say: Callable[[str], None] | None = None
) -> Maker:
    """Who makes images here: program, folders and a workspace that goes when the stack closes."""
    folder = _folder(options, settings)
    for number in (signal.SIGTERM, signal.SIGHUP):  # end as for Ctrl-C: Apptainer too, and nothing half made is left
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    program = container_program(settings.site, here=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}", hint="--to names another folder") from error
    images.refuse_full(folder, making.LEAST)
    work = stack.enter_context(images.workspace(making.scratch(options.tmp, settings), making.LEAST))
    tell = say or _say
    apptainer = images.Apptainer(program, work, lambda text: tell(f"  {text}"))
    return Maker(apptainer, folder, settings.project.root, _shared(settings), tell)


def _shared(settings: Settings) -> Path | None:
    """The site's folder for images."""
    named = settings.site.images
    return Path(settings.project.root / expand(named)).absolute() if named else None


def _folder(options: argparse.Namespace, settings: Settings) -> Path:
    """Where the images lie: --to, else the site's folder; UsageError where neither is given."""
    folder = Path(expand(options.to)).absolute() if options.to else _shared(settings)
    if folder is None:
        raise UsageError(
            f"the site '{settings.site.name}' has no folder for images",
            hint="--to FOLDER, or images = '…' in its profile; without Apptainer: hpc images build NAME --as venv",
        )
    return folder


def _sifs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.sif") if not path.name.startswith("."))


def _image(name: str, options: argparse.Namespace, settings: Settings) -> Path:
    """The image of that name, or the path itself; NotFound where it is not there."""
    if name.endswith(".sif") and Path(name).is_file():
        return Path(name).absolute()
    folder = _folder(options, settings)
    path = folder / f"{name}.sif"
    if not path.is_file():
        known = [p.stem for p in _sifs(folder)]
        raise NotFound(f"there is no image {path}", hint=did_you_mean(name, known) if known else "hpc images build")
    return path


def _made(image: Path, fresh: bool) -> dict[str, Any]:
    lock = imagelock.read(image)
    if lock is None:
        raise HpcError(f"{imagelock.of(image)} is gone", hint="another process removed it; do the same again")
    return {"name": image.stem, "kind": "sif", "path": str(image), "fresh": fresh, "sha256": lock.sha256,
            "size": lock.size, "signed": lock.signed, "versions": lock.told(), "labels": dict(lock.labels)}  # fmt: skip


def _told(options: argparse.Namespace, document: dict[str, Any]) -> Answer:
    if not options.json:
        print(document["path"])
    return document


def _size(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f} GB"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
