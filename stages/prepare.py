"""
prepare: raw records -> chat messages in the wanted languages, split into training and held-out rows.

The output is a folder with train.jsonl, eval.jsonl (one {"messages": […]} a line), report.json, and dropped.jsonl,
which names every record that was left out, and why. The same data and config give the same bytes on any number of
cores, in memory that does not grow with the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from hpc.core.errors import UsageError, did_you_mean
from hpc.core.stage import Around, Artifact, Context, Input, Resources, Stage
from hpc.inside import families, given, languages, records
from hpc.inside.languages import Detector

_CHECKED_BYTES = 64 << 20
"""So much of each file is read on the login node before anything is queued."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to read and what to keep."""

    data: tuple[str, ...] = ()
    """Files of records, or folders of them, read in this order: JSON Lines, a JSON array, Parquet or Arrow;
    "fetch:PATTERN": files that the stage fetch got. Empty: all that it got."""
    format: records.Format = "auto"
    """Form of the records; auto: seen from each file's first record."""
    max_samples: int | None = None
    """Only the first so many records of all data files together; None: all."""
    languages: tuple[str, ...] = ()
    """Keep conversations in these languages (ISO 639-1 codes such as en); empty: keep all, detect nothing."""
    detector: Detector = "fast"
    """What detects them: fast (a small fastText model), or langdetect, which is a hundred times slower."""
    seed: int = 0
    """Seed of langdetect and of every choice of rows."""
    system: str | None = None
    """System message for conversations that have none; None: leave them without."""
    eval_rows: int = 0
    """Conversations held out of training, to measure the loss on."""
    eval_data: tuple[str, ...] = ()
    """Files of records that are all held out; what data repeats of them is dropped there."""
    train_rows: int | None = None
    """So many of the rows that are left, chosen by the seed; None: all."""
    weights: tuple[float, ...] = ()
    """Weight of each entry of data in the mixture; empty: all rows of all."""
    replay: tuple[str, ...] = ()
    """Files of earlier training, of which a share is mixed in, so that it isn't forgotten."""
    replay_share: float = 0.1
    """Share of the rows of replay in all rows to train on, where there are enough of them."""
    min_chars: int = 0
    """Drop conversations with fewer characters."""
    max_chars: int | None = None
    """Drop conversations with more characters; None: keep long ones."""
    repetition: float | None = None
    """Drop conversations in which a larger share of 4-grams of words was there before, 0 to 1; None: keep them."""
    near_duplicates: float | None = 0.9
    """Drop a conversation that shares this part of its 3-grams of words with an earlier one, 0.5 or more; None:
    exact repeats."""
    contamination: Literal["report", "drop", "refuse"] = "report"
    """What to do with rows to train on that share text with held-out rows."""
    contamination_words: int = 13
    """So many words in a row are shared text."""
    thinking: families.Thinking = "keep"
    """The reasoning of answers, <think>…</think>: keep it, strip it, or require it (and drop rows without)."""
    template: families.Family = "own"
    """Chat template to check rows with and to put beside them; own: the tokenizer's."""
    system_turns: families.SystemTurns = "keep"
    """System messages: keep them, fold them into the first question (for models without that role), or drop them."""
    tokenizer: str | None = None
    """A model (folder, GGUF file or hub name) to count tokens with; None: the one that fetch gets, else don't."""
    token_limit: int | None = None
    """Tokens that training will keep of a conversation: the report says what is cut off."""


def files(config: PrepareConfig) -> tuple[str, ...]:
    """The data that is there already."""
    return tuple(n for n in (*config.data, *config.eval_data, *config.replay) if not n.startswith(given.FETCHED))


def resources(config: PrepareConfig) -> Resources:
    """No GPU. Every core is used."""
    return Resources(cpus_per_task=8, mem_gb=16, time_min=60)


