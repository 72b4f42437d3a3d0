"""`hpc query TEXT`: one question to a served model; its answer on stdout."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from typing import Any

from hpc.core.errors import HpcError, UsageError
from hpc.login import answers
from hpc.login.doorway import Doorway
from hpc.login.printing import Answer, Screen
from hpc.login.question import Question, Sampling


def sampling(options: argparse.Namespace) -> Sampling:
    """The sampling that the command line asks for."""
    return Sampling(
        max_tokens=options.max_tokens, min_tokens=options.min_tokens, temperature=options.temperature,
        top_p=options.top_p, top_k=options.top_k, seed=options.seed,
        repetition_penalty=options.repetition_penalty, stop=tuple(options.stop),
    )  # fmt: skip


def question(options: argparse.Namespace) -> Question:
    """What is asked; UsageError where it is nothing, or fits no protocol."""
    text = sys.stdin.read() if options.text == "-" else options.text
    if not text.strip():
        raise UsageError("there is no question", hint='hpc query "What is …?", or - for what comes on stdin')
    raw = options.raw or options.protocol != "openai"
    if raw and options.system:
        raise UsageError("--system needs the model's chat template", hint="leave --raw and --protocol out")
    if raw and not options.raw:
        print("Triton's own API has no chat template: the text is continued as it is (--raw)", file=sys.stderr)
    system = [{"role": "system", "content": options.system}] if options.system else []
    messages = [] if raw else [*system, {"role": "user", "content": text}]
    return Question(messages=messages, text=text, sampling=sampling(options), stream=not options.no_stream)


def run(door: Doorway, options: argparse.Namespace, asked: Question) -> dict[str, Any]:
    """Ask and show; the document of --json. HpcError where no whole answer comes."""
    answer = Answer()
    shown = None if options.json else sys.stdout
    with closing(answers.ask(door, asked, options.protocol)) as pieces:
        Screen(shown, sys.stderr, thoughts=options.show_thinking, whole=options.no_stream).show(pieces, answer)
    if not answer.text.strip() and answer.reason != "stop":
        raise HpcError(f"{door.what} gave an answer without a word", hint="`hpc logs serve` shows what the server says")
    if answer.reason == "length":
        print(f"(cut at {answer.tokens or 'so many'} tokens: --max-tokens N)", file=sys.stderr)
    return {
        "what": door.what,
        "protocol": options.protocol,
        "text": answer.text if options.show_thinking else answer.said,
        "thought": answer.thought,
        "finish_reason": answer.reason,
        "prompt_tokens": answer.prompt,
        "completion_tokens": answer.tokens,
        "first_s": answer.first_s,
        "seconds": answer.seconds,
    }
