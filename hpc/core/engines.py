"""What the settings of an engine come to: shared by the stages that convert, build and serve one.

Their configs have the same names for the same things: engine, tp_size, pp_size, auto, dtype, quantization, kv_cache, …
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hpc.core import division
from hpc.core.division import Division
from hpc.core.errors import Refused
from hpc.core.shape import Shape
from hpc.core.stage import Around

LONGEST = 8192
"""Tokens of a request where nothing is said, at most."""


def settle(config: Any, around: Around) -> Any:
    """Engine, precision, division and lengths, as far as site, card and model decide them."""
    engine = config.engine
    if engine == "auto":
        engine = "onnxruntime_genai" if around.site.gpus == "none" else "tensorrt_llm"
    dtype = config.dtype
    if dtype == "auto" and engine == "onnxruntime_genai":
        dtype = "float32"
    elif dtype == "auto" and around.shape is not None:
        brain = around.shape.dtype == "bfloat16" and (around.card is None or around.card.card.bf16)
        dtype = "bfloat16" if brain else "float16"
    made = replace(config, engine=engine, dtype=dtype)
    shape, card = around.shape, around.card
    if shape is None:
        return made
    longest = min(shape.positions, LONGEST)
    if hasattr(config, "max_seq_len") and config.max_seq_len is None:
        made = replace(made, max_seq_len=longest)
    if config.auto and engine != "onnxruntime_genai" and card is not None:
        # not for the sizes of the requests: convert does not have them, and both must choose the same
        usual = replace(Division(**_precision(made)), max_seq_len=longest)
        known = division.sized(shape, usual)
        found = division.smallest(shape, card.card, around.node_gpus, usual) if known else None
        if found is not None:
            made = replace(made, tp_size=found.tp, pp_size=found.pp)
    return made


def _precision(config: Any) -> dict[str, Any]:
    return {
        "dtype": "float16" if config.dtype == "auto" else config.dtype,
        "quantization": config.quantization,
        "kv_cache": config.kv_cache,
        "as_is": config.engine == "llmapi",
    }


def way_of(config: Any) -> Division:
    """The settings as the arithmetic takes them; without the sizes of requests where the stage has none."""
    return Division(
        tp=config.tp_size,
        pp=config.pp_size,
        **_precision(config),
        max_batch_size=getattr(config, "max_batch_size", 1),
        max_seq_len=getattr(config, "max_seq_len", 1) or 1,
        max_num_tokens=getattr(config, "max_num_tokens", 1),
    )


def judged(stage: str, config: Any, around: Around) -> tuple[str, ...]:
    """The plan's notes on a division among GPUs; Refused where it can't work."""
    if around.site.gpus == "none":
        raise Refused(
            f"{stage}: {config.engine} needs GPUs, and site '{around.site.name}' gives none",
            hint='choose a site with GPUs (--site), or build.engine = "onnxruntime_genai", which runs on the CPU',
        )
    shape, card, way = around.shape, around.card.card if around.card else None, way_of(config)
    sized = division.sized(shape, way)
    if config.auto and (not sized or card is None):
        what = "the model's shape" if shape is None else "the model's size" if not sized else "the site's card"
        raise Refused(
            f"{stage}: auto can't choose tp_size and pp_size, as {what} is not known",
            hint="give a model folder with a config.json"
            if shape is None
            else "set build.tp_size and pp_size yourself"
            if not sized
            else 'name the card in the site profile, e.g. gpu = "a100-80"',
        )
    estimate = division.judge(stage, "build", shape, card, around.node_gpus, way)
    notes = [f"{stage}: {warning}"] if (warning := division.slow(card, way)) else []
    if shape is None:
        return (*notes, unknown(stage, around))
    if not sized:
        return (*notes, f"{stage}: {_unsized(shape, around)}, so memory is not estimated")
    if card is None or estimate is None or around.card is None:
        return (
            *notes,
            f"{stage}: the site does not tell its card, so memory is not estimated (gpu = … in its profile)",
        )
    text = f"{stage}: {division.words(shape, card, way, estimate)}"
    if around.card.guessed:
        text += f"; taken as {card.name}, gpu = … in the site profile says otherwise"
    return (*notes, text)


def _unsized(shape: Shape, around: Around) -> str:
    if not shape.understood:
        return f"the layers of {shape.architecture} are not all of one known kind"
    return f"{around.model or 'the model'} is quantised and the size of its files is not known here"


def unknown(stage: str, around: Around) -> str:
    where = f" of {around.model}" if around.model else ""
    return f"{stage}: the model's shape{where} is not known here, it is checked when the job runs"
