"""A data set's conversations as tokens and labels, for training and for measuring the held-out loss alike."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpc.core.errors import HpcError, UsageError

IGNORED = -100
"""The label that torch's cross entropy leaves out of the loss."""

Row = dict[str, list[int]]
Message = dict[str, str]


def read(dataset: Path, part: str) -> Iterator[list[Message]]:
    """The conversations of train.jsonl or eval.jsonl; UsageError where there is no such file."""
    path = dataset / f"{part}.jsonl"
    try:
        with open(path, encoding="utf-8") as file:  # not splitlines(), which also splits at U+2028 within a text
            yield from (json.loads(line)["messages"] for line in file)
    except OSError as error:
        raise UsageError(f"there is no {path}", hint="give the data set that prepare makes") from error


def rows(
    conversations: Iterator[list[Message]], tokenizer: Any, max_length: int, *, completion_only: bool
) -> tuple[list[Row], dict[str, int]]:
    """The conversations cut to `max_length`, and how many: kept, cut, without any answer within that length."""
    whole = [encode(messages, tokenizer, completion_only=completion_only) for messages in conversations]
    cut = [{name: ids[:max_length] for name, ids in row.items()} for row in whole]
    kept = [row for row in cut if any(label != IGNORED for label in row["labels"][1:])]
    too_long = sum(len(row["input_ids"]) > max_length for row in whole)
    return kept, {"rows": len(kept), "cut": too_long, "without_answer": len(cut) - len(kept)}


def encode(messages: list[Message], tokenizer: Any, *, completion_only: bool = True) -> Row:
    """A conversation's tokens in the chat template, and labels: the same, or those of the answers alone."""
    from jinja2 import TemplateError

    def tokens(until: int, **options: bool) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(messages[:until], return_dict=True, **options)["input_ids"]
        return ids

    try:
        ids = tokens(len(messages))
        labels = [IGNORED] * len(ids) if completion_only else list(ids)
        for turn, message in enumerate(messages):
            if completion_only and message["role"] == "assistant":
                start = _shared(tokens(turn, add_generation_prompt=True), ids)
                end = _shared(tokens(turn + 1), ids)
                labels[start:end] = ids[start:end]
    except TemplateError as error:
        raise HpcError(
            f"the model's chat template refuses a conversation: {error}",
            hint="does it allow a system message?",
        ) from error
    return {"input_ids": ids, "labels": labels}


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two lists have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Padded:
    """Rows -> one batch, as long as its longest row. It counts the tokens that are no padding."""

    def __init__(self, pad: int) -> None:
        self.pad = pad
        self.tokens = 0

    def __call__(self, batch: Sequence[Row]) -> dict[str, Any]:
        import torch

        longest = max(len(row["input_ids"]) for row in batch)
        self.tokens += sum(len(row["input_ids"]) for row in batch)

        def filled(name: str, filler: int) -> Any:
            return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in batch])

        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
        return {
            "input_ids": filled("input_ids", self.pad),
            "labels": filled("labels", IGNORED),
            "attention_mask": torch.tensor(mask),
        }