def size(config: PrepareConfig, around: Around) -> tuple[Resources, tuple[str, ...]]:
    """`resources`; UsageError where no data is named and none is fetched."""
    named = (*config.data, *config.eval_data, *config.replay)
    fetched = not config.data or any(name.startswith(given.FETCHED) for name in named)
    if fetched and "records" not in around.inputs:
        raise UsageError("prepare.data names no file, and nothing is fetched before it", hint=given.NO_DATA)
    return resources(config), ()


def outputs(config: PrepareConfig) -> dict[str, Artifact]:
    return {"dataset": Artifact(kind="dataset", path="dataset")}


def check(config: PrepareConfig) -> None:
    """UsageError where the config or the first part of the data can't work. Standard library, seconds."""
    from hpc.inside import duplicates

    _check_languages(config)
    for name in ("eval_rows", "min_chars"):
        if getattr(config, name) < 0:
            raise UsageError(f"prepare.{name} must be 0 or more")
    for name in ("max_samples", "train_rows", "max_chars", "token_limit", "contamination_words"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UsageError(f"prepare.{name} must be 1 or more")
    for name in ("near_duplicates", "repetition", "replay_share"):
        if getattr(config, name) is not None and not 0 < getattr(config, name) < 1:
            raise UsageError(f"prepare.{name} must lie between 0 and 1")
    if config.near_duplicates is not None and config.near_duplicates < duplicates.LEAST:
        raise UsageError(
            f"prepare.near_duplicates must be {duplicates.LEAST} or more: MinHash does not find what is less alike",
            hint="0.9 is usual; 0.7 is already a loose one",
        )
    if config.weights and (len(config.weights) != len(config.data) or min(config.weights) <= 0):
        raise UsageError(
            f"prepare.weights has {len(config.weights)} values for {len(config.data)} entries of data",
            hint="give a weight above 0 for each",
        )
    if not config.data and config.weights:
        raise UsageError("prepare.weights needs the entries of data that it weighs")
    for name in files(config):
        for path in given.files(name, None):
            _look(path, config)


def _check_languages(config: PrepareConfig) -> None:
    known = {*languages.KNOWN, *languages.CHINESE} - ({"zh"} if config.detector == "langdetect" else set())
    for language in config.languages:
        if language not in known:
            raise UsageError(
                f"prepare.languages: '{language}' is not known", hint=did_you_mean(language, sorted(known))
            )
        if language in languages.CHINESE and config.detector == "fast":
            raise UsageError(
                f"prepare.languages: the fast detector does not tell {language} from the other Chinese",
                hint='write zh, or set prepare.detector = "langdetect"',
            )


def _look(path: Path, config: PrepareConfig) -> None:
    """UsageError where the first part of a file can't be read, or holds no conversation."""
    from hpc.inside import sources

    if sources.columnar(path):
        sources.looks_whole(path)
        return
    row = None
    good = 0
    for row in islice(records.read(path, config.format, _CHECKED_BYTES), config.max_samples):  # on after a good one
        good += bool(row.messages)
    if row is None:
        raise UsageError(f"{path} holds no record", hint="check the path, and that the download was complete")
    if not good:
        raise UsageError(f"no record of {path} holds a question with an answer", hint="see prepare.format")


def run(config: PrepareConfig, ctx: Context) -> None:
    """Read, filter, split, write; nothing where the scheduler asked to stop. UsageError where nothing is left."""
    from hpc.inside import preparing

    with preparing.work(config, ctx) as work:
        work.read()
        work.drop_repeats()
        work.hold_out()
        work.compare_with_held_out()
        work.mix()
        work.write()
        work.report()


STAGE = Stage(
    name="prepare",
    summary="Read chat data, keep what is good, hold rows out for evaluation",
    config=PrepareConfig,
    container="train",
    consumes={
        "records": Input(kind="records", optional=True),
        "tokenizer": Input(kind="hf_model", optional=True),
    },
    outputs=outputs,
    resources=resources,
    size=size,
    run=run,
    files=files,
    check=check,
)
