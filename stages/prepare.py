"""
prepare: raw records -> chat messages in the wanted languages, split into training and held-out rows.

The output is a folder with train.jsonl, eval.jsonl (one {"messages": […]} a line) and report.json. The
same data and config give the same bytes. Whatever is dropped is counted by its reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hpc.core.errors import UsageError, did_you_mean
from hpc.core.rundir import write_json, write_text
from hpc.core.stage import Artifact, Context, Resources, Stage
from hpc.inside import records

Conversation = list[records.Message]

_CHECKED_BYTES = 64 << 20
"""So much of each file is read on the login node before anything is queued."""
_LANGUAGES = """
    af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa
    pl pt ro ru sk sl so sq sv sw ta te th tl tr uk ur vi zh-cn zh-tw
"""
"""What langdetect knows."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to read and what to keep."""

    data: tuple[str, ...] = ()
    """Files of records (JSON Lines or a JSON array), read in this order."""
    format: records.Format = "auto"
    """Form of the records; auto: seen from each file's first record."""
    max_samples: int | None = None
    """Only the first so many records of all files together; None: all."""
    languages: tuple[str, ...] = ()
    """Keep conversations in these languages (ISO 639-1 codes such as en); empty: keep all, detect nothing."""
    seed: int = 0
    """Seed of the language detection and of the choice of held-out rows."""
    system: str | None = None
    """System message for conversations that have none; None: leave them without."""
    eval_rows: int = 0
    """Conversations held out of training, to measure the loss on."""
    tokenizer: str | None = None
    """A model (folder, GGUF file or hub name) to count tokens with; None: don't."""


def files(config: PrepareConfig) -> tuple[str, ...]:
    """The data, and the tokenizer where it is a local path."""
    local = config.tokenizer is not None and Path(config.tokenizer).exists()
    return (*config.data, str(config.tokenizer)) if local else config.data


def resources(config: PrepareConfig) -> Resources:
    """No GPU: language detection is one thread."""
    return Resources(cpus_per_task=2, mem_gb=8, time_min=60)


def outputs(config: PrepareConfig) -> dict[str, Artifact]:
    return {"dataset": Artifact(kind="dataset", path="dataset")}


def check(config: PrepareConfig) -> None:
    """UsageError where the config or the first part of the data can't work. Standard library, seconds."""
    if not config.data:
        raise UsageError("prepare.data names no file", hint='for example: data = ["data/train.jsonl"]')
    for language in config.languages:
        if language not in _LANGUAGES.split():
            raise UsageError(
                f"prepare.languages: '{language}' is not known",
                hint=did_you_mean(language, _LANGUAGES.split()),
            )
    if config.eval_rows < 0 or (config.max_samples is not None and config.max_samples < 1):
        raise UsageError("prepare.eval_rows must be 0 or more, and max_samples 1 or more")
    if not sum(bool(row.messages) for row in _read(config, limit=_CHECKED_BYTES)):  # reads on after the first good one
        raise UsageError(
            f"no record of {', '.join(config.data)} holds a question with an answer",
            hint="see prepare.format",
        )


def run(config: PrepareConfig, ctx: Context) -> None:
    """Read, filter, split, write. UsageError where a record can't be read or nothing is left."""
    rows = list(_read(config))
    dropped: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    kept = _distinct(_in_languages(_answered(rows, dropped), config, ctx, languages, dropped), dropped)
    if len(kept) <= config.eval_rows:
        raise UsageError(
            f"{len(kept)} of {len(rows)} records are left, too few to train on and hold {config.eval_rows} out"
            f" (dropped: {_words(dropped) or 'none'})",
            hint="check prepare.languages, max_samples and eval_rows",
        )
    train, held_out = _split(kept, config)
    report: dict[str, Any] = {
        "schema": "hpc.dataset/1",
        "files": [Path(name).name for name in config.data],
        "read": len(rows),
        "train": len(train),
        "eval": len(held_out),
        "dropped": dict(sorted(dropped.items())),
        "languages": dict(sorted(languages.items())),
        "unanswered_turns_cut": sum(row.unanswered for row in rows if row.messages),
    }
    if config.tokenizer is not None:
        report["tokens"] = _lengths([*train, *held_out], config.tokenizer, ctx)
    _write(ctx.outputs["dataset"], train, held_out, report)
    ctx.metric(**{name: value for name, value in report.items() if name not in ("schema", "files")})
    ctx.progress(1, 1, f"{len(train)} rows to train on, {len(held_out)} held out")


