"""What stands beside a model's weights: its tokenizer with the chat template, and how it generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpc.core.errors import VerificationFailed
from hpc.core.rundir import read_json
from hpc.core.stage import Context
from hpc.inside import conversations, models

_TALK = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is a"}]
ENDLESS = (
    "the chat template ends an answer with no token of its own, so that a served answer may run on: "
    "take a template whose end of turn is a token of this model's"
)


def tokenizer(adapter: Path, base: Path, ctx: Context, resized: int = 0) -> Any:
    """The adapter's tokenizer, or the base's where that has tokens without a weight (an added [PAD]).

    `resized`: rows of the embeddings where the adapter has its own.
    """
    config = read_json(base / "config.json") or {}
    rows = resized or int((config.get("text_config") or config).get("vocab_size") or 0)
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


def write(base: Path, words: Any, target: Path) -> bool:
    """The tokenizer, and the base's generation_config.json, mended; False where no token ends an answer."""
    from transformers import AutoConfig, GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(base)
    except OSError:  # it has none of its own
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(target))
    ended = mend(generation, words)
    words.save_pretrained(target)
    generation.save_pretrained(target)
    return ended


def end_of_turn(words: Any) -> int | None:
    """The first token of its own (`<|im_end|>`) that the chat template writes behind an answer; None: there is none."""
    from jinja2 import TemplateError

    try:
        behind = conversations.behind(_TALK, words)
    except TemplateError:  # it wants to be asked otherwise
        return None
    own = {token for token, added in words.added_tokens_decoder.items() if added.content.strip()}
    return next((token for token in behind if token in own), None)


def mend(generation: Any, words: Any) -> bool:
    """
    Stop at the chat template's end of turn, and let sampling values that need sampling be saved at all.

    TensorRT-LLM stops at the tokenizer's end alone: the end of turn becomes it, where the template writes the same with
    it. False where an answer ends with no token of its own, so that nothing can stop there.
    """
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    turn = end_of_turn(words)
    wanted = [token for token in dict.fromkeys((turn, words.eos_token_id)) if token is not None and token not in ends]
    if wanted:
        generation.eos_token_id = [*wanted, *ends]
    if turn is not None and turn != words.eos_token_id:
        before, written = words.eos_token, words.apply_chat_template(_TALK, tokenize=False)
        words.eos_token = words.convert_ids_to_tokens(turn)
        if words.apply_chat_template(_TALK, tokenize=False) != written:
            words.eos_token = before
    try:
        generation.validate(strict=True)
    except ValueError:  # Llama-2's temperature without do_sample, which save_pretrained would refuse
        generation.do_sample = True
    return turn is not None
