"""Whether an engine's passport fits the image, the libraries and the cards that are here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from hpc.core import passport, rundir
from hpc.core.errors import VerificationFailed
from hpc.core.passport import Passport
from hpc.core.stage import Context
from hpc.inside import lorarrays
from hpc.inside.engines import gpus

_PACKAGES = ("tensorrt-llm", "tensorrt_llm", "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "onnxruntime-genai")


def refuse(engine: Path, ctx: Context) -> Passport:
    """The engine's passport; VerificationFailed where it cannot be served here."""
    found = passport.read(engine)
    document = rundir.read_json(rundir.StageDir(ctx.folder).config) or {}
    compute = None
    if found.compute:
        compute = gpus()[0][1]
    passport.refuse(
        found, image=str(document.get("environment", {}).get("digest", "")), versions=versions(), compute=compute
    )
    lorarrays.verify(engine, found)
    return found


def refuse_early(engine: Path, settings: object, known: Mapping[str, str]) -> None:
    """The same before the queue, as far as the image's record tells its libraries, and for the settings."""
    found = passport.read(engine)
    agree(found, settings)
    if known and (found.engine == "onnxruntime_genai" or {"tensorrt-llm", "tensorrt"} <= known.keys()):
        passport.refuse(found, image="", versions=known)


def versions() -> dict[str, str]:
    """Those of the libraries that count and are there, by the names that passports use."""
    known = {}
    for name in _PACKAGES:
        try:
            known[name.replace("_", "-").partition("-cu")[0]] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return known


def agree(found: Passport, settings: object) -> None:
    """VerificationFailed where the engine is another than the settings say."""
    for name in ("engine", "tp_size", "pp_size"):
        said, built = getattr(settings, name), getattr(found, name)
        if said not in (built, "auto"):
            raise VerificationFailed(
                f"the engine has {name} {built}, and the settings say {said}",
                hint=f"set build.{name} to {built}, or build it again",
            )
