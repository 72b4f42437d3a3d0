"""`hpc chat`: a conversation with a served model, on a terminal, or line by line where stdin is something else."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from hpc.core import rundir
from hpc.core.errors import HpcError, NotReady, UsageError, did_you_mean
from hpc.login import answers, typing_in
from hpc.login.conversation import Conversation, Turn
from hpc.login.doorway import Doorway
from hpc.login.printing import Answer, Screen
from hpc.login.question import Question, Sampling, TooLong, plain

_COMMANDS = {
    "/reset": "forget all that was said",
    "/system": "/system TEXT: what the model is told before all else; without TEXT: nothing",
    "/think": "what the model thought before its last answer",
    "/save": "/save FILE: write the conversation; .json for programs",
    "/help": "these commands",
    "/quit": "leave; so does Ctrl-D",
}


class _Quit(Exception):
    """/quit."""


class Chat:
    """`find` gives the door, again after it was lost."""

    def __init__(self, find: Callable[[], Doorway], sampling: Sampling, system: str, *, thoughts: bool) -> None:
        self._find, self._sampling, self._thoughts = find, sampling, thoughts
        self._door: Doorway | None = find()
        self.what = self._door.what
        self._talk = Conversation(system)

    def on_terminal(self) -> int:
        """Until /quit or Ctrl-D; Ctrl-C stops an answer, and never ends it."""
        lines = typing_in.Lines(sys.stdin)
        _note(f"{self.what}: type a question; /help shows the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        while True:
            try:
                text = lines.read("> ")
            except KeyboardInterrupt:
                _note("\n(Ctrl-D or /quit leaves)")
                continue
            if text is None:
                print()
                return 0
            try:
                self._do(text, sys.stdout)
            except _Quit:
                return 0
            except HpcError as error:
                _note(f"error: {error.message}\n  try: {error.hint}")
            except KeyboardInterrupt:  # before the answer began, or after it
                _note("")

    def by_lines(self, lines: IO[str], out: IO[str] | None) -> int:
        """Each line a question or a command; 1, or the last error's code, where one of them failed."""
        code = 0
        for line in lines:
            try:
                self._do(line.rstrip("\n"), out)
            except _Quit:
                break
            except HpcError as error:
                code = error.exit_code
                _note(f"error: {error.message}\n  try: {error.hint}")
                if isinstance(error, NotReady):
                    break
        return code

    def document(self) -> dict[str, Any]:
        return {"what": self.what, **self._talk.document()}

    def _do(self, text: str, out: IO[str] | None) -> None:
        if not text.strip():
            return
        word, _, rest = text.strip().partition(" ")
        if word.startswith("/") and "\n" not in text and word[1:].isalpha():
            self._command(word, rest.strip())
        else:
            self._ask(text, out)

    def _command(self, word: str, rest: str) -> None:
        if word == "/quit":
            raise _Quit
        if word == "/reset":
            self._talk = Conversation(self._talk.system)
            _note("(forgotten)")
        elif word == "/system":
            self._talk.system = rest
            _note("(from now on)" if rest else "(no system message from now on)")
        elif word == "/think":
            thought = self._talk.turns[-1].thought if self._talk.turns else ""
            _note(plain(thought) or "(nothing)")
        elif word == "/save":
            self._save(rest)
        elif word == "/help":
            for name, summary in _COMMANDS.items():
                _note(f"  {name:<8} {summary.partition(': ')[2] or summary}")
        else:
            raise UsageError(f"there is no {word}", hint=did_you_mean(word, list(_COMMANDS)))

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("/save needs a file's name", hint="e.g. /save talk.txt, or talk.json for programs")
        path = Path(os.path.expanduser(name))
        document = {"schema": "hpc.chat/1", **self.document()}
        as_json = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
        try:
            rundir.write_text(path, as_json if path.suffix == ".json" else self._talk.text(), mode=0o600)
        except OSError as error:
            raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}", hint="name another file") from None
        _note(f"(saved in {path}, for you alone)")

    def _ask(self, text: str, out: IO[str] | None) -> None:
        """One turn. Where no answer comes, it never was; where the user ends it, what came stays."""
        turn = Turn(text)
        self._talk.turns.append(turn)
        before = self._talk.left_out
        answer = Answer()
        try:
            while True:
                try:
                    self._answer(out, answer)
                    break
                except TooLong as error:
                    if not self._talk.leave_out():
                        raise
                    if self._talk.left_out == before + 1:
                        _note(f"({error.message}: the model is told less of the beginning)")
        except KeyboardInterrupt:
            turn.stopped = True
            _note("(stopped)")
        except HpcError:
            self._talk.turns.pop()
            self._talk.left_out = before
            raise
        finally:
            turn.answer = answer.text
        if self._talk.left_out > before:
            _note(f"(the oldest {_turns(self._talk.left_out)} left out; /reset begins anew)")
        if answer.reason == "length":
            _note(f"(cut at {answer.tokens or 'so many'} tokens: --max-tokens N, or a long conversation)")
        if turn.thought and not self._thoughts and sys.stderr.isatty():
            _note("(/think shows what it thought)")

    def _answer(self, out: IO[str] | None, answer: Answer) -> None:
        if self._door is None:
            self._door = self._find()
        asked = Question(messages=self._talk.messages(), sampling=self._sampling)
        try:
            with closing(answers.ask(self._door, asked)) as pieces:
                Screen(out, sys.stderr, thoughts=self._thoughts).show(pieces, answer)
        except (HpcError, KeyboardInterrupt) as error:
            if isinstance(error, NotReady):
                self._door = None  # a service that was started again has another address and token
            raise


def _turns(number: int) -> str:
    return "turn is" if number == 1 else f"{number} turns are"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
