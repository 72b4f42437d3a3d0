"""LLaMA 3's tokenizer as Meta gives it (a line "base64 rank" for each token) -> tokenizer.json.

Byte-level BPE where a token's rank is its turn: tokenizers does the same with every split of a token as a merge, in
the order of the ranks, which is how transformers converts such files too. Neither tiktoken nor transformers' converter
is needed. Special tokens, pattern and what begins a text: transformers, convert_llama_weights_to_hf.py (3, 3.1, 3.2).
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from hpc.core.errors import VerificationFailed

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = 256
"""Special tokens, after all others: in every LLaMA 3 so many."""
BEGIN, END, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*")


def is_form(path: Path) -> bool:
    """Whether a tokenizer.model is of this form; LLaMA 1's and 2's are SentencePiece's."""
    with open(path, "rb") as file:
        return _LINE.fullmatch(file.readline(4096)) is not None


def special(scaled: bool) -> list[str]:
    """The special tokens in their order: of 3.1 and 3.2 where positions are scaled, else of 3."""
    reserved = "<|reserved_special_token_{}|>".format
    head = ["<|start_header_id|>", "<|end_header_id|>"]
    if scaled:
        named = [BEGIN, END, reserved(0), reserved(1), "<|finetune_right_pad_id|>", reserved(2), *head,
                 "<|eom_id|>", TURN, "<|python_tag|>"]  # fmt: skip
        return [*named, *map(reserved, range(3, SPECIAL - 8))]
    named = [BEGIN, END, *map(reserved, range(4)), *head, reserved(4), TURN]
    return [*named, *map(reserved, range(5, SPECIAL - 5))]


def ends(first: int, *, scaled: bool, instruct: bool) -> int | list[int]:
    """What ends an answer, `first` being the number of the first special token."""
    if not instruct:
        return first + 1
    return [first + 1, first + 8, first + 9] if scaled else [first + 1, first + 9]


def read(path: Path) -> dict[bytes, int]:
    """Token -> rank; VerificationFailed for a file that is damaged."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise VerificationFailed(f"{path} is damaged at line {number}: {error}", hint="fetch it again") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
        raise VerificationFailed(
            f"{path} is not a whole tokenizer: ranks or single bytes are missing", hint="fetch it again"
        )
    return ranks


def tokenizer(ranks: dict[bytes, int], scaled: bool) -> Any:
    """The tokenizer, which puts one <|begin_of_text|> before a text where special tokens are asked for."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = _letters()

    def word(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = sorted((ranks[a], ranks[b], a, b) for a, b in splits if a in ranks and b in ranks)
        merges += [(word(a), word(b)) for _, _, a, b in known]
    vocabulary = {word(token): rank for token, rank in ranks.items()}
    made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special(scaled)])
    begin = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, len(ranks))]
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return made


def _letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it is printed, else one after 255."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printed)
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def write(path: Path, target: Path, vocabulary: int, *, scaled: bool, instruct: bool, longest: int) -> None:
    """Put the tokenizer's files into the target; VerificationFailed where it is another model's."""
    from transformers import PreTrainedTokenizerFast

    ranks = read(path)
    if len(ranks) + SPECIAL != vocabulary:
        raise VerificationFailed(
            f"{path} has {len(ranks)} tokens and {SPECIAL} special ones, and the model {vocabulary}",
            hint="is it another model's?",
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(ranks, scaled),
        bos_token=BEGIN,
        eos_token=TURN if instruct else END,
        model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(target)
