"""Preference pairs: every form gives the same pair, and what is broken is named."""

from __future__ import annotations

from typing import Any

import pytest

from hpc.core.errors import UsageError
from hpc.inside.preferences import pair

ASKED = {"role": "user", "content": "Why?"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        {"instruction": "Why?", "input": "", "chosen": " So. ", "rejected": "No."},
        {"prompt": [ASKED], "chosen": [said("So.")], "rejected": [said("No.")]},
        {"prompt": "Why?", "chosen": [ASKED, said("So.")], "rejected": [ASKED, said("No.")]},
        {"chosen": [ASKED, said("So.")], "rejected": [ASKED, said("No.")]},
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": {"from": "gpt", "value": "So."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        {
            "conversations": [{"from": "prompter", "value": "Why?"}],
            "chosen": {"from": "chatgpt", "value": "So."},
            "rejected": {"role": "chatgpt", "content": "No."},
        },
    ],
)
def test_every_form_is_the_same_pair(value: dict[str, Any]) -> None:
    found = pair(value, "a line 1")
    assert (found.prompt, found.chosen, found.rejected, found.dropped) == ((ASKED,), "So.", "No.", "")


def test_a_system_turn_and_earlier_turns_belong_to_the_prompt() -> None:
    found = pair({"system": "Be kind", "prompt": [ASKED, said("So."), ASKED], "chosen": "a", "rejected": "b"}, "x")
    assert [message["role"] for message in found.prompt] == ["system", "user", "assistant", "user"]


def test_an_indent_and_the_history_are_kept() -> None:
    value = {"system": "S", "instruction": "Q", "history": [["a", "b"]], "chosen": "    x\n", "rejected": [said("x")]}
    found = pair(value, "x")
    assert [message["content"] for message in found.prompt] == ["S", "a", "b", "Q"]
    assert (found.chosen, found.rejected) == ("    x", "x")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"prompt": "Why?", "chosen": "So.", "rejected": "So. "}, "equal answers"),
        ({"prompt": "Why?", "chosen": "So.", "rejected": ""}, "empty answer"),
        ({"prompt": "", "chosen": "So.", "rejected": "No."}, "no question"),
        ({"prompt": [ASKED, said("x")], "chosen": "So.", "rejected": "No."}, "no question"),
    ],
)
def test_what_teaches_nothing_is_left_out_by_name(value: dict[str, Any], reason: str) -> None:
    assert pair(value, "a line 1").dropped == reason


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "a line 1: no preference in it"),
        ({"prompt": "Why?", "chosen": "So."}, "a line 1: no preference in it"),
        ({"prompt": "Why?", "chosen": [ASKED], "rejected": "x"}, "'chosen' does not end with the assistant's turn"),
        ({"prompt": "W?", "chosen": [ASKED, said("a")], "rejected": "x"}, "'chosen' answers another conversation"),
        ({"prompt": "Why?", "chosen": b"x", "rejected": "x"}, "'chosen': \"b'x'\" is no message"),
        ({"prompt": "Why?", "chosen": "x\ud800", "rejected": "x"}, "'chosen' holds half of a"),
        ({"prompt": "Why?", "chosen": [said("\ud800")], "rejected": "x"}, "'chosen' holds half of a"),
        ({"instruction": ["Why?"], "chosen": "x", "rejected": "y"}, "'instruction' must be a text"),
        ({"prompt": "Why?", "chosen": 3, "rejected": "x"}, "'chosen': 3 is no message"),
        ({"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"}, "'prompt': "),
    ],
)
def test_what_is_no_pair_is_said_with_its_place(value: Any, message: str) -> None:
    with pytest.raises(UsageError) as failed:
        pair(value, "a line 1")
    assert message in failed.value.message
