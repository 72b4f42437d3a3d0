"""A data set's conversations as tokens and labels, for training and for measuring the held-out loss alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.core.errors import HpcError, UsageError
from hpc.inside import families, sources
from hpc.inside.records import as_text

IGNORED = -100
"""The label that torch's cross entropy leaves out of the loss."""

Row = dict[str, list[int]]
Message = dict[str, str]


def read(dataset: Path, part: str) -> Iterator[list[Message]]:
    """The conversations of train.jsonl or eval.jsonl; UsageError where there is no such file, or no good line."""
    path = dataset / f"{part}.jsonl"
    if not path.is_file():
        raise UsageError(f"there is no {path}", hint="give the data set that prepare makes")
    for piece in sources.pieces(path):
        for number, value in sources.values(piece):
            yield _conversation(value, f"{piece.name} line {number}")


def _conversation(value: Any, where: str) -> list[Message]:
    """The messages of a line, each with a text as content."""
    said = value.get("messages") if isinstance(value, dict) else None
    turns = said if isinstance(said, list) and all(isinstance(turn, dict) for turn in said) else []
    roles = [turn.get("role") for turn in turns]
    if not turns or roles[0] == "assistant" or not all(isinstance(role, str) for role in roles):
        raise UsageError(
            f"{where}: no conversation in it",
            hint='a line is {"messages": [{"role": …, "content": …}, …]}, a question first: prepare makes such lines',
        )
    return [{**turn, "content": _content(turn, where)} for turn in turns]


def _content(turn: Mapping[str, Any], where: str) -> str:
    """What a turn says; a call of a tool says nothing, and null stands for that."""
    content = "" if turn.get("tool_calls") and turn.get("content") is None else turn.get("content")
    return as_text(content, f"{where}: 'content'")


def rows(
    conversations: Iterator[list[Message]], tokenizer: Any, max_length: int, *, completion_only: bool
) -> tuple[list[Row], dict[str, Any]]:
    """
    The conversations cut to `max_length`, and how many: kept, cut, without any answer within that length, and those of
    which the template loses something.
    """
    lost: Counter[str] = Counter()
    whole = [encode(messages, tokenizer, lost, completion_only=completion_only) for messages in conversations]
    cut = [{name: ids[:max_length] for name, ids in row.items()} for row in whole]
    kept = [row for row in cut if any(label != IGNORED for label in row["labels"][1:])]
    too_long = sum(len(row["input_ids"]) > max_length for row in whole)
    counts = {"rows": len(kept), "cut": too_long, "without_answer": len(cut) - len(kept)}
    return kept, {**counts, "template_loses": dict(lost)}


def told(lost: Mapping[str, int], stage: str) -> list[str]:
    """A sentence for each thing that the template loses."""
    words = {"system": "the system message", "reasoning": "the reasoning", "answer": "an answer"}
    return [
        f"the chat template loses {words[what]} of {count} rows: set {stage}.chat_template to one that keeps it"
        for what, count in sorted(lost.items())
    ]


def encode(
    messages: list[Message], tokenizer: Any, lost: Counter[str] | None = None, *, completion_only: bool = True
) -> Row:
    """
    A conversation's tokens in the chat template, and labels: the same, or those of the answers alone.

    What the template loses of it is counted in `lost`: the system message, reasoning, an answer.
    """
    from jinja2 import TemplateError

    def tokens(talk: list[Message], **options: bool) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(talk, return_dict=True, **options)["input_ids"]
        return ids

    def behind(turn: int, **options: bool) -> int:
        """Where in the whole a turn ends, with what the template writes after it where it is the last one."""
        until = messages[: turn + 1]
        alone = tokens(until, **options)
        shared = _shared(alone, ids)
        if shared == len(alone):
            return shared
        # Written otherwise where more follows, as Qwen 3's answers are: the turn's last letter shows where it is.
        here = _end(ids, tokens(_changed(messages, turn)))
        there = _end(alone, tokens(_changed(until, turn), **options))
        return here + _shared(alone[there:], ids[here:])

    try:
        missing, ids = False, tokens(messages)
        labels = [IGNORED] * len(ids) if completion_only else list(ids)
        for turn, message in enumerate(messages):
            if completion_only and message["role"] == "assistant":
                start, end = behind(turn - 1, add_generation_prompt=True), behind(turn)
                labels[start:end] = ids[start:end]
                missing |= start >= end
        if lost is not None:
            written = tokenizer.apply_chat_template(messages, tokenize=False)
            said = (m["content"].rpartition("</think>")[2].strip() for m in messages if m["role"] == "assistant")
            missing |= any(answer not in written for answer in said)
            lost.update([*families.lost(messages, written), *["answer"] * missing])
    except TemplateError as error:
        raise HpcError(
            f"the model's chat template refuses a conversation: {error}",
            hint="does it allow a system message?",
        ) from error
    return {"input_ids": ids, "labels": labels}


def behind(messages: list[Message], tokenizer: Any) -> list[int]:
    """The tokens that the template writes behind the last message's text."""
    ids, other = (
        tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
        for talk in (messages, _changed(messages, len(messages) - 1))
    )
    return list(ids[_end(ids, other) :])


def _changed(messages: list[Message], turn: int) -> list[Message]:
    """The conversation with another letter at the end of one turn."""
    text = messages[turn]["content"]
    other = {**messages[turn], "content": text + ("b" if text.rstrip().endswith("a") else "a")}
    return [*messages[:turn], other, *messages[turn + 1 :]]


def _end(ids: Sequence[int], others: Sequence[int]) -> int:
    """Where the last difference of two lists ends in the first; 0: there is none."""
    return len(ids) - _shared(ids[::-1], others[::-1])


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
