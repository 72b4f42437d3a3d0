"""Triton's model repository: templates and settings -> a checked folder, or an error before the server starts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc.core.errors import HpcError, VerificationFailed
from hpc.inside import pbtxt

ENGINES = ("onnxruntime_genai", "tensorrt_llm", "llmapi")
_NAME = re.compile(r"\$\{(\w*)\}?")
_IMAGE_LLMAPI = Path("/app/all_models/llmapi/tensorrt_llm/1")
"""Where NVIDIA's images have the code of their llmapi model."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What can be set of a repository. None: the engine's own default."""

    triton_max_batch_size: int = 64
    decoupled_mode: bool = True
    """Answers can stream. The models that must agree on it are set together."""
    preprocessing_instance_count: int = 1
    postprocessing_instance_count: int = 1
    bls_instance_count: int = 1
    max_queue_delay_microseconds: int = 0
    max_queue_size: int = 0
    """Requests that wait before new ones are refused; 0: any number."""
    engine_max_batch_size: int = 0
    """Requests that the engine works on at once; 0: as many as Triton takes. (TensorRT-LLM's are built in.)"""
    stream_interval_ms: int = 32
    """Between two pieces of an answer, at least; 0: a piece for each token. (Our own engine's.)"""
    max_seq_len: int = 0
    """Tokens of prompt and answer together; 0: what the engine can."""
    default_max_tokens: int = 16
    """Where a request names no max_tokens."""
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    exclude_input_in_output: bool = True
    batching_strategy: str = "inflight_fused_batching"
    batch_scheduler_policy: str = "guaranteed_no_evict"
    kv_cache_free_gpu_mem_fraction: float = 0.9
    max_tokens_in_paged_kv_cache: int | None = None
    max_attention_window_size: int | None = None
    enable_kv_cache_reuse: bool = False
    enable_chunked_context: bool = False
    max_beam_width: int = 1
    cancellation_check_period_ms: int = 100
    gpu_device_ids: str | None = None
    lora_prefetch_dir: str | None = None
    lora_cache_optimal_adapter_size: int | None = None
    lora_cache_max_adapter_size: int | None = None
    lora_cache_gpu_memory_fraction: float | None = None
    lora_cache_host_memory_bytes: int | None = None
    lora_data_type: str = "TYPE_FP16"
    adapters: str = ""
    """The names of adapters that lie beside a TensorRT engine and their tasks, as JSON; a request may give one."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    enable_lora: bool = False
    lora_config: str = "null"
    """For llmapi, as YAML in one line."""


_ENGINE_PARAMETERS = (
    "max_beam_width", "max_tokens_in_paged_kv_cache", "max_attention_window_size", "batch_scheduler_policy",
    "kv_cache_free_gpu_mem_fraction", "exclude_input_in_output", "cancellation_check_period_ms",
    "enable_kv_cache_reuse", "enable_chunked_context", "gpu_device_ids", "lora_prefetch_dir",
    "lora_cache_optimal_adapter_size", "lora_cache_max_adapter_size", "lora_cache_gpu_memory_fraction",
    "lora_cache_host_memory_bytes",
)  # fmt: skip
"""The C++ backend's parameters that are written where they are set: an empty one is not the same as none."""


def values(engine: str, engine_dir: Path, tokenizer_dir: Path, settings: Settings) -> dict[str, str]:
    """The name of everything that a template may ask for -> its text."""
    found: dict[str, Any] = {
        **asdict(settings),
        "engine_max_batch_size": settings.engine_max_batch_size or settings.triton_max_batch_size,
        "engine_dir": engine_dir,
        "tokenizer_dir": tokenizer_dir,
        "tensorrt_llm_model_name": "tensorrt_llm",
        "triton_backend": "tensorrtllm",
        "accumulate_tokens": True,
        "logits_datatype": "TYPE_FP32",
        "encoder_input_features_data_type": "TYPE_FP16",
        "prompt_embedding_table_data_type": "TYPE_FP16",
        "stop_words_as": "text" if engine == "onnxruntime_genai" else "tokens",
        "max_tokens_in_cache": settings.max_tokens_in_paged_kv_cache or 0,
        "llm_max_seq_len": settings.max_seq_len or "null",
        "llm_kv_tokens": settings.max_tokens_in_paged_kv_cache or "null",
        "llm_window": f"[{settings.max_attention_window_size}]" if settings.max_attention_window_size else "null",
    }
    parameters = {"gpt_model_type": settings.batching_strategy, **{n: found[n] for n in _ENGINE_PARAMETERS}}
    texts = {name: _word(value) for name, value in found.items() if value is not None}
    lines = [_PARAMETER.format(name, _word(value)) for name, value in parameters.items() if value is not None]
    return {**texts, "engine_parameters": "\n".join(lines)}


_PARAMETER = 'parameters {{ key: "{}" value: {{ string_value: "{}" }} }}'


def _word(value: object) -> str:
    """A value as a text-format file holds it, inside quotes or bare."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    if any(ord(c) < 32 for c in text):
        raise HpcError(f"{text!r} cannot stand in Triton's configuration", hint="take the control characters out")
    return text.replace("\\", "\\\\").replace('"', '\\"')


def fill(text: str, values: Mapping[str, str], where: str = "the template") -> str:
    """The text with every ${name} replaced; HpcError that names one which has no value.

    >>> fill("count: ${n}", {"n": "2"})
    'count: 2'
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in values or not match[0].endswith("}"):
            raise HpcError(f"{where} asks for {match[0]}, which has no value", hint="is it of another release?")
        return values[match[1]]

    return _NAME.sub(value, text)


def render(target: Path, engine: str, templates: Path, filling: Mapping[str, str], vendor: Path | None = None) -> None:
    """Make the repository at `target`, whole or not at all; one that is there is replaced.

    `vendor`: the folder of NVIDIA's own repository, whose templates are filled instead of ours (hpc.inside.vendor).
    """
    new = target.with_name(f"{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    if vendor is not None:
        sources = [vendor]
    else:
        sources = [templates / engine] if engine == "llmapi" else [templates / "common", templates / engine]
    try:
        for source in sources:
            _copy(source, new, filling)
        for model in new.iterdir() if vendor is None else ():
            (model / "1").mkdir(exist_ok=True)  # Triton wants a version, even of an ensemble
            if (model / "1" / "model.py").exists():
                shutil.copyfile(templates / "text.py", model / "1" / "text.py")
        if engine == "llmapi":
            if not (_IMAGE_LLMAPI / "model.py").is_file():
                raise HpcError(f"{_IMAGE_LLMAPI}/model.py is not there", hint="serve with the environment triton")
            for path in _IMAGE_LLMAPI.glob("*.py"):
                shutil.copyfile(path, new / "tensorrt_llm" / "1" / path.name)
        check(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)


def _copy(source: Path, target: Path, filling: Mapping[str, str]) -> None:
    if not source.is_dir():
        raise HpcError(f"{source} is not there", hint="does the image have it?")
    for path in sorted(p for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in {".pbtxt", ".yaml"}:
            text = path.read_text(encoding="utf-8")
            place.write_text(fill(text, filling, f"{path.parent.name}/{path.name}"), encoding="utf-8")
        else:
            shutil.copyfile(path, place)


def check(folder: Path) -> None:
    """VerificationFailed where Triton would accept the repository, or hang, and then not work."""
    models = {path.parent.name: pbtxt.parse(path.read_text(encoding="utf-8")) for path in folder.glob("*/config.pbtxt")}
    problems = list(_problems(folder, models))
    if problems:
        raise VerificationFailed(f"the model repository cannot work: {problems[0]}", hint="; ".join(problems[1:]))


def _problems(folder: Path, models: Mapping[str, pbtxt.Message]) -> Iterator[str]:
    if not models:
        yield "there is no model in it"
    for name, config in models.items():
        if pbtxt.one(config, "name", name) != name:
            yield f"the model in {name}/ calls itself {pbtxt.one(config, 'name')}"
        if pbtxt.one(config, "backend") == "python" and not (folder / name / "1" / "model.py").is_file():
            yield f"{name} has no 1/model.py"
        for step in _steps(config):
            if step not in models:
                yield f"{name} has a step {step}, which is not there"
        target = parameter(config, "tensorrt_llm_model_name")
        if target is not None and target not in models:
            yield f"{name} calls {target}, which is not there"
        if target is not None and target in models and decoupled(config) != decoupled(models[target]):
            yield f"{name} and {target} do not agree on decoupled"
    yield from _unfilled(folder)


def _unfilled(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.pbtxt")):
        found = _NAME.search(path.read_text(encoding="utf-8"))
        if found:
            yield f"{path.relative_to(folder)} still asks for {found[0]}"


def _steps(config: pbtxt.Message) -> list[str]:
    return [
        pbtxt.one(step, "model_name") for plan in config.get("ensemble_scheduling", []) for step in plan.get("step", [])
    ]


def decoupled(config: pbtxt.Message) -> bool:
    """Whether a model may answer one request more than once."""
    policy = pbtxt.one(config, "model_transaction_policy", {})
    return str(pbtxt.one(policy, "decoupled", "false")).lower() in {"true", "1"}


def parameter(config: pbtxt.Message, name: str) -> str | None:
    """One of a model's parameters."""
    for entry in config.get("parameters", []):
        if pbtxt.one(entry, "key") == name:
            return str(pbtxt.one(pbtxt.one(entry, "value", {}), "string_value", ""))
    return None


def tokenizer_of(engine: Path, given: str) -> Path:
    """The folder with tokenizer.json: what was given, else the engine's own; HpcError where there is none."""
    folder = Path(given) if given else engine
    if not (folder / "tokenizer.json").is_file():
        raise HpcError(
            f"{folder} has no tokenizer.json", hint="set `tokenizer` to the folder of the model it was made from"
        )
    return folder


def ends(tokenizer: Path) -> dict[str, Any]:
    """tokenizer_config.json, or nothing."""
    path = tokenizer / "tokenizer_config.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
