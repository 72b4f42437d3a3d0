"""NVIDIA's own repository (inflight_batcher_llm): a value for all that its files ask for, and what its models know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc.core import responses
from hpc.core.errors import HpcError
from hpc.inside import pbtxt
from hpc.inside.repository import parameter
from hpc.inside.translating import beginning

BLS = "tensorrt_llm_bls"
_MODELS = ("preprocessing", "tensorrt_llm", "postprocessing", "ensemble", BLS)
_NAME = re.compile(r"\$\{(\w+)\}")
_OPTIONAL = re.compile(r'^\s*#.*$|\bstring_value\s*:\s*"\$\{\w+\}"', re.MULTILINE)


def complete(folder: Path, filling: Mapping[str, str]) -> dict[str, str]:
    """The values, with one for each name that the files ask for; HpcError that tells at once all that is missing.

    A parameter that nobody sets is "": their C++ cannot make a number, a switch, a list or a path of it and keeps its
    default, as with a name that is left standing; their Python asks for both (v0.16.0 to v0.19.0 of
    tensorrtllm_backend, TensorRT-LLM after that).
    """
    if not folder.is_dir():
        raise HpcError(f"{folder} is not there", hint="does the image have it?")
    asked: set[str] = set()
    needed: set[str] = set()
    for path in sorted(folder.rglob("*.pbtxt")):
        text = path.read_text(encoding="utf-8")
        asked.update(_NAME.findall(text))
        needed.update(_NAME.findall(_OPTIONAL.sub("", text)))
    lacking = [model for model in _MODELS if not (folder / model / "config.pbtxt").is_file()]
    unknown = sorted(needed - set(filling))
    said = [f"has no model {', '.join(lacking)}"] * bool(lacking)
    said += [f"asks for {', '.join(f'${{{name}}}' for name in unknown)}, which has no value"] * bool(unknown)
    if said:
        hint = (
            "give the folder inflight_batcher_llm of the image" if lacking else 'serve.extra = ["NAME=VALUE"] sets one'
        )
        raise HpcError(f"{folder} {', and '.join(said)}", hint=hint)
    return {**dict.fromkeys(asked, ""), **filling}


def known(repository: Path, tokenizer: Path) -> dict[str, Any]:
    """What the door must know of the one of its models that it asks."""
    bls, prepares = _read(repository, BLS), _read(repository, "preprocessing")
    adds = (parameter(prepares, "add_special_tokens") or "").lower() not in {"false", "0", "f", "n", "no"}
    return {
        "cumulative": responses.accumulates(parameter(bls, "accumulate_tokens")),
        "names": responses.names(pbtxt.one(entry, "name") for entry in bls.get("input", [])),
        "begins": beginning(tokenizer) if adds else "",
    }


def _read(repository: Path, model: str) -> pbtxt.Message:
    return pbtxt.parse((repository / model / "config.pbtxt").read_text(encoding="utf-8"))
