"""TensorRT-LLM's three programs as data: which release has which flags and folders; and their argv.

The engine workflow ends with 1.2: later releases serve a Hugging Face model as it is (`llmapi`).

Sources, read in NVIDIA/TensorRT-LLM:
  convert_checkpoint.py  examples/llama at 04a2cacb (before 0.17), examples/models/core/qwen at 0df9aaf3 (since 0.20)
  quantize.py            examples/quantization at 059c97c1; older ones lack --export_format, which is not used here
  trtllm-build           tensorrt_llm/commands/build.py at 008b2b8d; --auto_parallel left after 1.0 (PR 8329)
  calibration folder     tensorrt_llm/quantization/quantize_by_modelopt.py at 042c510d: split "train", column "text"
  paged context FMHA     issue 2166 (no int8 cache); "FP8 Paged Context FMHA only works with fp8 quantization workflow"
  the end                PRs 15763, 15907, 15918 (July 2026)
The commits are the nearest that could be read, not the tags: so every flag is held against the image's own --help.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpc.core.errors import Refused
from hpc.core.passport import numbers

EXAMPLES = "/app/tensorrt_llm/examples"
"""Where NVIDIA's images have the scripts."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """What is known of a release and of those after it, up to the next one in the table."""

    version: tuple[int, int]
    folder: str
    """The folder of convert_checkpoint.py below the examples; {family} is llama, qwen, …"""
    paged: tuple[str, ...]
    """trtllm-build's words for a paged KV cache."""
    dtype_auto: bool
    """convert_checkpoint.py takes --dtype auto."""
    source: str


RELEASES = (
    Release(
        version=(0, 16), folder="{family}", paged=("--kv_cache_type", "paged"), dtype_auto=False,
        source="container 24.12; examples/llama/convert_checkpoint.py at 04a2cacb",
    ),
    Release(
        version=(0, 18), folder="{family}", paged=("--kv_cache_type", "paged"), dtype_auto=True,
        source="containers 25.03, 25.04; commands/build.py at 008b2b8d",
    ),
    Release(
        version=(0, 20), folder="models/core/{family}", paged=("--kv_cache_type", "paged"), dtype_auto=True,
        source="containers 25.06, 25.07; the examples moved to models/core",
    ),
    Release(
        version=(1, 0), folder="models/core/{family}", paged=("--kv_cache_type", "paged"), dtype_auto=True,
        source="containers 25.09, 25.10; examples/models/core/qwen/convert_checkpoint.py at 0df9aaf3",
    ),
    Release(
        version=(1, 2), folder="models/core/{family}", paged=("--kv_cache_type", "paged"), dtype_auto=True,
        source="containers 26.03 to 26.07; the last with engines is 1.2.1",
    ),
)  # fmt: skip
LAST = (1, 2)

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen",
    "Qwen3ForCausalLM": "qwen",
    "Phi3ForCausalLM": "phi",
}
"""A model's architecture -> the folder of its converter. Gemma's has other flags: it goes through quantize.py."""
UNSTAGED = ("Phi3ForCausalLM",)
"""Whose converter asserts that there is one pipeline stage: examples/phi/convert_checkpoint.py."""
QUANTIZED_ONLY = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")

_QFORMAT = {
    "none": "full_prec",
    "int8": "int8_wo",
    "int4": "int4_wo",
    "int8_sq": "int8_sq",
    "int4_awq": "int4_awq",
    "w4a8_awq": "w4a8_awq",
    "fp8": "fp8",
    "nvfp4": "nvfp4",
}


def release(version: str) -> Release:
    """What is known of a version; Refused for one that builds no engines, or is older than the table."""
    found = numbers(version)[:2]
    if found > LAST:
        raise Refused(
            f"TensorRT-LLM {version} builds no engines any more: 1.2.1 is the last that does",
            hint='serve the model as it is: build.engine = "llmapi"; or take an image up to 26.07-trtllm-python-py3',
        )
    known = [r for r in RELEASES if r.version <= found]
    if not known:
        raise Refused(
            f"TensorRT-LLM {version} is older than 0.16, the oldest whose commands are known",
            hint="take a newer image: hpc images build trtllm",
        )
    return known[-1]


def family(architecture: str) -> str | None:
    """The folder of the converter; None for an architecture that only quantize.py takes, or nothing."""
    return FAMILIES.get(architecture)


def calibrated(quantization: str, kv_cache: str) -> bool:
    """True where the figures of the model at work are needed: quantize.py with a set of texts, and a GPU."""
    return quantization not in ("none", "int8", "int4") or kv_cache != "auto"


