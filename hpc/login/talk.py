"""The verbs that talk to a served model, query, chat and bench: their options, and what each calls."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from hpc.core.errors import UsageError

SUMMARIES = {
    "query": "ask the served model one question",
    "chat": "talk with the served model, on a terminal or line by line",
    "bench": "how fast an endpoint answers, or two of them side by side",
}


def query(options: argparse.Namespace) -> int:
    from hpc.login import doorway
    from hpc.login import query as queries

    _checked(options)
    asked = queries.question(options)
    door = doorway.of_options(options.run, options.url, options.token_file, wait=options.wait)
    document = queries.run(door, options, asked)
    if options.json:
        _print_json("hpc.query/1", document)
    return 0


def chat(options: argparse.Namespace) -> int:
    from hpc.login import chat as chats
    from hpc.login import doorway, query

    _checked(options)

    def find() -> doorway.Doorway:
        return doorway.of_options(options.run, options.url, options.token_file, wait=options.wait)

    talk = chats.Chat(find, query.sampling(options), options.system or "", thoughts=options.show_thinking)
    if sys.stdin.isatty() and sys.stdout.isatty() and not options.json:
        return talk.on_terminal()
    code = talk.by_lines(sys.stdin, None if options.json else sys.stdout)
    if options.json:
        _print_json("hpc.chat/1", talk.document())
    return code


def bench(options: argparse.Namespace) -> int:
    from hpc.login import bench as benches

    document, code = benches.run(options)
    if options.json:
        _print_json(document["schema"], document)
    return code


def by_address(arguments: Sequence[str]) -> bool:
    """Whether these words ask a door by its address, which is one of this very machine where a tunnel is open."""
    return arguments[:1] in (["query"], ["chat"], ["bench"]) and any(w.partition("=")[0] == "--url" for w in arguments)


def _checked(options: argparse.Namespace) -> None:
    """UsageError for numbers that no service takes."""
    least = {"max_tokens": 1, "min_tokens": 0, "temperature": 0, "top_p": 0, "top_k": 0, "seed": 0}
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and not value >= low:
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: too small", hint=f"{low} or more")


def _print_json(schema: str, document: dict[str, Any]) -> None:
    print(json.dumps({"schema": schema, **document}, ensure_ascii=False, indent=1))


# ---- options


def add_query(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("text", metavar="TEXT", help="the question; -: what comes on stdin")
    verb.add_argument("--run", metavar="RUN|STAGE|RUN/STAGE", help="default: the latest served model that is at work")
    _door(verb)
    _sampling(verb)
    verb.add_argument("--no-stream", action="store_true", help="all of the answer at once")
    verb.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    verb.add_argument(
        "--protocol", choices=("openai", "http", "grpc"), default="openai",
        help="http, grpc: Triton's own API, which has no chat template; grpc needs hpc-batch[client]",
    )  # fmt: skip


def add_chat(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "run", nargs="?", metavar="RUN|STAGE|RUN/STAGE", help="default: the latest served model that is at work"
    )
    _door(verb)
    _sampling(verb)


def _door(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--url", metavar="URL", help="a door by its address, e.g. http://localhost:9999 of an open tunnel"
    )
    verb.add_argument("--token-file", metavar="FILE", help="with --url: a file of mode 0600 (default: HPC_TOKEN)")
    verb.add_argument("-w", "--wait", action="store_true", help="wait until it answers, instead of exit code 5")


def _sampling(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--system", metavar="TEXT", help="a system message before the question")
    verb.add_argument("--max-tokens", type=int, metavar="N", help="of the answer (default: serve.max_tokens)")
    verb.add_argument("--min-tokens", type=int, metavar="N", help="the answer does not end before")
    verb.add_argument("--temperature", type=float, metavar="T", help="0: greedy (default: the model's own, or 1)")
    verb.add_argument("--top-p", type=float, metavar="P")
    verb.add_argument("--top-k", type=int, metavar="K")
    verb.add_argument("--seed", type=int, metavar="N", help="the same seed, the same answer")
    verb.add_argument("--repetition-penalty", type=float, metavar="X")
    verb.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; repeatable")
    verb.add_argument("--show-thinking", action="store_true", help="show what stands in <think>…</think>, too")


def add_bench(verb: argparse.ArgumentParser) -> None:
    which = "RUN|STAGE|RUN/STAGE"
    verb.add_argument("run", nargs="?", metavar="RUN", help=f"{which} (default: the latest served model)")
    verb.add_argument("other", nargs="?", metavar="RUN2", help="a second one, measured in turn with the first")
    verb.add_argument("--url", action="append", default=[], metavar="URL", help="a door by its address; twice: two")
    verb.add_argument(
        "--token-file", action="append", default=[], metavar="FILE", help="with --url: mode 0600 (default: HPC_TOKEN)"
    )
    verb.add_argument("--names", metavar="A[,B]", help="what table and plot call them (default: the runs)")
    verb.add_argument("-w", "--wait", action="store_true", help="wait until it answers, instead of exit code 5")
    load = verb.add_argument_group("load")
    load.add_argument(
        "-c", "--concurrency", metavar="N,…", help="closed loop: so many requests at all times (default: 1,8,32)"
    )
    load.add_argument(
        "--rate", metavar="R,…", help="open loop: requests per second at random times, whatever has been answered"
    )
    load.add_argument("--requests", type=int, metavar="N", help="at each level (default: 32, or 4 times the level)")
    load.add_argument("--duration", type=float, metavar="S", help="seconds for each level, in place of --requests")
    load.add_argument("--warmup", type=int, default=3, metavar="N", help="requests before, which do not count (3)")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of the open loop's times (0)")
    asked = verb.add_argument_group("questions")
    asked.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON lines (prompt, text or messages), or one question a line (16 of our own)",
    )
    asked.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of each answer (64)")
    asked.add_argument("--exact", action="store_true", help="every answer has all of these tokens (min_tokens)")
    asked.add_argument("--raw", action="store_true", help="without the chat template; so too where a model has none")
    shown = verb.add_argument_group("figures")
    shown.add_argument(
        "--slo", metavar="ttft=MS,…", help="goodput: requests within these milliseconds, of ttft, itl and e2e"
    )
    shown.add_argument("--plot", metavar="FILE.svg", help="draw time to first token and throughput; -: on stdout")
