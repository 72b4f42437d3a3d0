"""Which tokens of a conversation are learnt, under many chat templates, and that what one loses is counted."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from hpc.core.errors import HpcError, UsageError
from tests.support import tiny

pytestmark = pytest.mark.train

LAST = (  # as Qwen 3's: only the last answer has a place for reasoning
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talk(*turns: str, system: str = "") -> list[dict[str, str]]:
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return [*([{"role": "system", "content": system}] if system else []), *said]


TWO = talk("Q?", "One.", "R?", "Two.")
ROWS = [
    talk("Q?", "One."),
    TWO,
    talk("Yes", "Yes", "Yes", "Yes", "Yes", "Yes"),
    talk("Q?", "One.", "R?", "Two.", system="Be brief."),
    talk("Q?", "<think>\nhm\n</think>\n\nOne.", "R?", "<think>\nho\n</think>\n\nTwo."),
    talk("a", "```\nx = 1\n```", "aa", "aaa\n\n\naaa"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from hpc.inside import models

    return models.tokenizer(tiny.model(tmp_path_factory.mktemp("tiny")))


def spans(row: dict[str, list[int]], tokenizer: Any) -> list[str]:
    """What is learnt, each run of tokens as its text."""
    found: list[list[int]] = []
    for before, label in zip([-100, *row["labels"]], row["labels"], strict=False):
        if label != -100:
            found += [[]] if before == -100 else []
            found[-1].append(label)
    return [tokenizer.decode(ids) for ids in found]


GOOD = json.dumps({"messages": talk("Q?", "One.")}) + "\n"


def test_a_folder_of_ones_own_may_have_blank_lines_a_byte_order_mark_and_texts_in_parts(tmp_path: Path) -> None:
    from hpc.inside import conversations

    parts = GOOD.replace('"One."', '[{"type": "text", "text": "On"}, {"type": "text", "text": "e."}]')
    (tmp_path / "train.jsonl").write_text("\ufeff" + GOOD + "\n" + parts + "\n\n", encoding="utf-8")
    assert list(conversations.read(tmp_path, "train")) == [talk("Q?", "One.")] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (GOOD[:20], "not valid JSON"),
        ('{"text": "x"}', "no conversation in it"),
        ('{"messages": []}', "no conversation in it"),
        ('{"messages": [{"content": "x"}]}', "no conversation in it"),
        (json.dumps({"messages": talk("Q?", "One.")[1:]}), "no conversation in it"),
        (GOOD.replace('"One."', "null"), "'content' must be a text, not null"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    from hpc.inside import conversations

    (tmp_path / "eval.jsonl").write_text(GOOD + line)
    with pytest.raises(UsageError, match=f"eval.jsonl line 2: {message}"):
        list(conversations.read(tmp_path, "eval"))


@pytest.mark.generations
def test_earlier_answers_are_learnt_where_only_the_last_is_written_with_reasoning(tokenizer: Any) -> None:
    from hpc.inside import conversations

    tokenizer.chat_template = LAST
    (row,), counts = conversations.rows(iter([TWO]), tokenizer, 999, completion_only=True)
    assert spans(row, tokenizer) == ["One.<|im_end|>\n", "<think>\n\n</think>\n\nTwo.<|im_end|>\n"]
    assert counts == {"rows": 1, "cut": 0, "without_answer": 0, "template_loses": {}}


@pytest.mark.generations
def test_what_a_template_loses_is_counted_and_told(tokenizer: Any) -> None:
    from hpc.inside import conversations

    tokenizer.chat_template = LAST.replace("<|im_start|>{{", "{% if m.role == 'system' %}{% continue %}{% endif %}{{")
    _, counts = conversations.rows(iter([*ROWS]), tokenizer, 999, completion_only=True)
    assert counts["template_loses"] == {"system": 1, "reasoning": 1}
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }} {% endif %}{% endfor %}"
    )
    _, counts = conversations.rows(iter([TWO]), tokenizer, 999, completion_only=True)
    assert counts["template_loses"] == {"answer": 1}
    assert conversations.told(counts["template_loses"], "finetune") == [
        "the chat template loses an answer of 1 rows: set finetune.chat_template to one that keeps it"
    ]


def plainly(messages: list[dict[str, str]], tokenizer: Any) -> dict[str, list[int]]:
    """The row where every beginning of the conversation is written as the beginning of the whole."""
    from hpc.inside.conversations import _shared

    def tokens(until: int, **options: bool) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(messages[:until], return_dict=True, **options)["input_ids"]
        return ids

    ids = tokens(len(messages))
    labels = [-100] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = _shared(tokens(turn, add_generation_prompt=True), ids), _shared(tokens(turn + 1), ids)
            labels[start:end] = ids[start:end]
    return {"input_ids": ids, "labels": labels}


def test_every_answer_is_found_in_every_template_of_trl(tokenizer: Any) -> None:
    from hpc.inside import conversations

    whole = mended = 0
    for path in Path(str(resources.files("trl") / "chat_templates")).glob("*.jinja"):
        tokenizer.chat_template = path.read_text()
        for messages in ROWS:
            answers = [m["content"].rpartition("</think>")[2].strip() for m in messages if m["role"] == "assistant"]

            def right(row: dict[str, list[int]], answers: list[str] = answers) -> bool:
                found = spans(row, tokenizer)
                return len(found) == len(answers) and all(a in text for a, text in zip(answers, found, strict=True))

            lost: Counter[str] = Counter()
            try:
                row = conversations.encode(messages, tokenizer, lost)
            except HpcError:  # no system message, or pictures alone
                continue
            assert right(row) or lost["answer"], path.name
            before = plainly(messages, tokenizer)
            assert row == before or not right(before), path.name
            whole += row == before and right(before)
            mended += right(row) and row != before
    assert (whole > 200, mended > 20) == (True, True), "most never needed it, Qwen 3's did"
