"""passport.json in an engine's folder: what the engine was made of and for; and the refusal to serve it elsewhere.

A TensorRT engine runs only with the libraries that built it, on the architecture that it was built on; another server
finds that out minutes later, on the GPU, in words that nobody understands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from hpc.core import rundir
from hpc.core.errors import VerificationFailed

Engine = Literal["tensorrt_llm", "onnxruntime_genai"]

FILE = "passport.json"
SCHEMA = "hpc.passport/1"
_EXACT = {"tensorrt_llm": ("tensorrt-llm", "tensorrt"), "onnxruntime_genai": ()}
"""Packages that must have the very version at serving."""
_NOT_OLDER = {"tensorrt_llm": (), "onnxruntime_genai": ("onnxruntime-genai",)}
"""Packages that may be newer at serving."""


@dataclass(frozen=True, kw_only=True)
class Passport:
    """One engine, as it was built."""

    engine: Engine
    model: str
    """The source model's key: content hash, or the key of the stage that made it."""
    architecture: str
    """As the model's config.json names it: LlamaForCausalLM, …"""
    image: str
    """Digest of the environment that it was built in."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package -> version of the libraries that count: tensorrt-llm, tensorrt, onnxruntime-genai."""
    gpu: str = ""
    """The card's name as the driver tells it; empty: built for the CPU."""
    compute: str = ""
    """The card's compute capability, e.g. 8.0; empty: built for the CPU."""
    tp_size: int = 1
    pp_size: int = 1
    dtype: str
    """float16, bfloat16, float32: what is calculated in."""
    quantization: str = "none"
    kv_cache: str = "auto"
    max_batch_size: int
    """Most requests at once. For onnxruntime_genai no limit of the engine, but of the memory."""
    max_input_len: int
    """Longest prompt, tokens."""
    max_seq_len: int
    """Prompt and answer together, tokens."""
    max_lora_rank: int = 0
    """Highest rank of LoRA adapters that come with a request; 0: none may."""
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """LoRA adapter -> its task, rank, digest and place in the cache, where they lie beside the engine as arrays."""

    @property
    def gpus(self) -> int:
        """GPUs, and ranks, that it needs at serving; 0 for one that runs on the CPU."""
        return self.tp_size * self.pp_size if self.compute else 0


def write(folder: Path, passport: Passport) -> None:
    """Put the passport into the engine's folder."""
    rundir.write_json(folder / FILE, {"schema": SCHEMA, **asdict(passport)}, durable=True)


def read(folder: Path) -> Passport:
    """The passport in an engine's folder; VerificationFailed where there is none that can be read."""
    document: Mapping[str, Any] | None = rundir.read_json(folder / FILE)
    if document is None or document.get("schema") != SCHEMA:
        raise VerificationFailed(
            f"{folder} is no engine of hpc's: it has no {FILE}",
            hint="build it: hpc submit build",
        )
    known = {f.name for f in fields(Passport)}
    try:
        return Passport(**{k: v for k, v in document.items() if k in known})
    except TypeError as error:
        raise VerificationFailed(f"{folder / FILE} is damaged: {error}", hint="build the engine again") from error


def refuse(
    passport: Passport,
    *,
    image: str,
    versions: Mapping[str, str],
    compute: str | None = None,
    model: str | None = None,
) -> None:
    """
    VerificationFailed where the engine cannot run, or answer, in an environment with this digest and these versions.

    What is not known is not compared: `compute` (the capability of the cards, "" for a CPU) and `model` (a key).
    Where the versions of one side are not known, the environment must be the very one that it was built in.
    """
    again = "build it again with these settings: hpc submit build"
    if model is not None and model != passport.model:
        raise VerificationFailed(f"the engine was built of another model ({passport.model}, not {model})", hint=again)
    if compute is not None and passport.compute and compute != passport.compute:
        here = f"compute capability {compute}" if compute else "a CPU"
        raise VerificationFailed(
            f"the engine was built on {passport.gpu or 'a card'} (compute capability {passport.compute}),"
            f" and would be served on {here}",
            hint="serve it on such a card, or build it on the partition that serves: hpc submit build",
        )
    if image == passport.image:
        return
    for name in _EXACT[passport.engine]:
        built, found = passport.versions.get(name), versions.get(name)
        if built is None or found is None:
            raise VerificationFailed(
                f"the engine was built in another image, and which {name} "
                f"{'it was built with' if built is None else 'the image has'} is not known",
                hint="serve it with the image that built it, or build it again: hpc submit build",
            )
        if built != found:
            raise VerificationFailed(
                f"the engine was built with {name} {built}, and the image has {found}",
                hint="serve it with the image that built it, or build it again: hpc submit build",
            )
    for name in _NOT_OLDER[passport.engine]:
        built, found = passport.versions.get(name), versions.get(name)
        if built is not None and found is not None and numbers(found) < numbers(built):
            raise VerificationFailed(
                f"the engine was built with {name} {built}, and the image has the older {found}",
                hint="serve it with the image that built it, or build it again: hpc submit build",
            )


def numbers(version: str) -> tuple[int, ...]:
    """A version's leading numbers.

    >>> numbers("1.2.1"), numbers("0.17.0.post1"), numbers("1.0.0rc2")
    ((1, 2, 1), (0, 17, 0), (1, 0, 0))
    """
    found = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
        if digits != part:
            break
    return tuple(found)
