"""What stands beside a model's weights: its tokenizer with the chat template, and how it generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpc.core.errors import VerificationFailed
from hpc.core.rundir import read_json
from hpc.core.stage import Context
from hpc.inside import models


def tokenizer(adapter: Path, base: Path, ctx: Context) -> Any:
    """The adapter's tokenizer, or the base's where that has tokens without a weight (an added [PAD])."""
    config = read_json(base / "config.json") or {}
    rows = int((config.get("text_config") or config).get("vocab_size") or 0)
    if (adapter / "tokenizer_config.json").is_file():
        words = models.tokenizer(adapter)
        if not rows or len(words) <= rows:
            return words
        plain = models.tokenizer(base, words.chat_template)
        ctx.metric(dropped_tokens=sorted(set(words.get_vocab()) - set(plain.get_vocab())))
    else:
        plain = models.tokenizer(base)
    if rows and len(plain) > rows:
        raise VerificationFailed(f"the base's tokenizer has {len(plain)} tokens, but the model has {rows}")
    return plain


def write(base: Path, words: Any, target: Path) -> None:
    """The tokenizer, and the base's generation_config.json, mended."""
    from transformers import AutoConfig, GenerationConfig

    words.save_pretrained(target)
    try:
        generation = GenerationConfig.from_pretrained(base)
    except OSError:  # it has none of its own
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(target))
    mend(generation, words)
    generation.save_pretrained(target)


def mend(generation: Any, words: Any) -> None:
    """Stop at the chat template's end of turn, and let sampling values that need sampling be saved at all."""
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if words.eos_token_id not in ends:
        generation.eos_token_id = [words.eos_token_id, *ends]
    try:
        generation.validate(strict=True)
    except ValueError:  # Llama-2's temperature without do_sample, which save_pretrained would refuse
        generation.do_sample = True