def convert(
    known: Release,
    *,
    examples: str,
    architecture: str,
    model: str,
    output: str,
    dtype: str,
    tp: int,
    pp: int,
    quantization: str,
    kv_cache: str,
    workers: int,
    calibration: str | None,
    calib_size: int,
    calib_length: int,
) -> tuple[str, ...]:
    """The argv that makes the checkpoints, one per rank; Refused for an architecture that has no converter."""
    division = ("--tp_size", str(tp), "--pp_size", str(pp))
    if calibrated(quantization, kv_cache) or architecture in QUANTIZED_ONLY:
        texts = ("--calib_dataset", calibration, "--calib_size", str(calib_size)) if calibration else ()
        return (
            "python3", f"{examples}/quantization/quantize.py",
            "--model_dir", model, "--output_dir", output, "--dtype", dtype,
            "--qformat", _QFORMAT[quantization],
            *(("--kv_cache_dtype", kv_cache) if kv_cache != "auto" else ()),
            *(("--awq_block_size", "128") if "awq" in quantization else ()),
            *division, *texts,
            *(("--calib_max_seq_length", str(calib_length)) if texts else ()),
        )  # fmt: skip
    folder = family(architecture)
    if folder is None:
        raise Refused(
            f"there is no converter for {architecture}",
            hint=f"known are {', '.join([*FAMILIES, *QUANTIZED_ONLY])};"
            ' another model is served as it is: build.engine = "llmapi"',
        )
    return (
        "python3", f"{examples}/{known.folder.format(family=folder)}/convert_checkpoint.py",
        "--model_dir", model, "--output_dir", output, "--dtype", dtype, *division,
        *(("--use_weight_only", "--weight_only_precision", quantization) if quantization != "none" else ()),
        "--workers", str(workers),
    )  # fmt: skip


def build(
    known: Release,
    *,
    checkpoint: str,
    output: str,
    quantization: str,
    kv_cache: str,
    max_batch_size: int,
    max_input_len: int,
    max_seq_len: int,
    max_num_tokens: int,
    max_beam_width: int,
    lora_modules: tuple[str, ...],
    max_lora_rank: int,
    workers: int,
) -> tuple[str, ...]:
    """The argv that makes the engines, one per rank. How the model is divided stands in the checkpoint.

    `quantization` and `kv_cache` are those of the checkpoint: quantize.py may choose an fp8 cache by itself.
    """
    fp8 = quantization == "fp8"
    # reuse of the cache and chunked prompts need these kernels, which read no quantised cache but that of an fp8 model
    paged_context = kv_cache == "auto" or (kv_cache == "fp8" and fp8)
    lora = ("--lora_plugin", "auto", "--max_lora_rank", str(max_lora_rank), "--lora_target_modules", *lora_modules)
    return (
        "trtllm-build",
        "--checkpoint_dir", checkpoint, "--output_dir", output,
        "--max_batch_size", str(max_batch_size), "--max_input_len", str(max_input_len),
        "--max_seq_len", str(max_seq_len), "--max_num_tokens", str(max_num_tokens),
        "--max_beam_width", str(max_beam_width),
        # in-flight batching needs the plugin, packed inputs and a paged cache
        "--gpt_attention_plugin", "auto", "--gemm_plugin", "auto", *known.paged, "--remove_input_padding", "enable",
        "--use_paged_context_fmha", "enable" if paged_context else "disable",
        *(("--use_fp8_context_fmha", "enable") if fp8 and kv_cache == "fp8" else ()),
        *(lora if max_lora_rank else ()),
        "--workers", str(workers),
    )  # fmt: skip


_ALGORITHMS = {
    "W8A16": "int8",
    "W4A16": "int4",
    "W4A16_AWQ": "int4_awq",
    "W4A8_AWQ": "w4a8_awq",
    "FP8": "fp8",
    "NVFP4": "nvfp4",
}
"""quant_algo of a checkpoint -> our name."""


def precision(quantization: Mapping[str, Any]) -> tuple[str, str]:
    """(quantization, kv_cache) of a checkpoint, by its config.json.

    >>> precision({"quant_algo": "W8A8_SQ_PER_CHANNEL", "kv_cache_quant_algo": "INT8"}), precision({})
    (('int8_sq', 'int8'), ('none', 'auto'))
    """
    algorithm = str(quantization.get("quant_algo") or "")
    name = "int8_sq" if "W8A8_SQ" in algorithm else _ALGORITHMS.get(algorithm, algorithm.lower() or "none")
    return name, str(quantization.get("kv_cache_quant_algo") or "auto").lower()


def missing_flags(argv: tuple[str, ...], help_text: str) -> list[str]:
    """The flags of argv that a program's --help does not know.

    >>> missing_flags(("x", "--dtype", "auto", "--new"), "usage: x [-h] [--dtype {auto}] [--dtypes N]")
    ['--new']
    """
    known = set(re.findall(r"--[A-Za-z][\w-]*", help_text))
    return [word for word in argv if word.startswith("--") and word not in known]