def _read(config: PrepareConfig, limit: int | None = None) -> Iterator[records.Row]:
    """The first max_samples records of all files; an empty file is a UsageError."""
    return islice(_all(config, limit), config.max_samples)


def _all(config: PrepareConfig, limit: int | None) -> Iterator[records.Row]:
    for name in config.data:
        row = None
        for row in records.read(Path(name), config.format, limit):
            yield row
        if row is None:
            raise UsageError(f"{name} holds no record", hint="check the path, and that the download was complete")


def _answered(rows: Sequence[records.Row], dropped: Counter[str]) -> list[Conversation]:
    """The conversations of the rows that have an answer."""
    dropped.update(row.dropped for row in rows if not row.messages)
    return [list(row.messages) for row in rows if row.messages]


def _in_languages(
    conversations: list[Conversation],
    config: PrepareConfig,
    ctx: Context,
    languages: Counter[str],
    dropped: Counter[str],
) -> Iterator[Conversation]:
    """Those in one of the wanted languages, judged by what is said and not by the names of roles and keys."""
    if not config.languages:
        yield from conversations
        return
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = config.seed  # unseeded, the same short text is now one language, now another
    for done, messages in enumerate(conversations, 1):
        ctx.progress(done, len(conversations) + 1, "detecting languages")
        try:
            language = str(detect("\n".join(m["content"] for m in messages if m["role"] != "system")))
        except LangDetectException:
            dropped["no text to detect"] += 1
            continue
        languages[language] += 1
        if language in config.languages:
            yield messages
        else:
            dropped[f"language {language}"] += 1


def _distinct(conversations: Iterator[Conversation], dropped: Counter[str]) -> list[Conversation]:
    """Each conversation once: a repeated one could be held out and trained on at the same time."""
    kept: dict[str, Conversation] = {}
    for messages in conversations:
        text = json.dumps(messages, sort_keys=True)
        if text in kept:
            dropped["duplicate"] += 1
        else:
            kept[text] = messages
    return list(kept.values())


def _split(conversations: list[Conversation], config: PrepareConfig) -> tuple[list[Conversation], list[Conversation]]:
    """(to train on, held out), both in the data's order. A row's own hash decides: added rows move few."""
    import hashlib

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{config.seed} {json.dumps(conversations[index])}".encode()).digest()

    chosen = set(sorted(range(len(conversations)), key=rank)[: config.eval_rows])
    if config.system is not None:
        system = {"role": "system", "content": config.system}
        conversations = [m if m[0]["role"] == "system" else [system, *m] for m in conversations]
    train = [m for i, m in enumerate(conversations) if i not in chosen]
    return train, [m for i, m in enumerate(conversations) if i in chosen]


def _lengths(conversations: list[Conversation], model: str, ctx: Context) -> dict[str, int]:
    """Tokens of the conversations through the model's chat template: median, 90th percentile, longest."""
    from hpc.inside import models

    models.settle()
    tokenizer = models.tokenizer(models.local(model, ctx.cache))
    counts = []
    for done, messages in enumerate(conversations, 1):
        ctx.progress(done, len(conversations) + 1, "counting tokens")
        counts.append(len(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]))
    counts.sort()
    return {"median": counts[len(counts) // 2], "p90": counts[len(counts) * 9 // 10], "longest": counts[-1]}


def _write(
    folder: Path,
    train: list[Conversation],
    held_out: list[Conversation],
    report: dict[str, Any],
) -> None:
    folder.mkdir(exist_ok=True)
    for name, rows in (("train.jsonl", train), ("eval.jsonl", held_out)):
        lines = (json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in rows)
        write_text(folder / name, "".join(lines))
    write_json(folder / "report.json", report)


def _words(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.most_common(5))


STAGE = Stage(
    name="prepare",
    summary="Read chat data, keep the wanted languages, hold rows out for evaluation",
    config=PrepareConfig,
    container="train",
    consumes={},
    outputs=outputs,
    resources=resources,
    run=run,
    files=files,
    check=check,
)
