"""
merge: a base model and its LoRA adapter -> one model in safetensors, that any engine can read.

The base is loaded unquantised, also after qlora: a 4-bit base would stay 4-bit and round the adapter away.
The sum is made in float32, compared with base + adapter, and only then rounded to the wanted type.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc.core.errors import HpcError, UsageError, VerificationFailed
from hpc.core.rundir import read_json
from hpc.core.stage import Artifact, Context, Input, Resources, Stage

_PROBE = "The quick brown fox jumps over the lazy dog."
_TOLERANCE = 1e-2
"""Largest difference of a logit between base + adapter and their sum in float32 (1e-4 is usual)."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """What to merge, and how to write it."""

    adapter: str | None = None
    """Folder of a LoRA adapter; None: from the stage before (finetune)."""
    base_model: str | None = None
    """The adapter's base: model folder, GGUF file or name on the hub; None: the one it was trained on."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the written weights."""
    readable: bool = False
    """Let every user of the machine read the files, whatever the umask says."""
    ask: str = ""
    """A question put to the base and to the merged model; both answers are recorded. Empty: none."""


def resources(config: MergeConfig) -> Resources:
    """No GPU: it adds matrices once. Host memory holds the base in float32, 4 bytes per parameter."""
    return Resources(cpus_per_task=8, mem_gb=64, time_min=60)


def outputs(config: MergeConfig) -> dict[str, Artifact]:
    return {"model": Artifact(kind="hf_model", path="model")}


def check(config: MergeConfig) -> None:
    """HpcError for a base that can't be loaded. Standard library."""
    from hpc.inside import models

    if config.base_model is not None:
        models.inspect(config.base_model)


def run(config: MergeConfig, ctx: Context) -> None:
    """Merge, write, and read back what was written; VerificationFailed where it is not base + adapter."""
    from hpc.inside import models

    models.settle()
    adapter = Path(ctx.inputs["adapter"])
    base = ctx.inputs.get("base_model") or recorded_base(adapter)
    ctx.progress(0, 4, "loading the base model")
    folder = models.local(base, ctx.cache)
    model = models.load(folder, "float32")
    words = _tokenizer(adapter, folder, model, ctx)
    ctx.metric(base_model=base, dtype=config.dtype)
    if config.ask:
        ctx.metric(question=config.ask, before=models.answer(model, words, config.ask))

    ctx.progress(1, 4, "merging")
    merged = _merge(model, adapter, words, ctx)
    ctx.progress(2, 4, "writing the model")
    with models.written_whole(ctx.outputs["model"], readable=config.readable) as part:
        _write(merged, words, part, config.dtype)
        del model, merged
        ctx.progress(3, 4, "reading it back")
        written = models.load(part, config.dtype)
        _logits(written, words)
        if config.ask:
            ctx.metric(after=models.answer(written, words, config.ask))
    ctx.progress(4, 4, "merged")


def recorded_base(adapter: Path) -> str:
    """The base that an adapter was trained on, by our base.json or else peft's own adapter_config.json."""
    ours = read_json(adapter / "base.json") or {}
    peft = read_json(adapter / "adapter_config.json")
    if peft is None:
        raise UsageError(f"{adapter} is no adapter", hint="it must hold adapter_config.json")
    base = ours.get("base_model") or peft.get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{adapter} does not say which base it was trained on", hint="set merge.base_model")
    return str(base)


def _tokenizer(adapter: Path, base: Path, model: Any, ctx: Context) -> Any:
    """The adapter's tokenizer, or the base's where that has tokens without a weight (an added [PAD])."""
    from hpc.inside import models

    rows = model.get_input_embeddings().num_embeddings
    if (adapter / "tokenizer_config.json").is_file():
        words = models.tokenizer(adapter)
        if len(words) <= rows:
            return words
        plain = models.tokenizer(base, words.chat_template)
        ctx.metric(dropped_tokens=sorted(set(words.get_vocab()) - set(plain.get_vocab())))
    else:
        plain = models.tokenizer(base)
    if len(plain) > rows:
        raise VerificationFailed(f"the base's tokenizer has {len(plain)} tokens, but the model has {rows}")
    return plain


def _merge(model: Any, adapter: Path, words: Any, ctx: Context) -> Any:
    """Base + adapter as one float32 model; VerificationFailed where its logits are not those of the two."""
    from peft import PeftModel

    if next(adapter.glob("*.bin"), None) and not (adapter / "adapter_model.safetensors").is_file():
        raise HpcError(f"{adapter} holds its weights as a pickle", hint="save the adapter as safetensors")
    try:
        both = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise VerificationFailed(
            f"the adapter does not fit the base: {str(error).strip().splitlines()[0][:200]}",
            hint="merge.base_model must be the model that it was trained on",
        ) from error
    apart = _logits(both, words)
    merged = both.merge_and_unload(safe_merge=True)
    difference = float((_logits(merged, words) - apart).abs().max())
    ctx.metric(largest_difference=difference)
    if difference > _TOLERANCE:
        raise VerificationFailed(f"the merged model's logits differ by {difference:.3g} from base + adapter")
    return merged


def _logits(model: Any, words: Any) -> Any:
    """The logits on a fixed sentence; VerificationFailed where one is not finite."""
    import torch

    with torch.inference_mode():
        logits = model.eval()(**words(_PROBE, return_tensors="pt", return_token_type_ids=False)).logits
    if not bool(torch.isfinite(logits).all()):
        raise VerificationFailed("the model gives logits that are not finite", hint="did the training diverge?")
    return logits


def _write(model: Any, words: Any, folder: Path, dtype: str) -> None:
    import torch

    model.to(getattr(torch, dtype))
    model.config.use_cache = True
    _mend(model.generation_config, words)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def _mend(generation: Any, words: Any) -> None:
    """Stop at the chat template's end of turn, and let sampling values that need sampling be saved at all."""
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if words.eos_token_id not in ends:
        generation.eos_token_id = [words.eos_token_id, *ends]
    try:
        generation.validate(strict=True)
    except ValueError:  # Llama-2's temperature without do_sample, which save_pretrained would refuse
        generation.do_sample = True


STAGE = Stage(
    name="merge",
    summary="Add a LoRA adapter to its base: one model in safetensors",
    config=MergeConfig,
    container="train",
    consumes={"adapter": Input(kind="lora_adapter"), "base_model": Input(kind="hf_model", optional=True)},
    outputs=outputs,
    resources=resources,
    run=run,
    check=check,
)
