"""The questions of `hpc bench`: sixteen fixed ones, or a file's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc.core.errors import UsageError
from hpc.login.question import Question, Sampling

OWN = (
    "What is a compute node?",
    "Explain to a child why the sky is blue.",
    "Write a haiku about waiting in a queue.",
    "슈퍼컴퓨터에서 작업 스케줄러는 어떤 일을 하나요? 짧게 설명해 주세요.",
    "Name three differences between tensor parallelism and pipeline parallelism.",
    "Summarise in one sentence: A batch system keeps a list of jobs, each with the resources that it asks for and the "
    "time that it may take. It starts a job when what it asks for is free and nobody with a better claim waits for it.",
    "Give me a recipe for pancakes for four people, as a list.",
    "What is 17 times 23? Think step by step.",
    "Translate into German: The model answers faster than a person reads.",
    "Write a Python function that returns the median of a list, without imports.",
    "I have a table with the columns user, job, start and end. Write an SQL query that gives, for each user, the "
    "number of jobs and the hours that they ran in March, the most hours first, without those with fewer than ten.",
    "Why do large language models need a KV cache?",
    "양자화(quantization)가 모델의 품질에 미치는 영향을 두 문장으로 설명해 주세요.",
    "Draft a polite e-mail to the administrators of a cluster: my job waits for two days, I do not know why, and the "
    "deadline of the paper is on Friday. Ask what I can change.",
    "List the planets of the solar system in order, with one remarkable fact about each.",
    "Tell the story of a lighthouse keeper who finds a message in a bottle, in about a hundred words.",
)


def questions(name: str | None, sampling: Sampling, *, raw: bool) -> list[Question]:
    """All of them, ready to be asked. UsageError where the file has none, or something else."""
    found = [_said(text) for text in OWN] if name is None else _read(Path(name))
    if raw:
        return [Question(text="\n".join(m["content"] for m in messages), sampling=sampling) for messages in found]
    return [Question(messages=messages, sampling=sampling) for messages in found]


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _read(path: Path) -> list[list[dict[str, str]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}", hint="name a file of questions") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text", hint="one question a line, or JSON lines") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        messages = _json(line) if line.lstrip()[:1] in ("{", '"') else _said(line.strip())
        if messages is None:
            raise UsageError(
                f"{path}, line {number}: no question", hint='{"prompt": "…"}, {"text": "…"} or {"messages": [{"role": …'
            )
        found.append(messages)
    if not found:
        raise UsageError(f"{path} has no questions", hint="one question a line, or JSON lines")
    return found


def _json(line: str) -> list[dict[str, str]] | None:
    """The messages of a line of JSON; None where it has none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if isinstance(row, str):
        return _said(row) if row.strip() else None
    if not isinstance(row, Mapping):
        return None
    if isinstance(row.get("messages"), list):
        return _asked(row["messages"])
    text = next((row[key] for key in ("prompt", "text", "question", "instruction") if row.get(key)), None)
    return _said(text) if isinstance(text, str) else None


def _asked(messages: list[Any]) -> list[dict[str, str]] | None:
    """Up to the last question: an answer that is known already is left out."""
    if not all(isinstance(m, Mapping) and isinstance(m.get("content"), str) and m.get("role") for m in messages):
        return None
    found = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
    while found and found[-1]["role"] == "assistant":
        found.pop()
    return found or None
