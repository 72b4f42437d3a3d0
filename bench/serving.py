"""The served engine, Triton and the door and all, against the bare loop, a plain server of transformers, and no door.

All of it runs on this machine, outside containers, in the environment of serve-cpu.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from measure import Fact, Line, NotMeasured, Pair, Part

ROUNDS = 7
ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
TOKENS = 48
REST_S = 0.2
"""onnxruntime's threads spin for tens of milliseconds after their last work, unless they are told not to."""
MANY = 8
"""Requests at once, for the comparison with the server of transformers."""
TOKEN = "benchmark"
LOOP, FIRST, SERVER, DOOR, PLAN_MS = 1 / 0.9, 1.3, 0.25, 1.05, 50
_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
"""torch's threads do not wait by spinning: on a machine with other work that costs it ten times its speed."""


@dataclass(frozen=True)
class Took:
    """Milliseconds of one answer: until its first token, and per token of all."""

    first: float
    token: float


def lines(rounds: int) -> Iterator[Line]:
    yield _planned()
    python = Path(os.environ.get("SERVE_PYTHON", ROOT / ".venvs" / "serve" / "bin" / "python"))
    if not python.exists():
        raise NotMeasured("needs `make serve-env`, or SERVE_PYTHON=/path/to/its/python")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        _quiet(python, HERE / "random_model.py", folder / "hf")
        for precision in ("fp32", "int4"):
            builder = (python, "-m", "onnxruntime_genai.models.builder", "-i", folder / "hf", "-o", folder / precision)
            _quiet(*builder, "-p", precision, "-e", "cpu", "-c", folder / "cache", "--extra_options", "prune_lm_head=1")
            with _served(python, folder / precision, 1) as (port, _), _bare(python, folder / precision, 1) as bare:
                yield from _alone(f"{precision}, one thread", port, bare, rounds)
            cores = len(os.sched_getaffinity(0))
            with ExitStack() as stack:
                port, triton = stack.enter_context(_served(python, folder / precision, cores))
                bare = stack.enter_context(_bare(python, folder / precision, cores))
                yield from _alone(f"{precision}, a thread for each core", port, bare, rounds)
                if precision == "int4":
                    yield from _door(port, triton, 4 * rounds)
                plain = stack.enter_context(_plain(python, folder / "hf"))
                yield from _together(precision, port, bare, plain, rounds)


def _planned() -> Line:
    """The plan of convert and build alone, from settings that are read to jobs that could be queued."""
    sys.path.insert(0, str(ROOT))
    from tests.core.test_engine_plans import LLAMA_70B, both, facts

    taken = []
    with mock.patch("hpc.inside.models.inspect", return_value=None):
        for _ in range(21):
            world = facts(LLAMA_70B)
            begin = time.perf_counter()
            both(world=world, tp_size=8, pp_size=2)
            taken.append((time.perf_counter() - begin) * 1000)
    found = statistics.median(taken)
    return Fact(
        what="planning a 70B for TP8 × PP2", found=f"{found:.1f} ms", goal=f"≤ {PLAN_MS} ms", met=found <= PLAN_MS
    )


def _alone(how: str, port: int, bare: Callable[[str], Took], rounds: int) -> Iterator[Line]:
    """One request after the other, with as many threads for the engine as for the loop."""
    ours, theirs = _in_turn(rounds, lambda number: _streamed(port, _prompt(number)), lambda n: bare(_prompt(n)))
    yield Pair(
        what=f"a token of the ensemble, through the door, {how}", ms=[t.token for t in ours],
        against="the loop of onnxruntime-genai", against_ms=[t.token for t in theirs], goal=LOOP,
    )  # fmt: skip
    yield Pair(
        what=f"– until its first token, {how}", ms=[t.first for t in ours],
        against="the loop of onnxruntime-genai", against_ms=[t.first for t in theirs], goal=FIRST,
    )  # fmt: skip


def _door(port: int, triton: int, rounds: int) -> Iterator[Line]:
    """The same requests to the door and to Triton itself, whole answers."""
    through, direct = _in_turn(rounds, lambda n: _whole(port, _prompt(n)), lambda n: _whole(triton, _prompt(n)))
    yield Pair(
        what=f"a whole request of {TOKENS} tokens, through the door, int4", ms=through,
        against="the same, to Triton itself", against_ms=direct, goal=DOOR,
    )  # fmt: skip


def _together(
    precision: str, port: int, bare: Callable[[str], Took], plain: int, rounds: int
) -> Iterator[Line]:  # fmt: skip
    """Several requests at once: milliseconds per token of all of them."""
    firsts: list[float] = []

    def served(number: int) -> float:
        begin = time.perf_counter()
        firsts.extend(took.first for took in _at_once(lambda n: _streamed(port, _prompt(number * MANY + n))))
        return (time.perf_counter() - begin) * 1000 / MANY / TOKENS

    def by_transformers(number: int) -> float:
        begin = time.perf_counter()
        _at_once(lambda n: _posted(plain, "/", {"prompt": _prompt(number * MANY + n), "tokens": TOKENS}))
        return (time.perf_counter() - begin) * 1000 / MANY / TOKENS

    def one_by_one(number: int) -> float:
        begin = time.perf_counter()
        for n in range(MANY):
            bare(_prompt(number * MANY + n))
        return (time.perf_counter() - begin) * 1000 / MANY / TOKENS

    few = max(2, rounds // 2)
    ours, theirs = _in_turn(few, served, by_transformers)
    yield Pair(
        what=f"a token, {MANY} requests at once, through the door, {precision}", ms=ours,
        against="a plain server of transformers, float32", against_ms=theirs, goal=SERVER,
    )  # fmt: skip
    yield Part(what=f"until the first token, {MANY} at once", ms=firsts)
    ours, theirs = _in_turn(few, served, one_by_one)
    yield Pair(
        what=f"a token, {MANY} requests at once, through the door, {precision}", ms=ours,
        against="the loop of onnxruntime-genai, one by one", against_ms=theirs,
    )  # fmt: skip


def _in_turn(rounds: int, one: Callable[[int], Any], other: Callable[[int], Any]) -> tuple[list[Any], list[Any]]:
    """A B B A …; the first round does not count. Neither side begins before the other's threads have rested."""
    found: tuple[list[Any], list[Any]] = ([], [])
    for number in range(rounds + 1):
        for side in (0, 1) if number % 2 else (1, 0):
            time.sleep(REST_S)
            result = (one, other)[side](number)
            if number:
                found[side].append(result)
    return found


def _at_once(ask: Callable[[int], Any]) -> list[Any]:
    results: list[Any] = [None] * MANY

    def work(number: int) -> None:
        results[number] = ask(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(MANY)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if None in results:
        raise SystemExit("a request has failed")
    return results


def _prompt(number: int) -> str:
    """Thirty tokens, no two alike."""
    return f"{number:06d} what do the stars do?"[:30].ljust(30)


def _streamed(port: int, prompt: str) -> Took:
    begin = time.perf_counter()
    first, count = 0.0, 0
    with _answer(port, "/v2/models/ensemble/generate_stream", {**_words(prompt), "stream": True}) as answer:
        for line in answer:
            if line.startswith(b"data: "):
                count += json.loads(line[6:])["sequence_length"]
                first = first or time.perf_counter() - begin
    if count != TOKENS:
        raise SystemExit(f"{count} tokens came, and not {TOKENS}")
    return Took(first=first * 1000, token=(time.perf_counter() - begin) * 1000 / count)


def _whole(port: int, prompt: str) -> float:
    begin = time.perf_counter()
    _posted(port, "/v2/models/ensemble/generate", _words(prompt))
    return (time.perf_counter() - begin) * 1000


def _words(prompt: str) -> dict[str, Any]:
    return {"text_input": prompt, "max_tokens": TOKENS, "min_tokens": TOKENS, "add_special_tokens": False}


def _posted(port: int, path: str, words: dict[str, Any]) -> Any:
    with _answer(port, path, words) as answer:
        return json.loads(answer.read())


@contextmanager
def _answer(port: int, path: str, words: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", path, json.dumps(words), {"Authorization": f"Bearer {TOKEN}"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"{path}: {answer.status} {answer.read().decode()}")
    yield answer
    connection.close()


@contextmanager
def _served(python: Path, engine: Path, cores: int) -> Iterator[tuple[int, int]]:
    """The ports of the door, and of the Triton behind it, as the stage serve starts them in a job of so many cores."""
    from hpc.core.assets import TEMPLATES
    from hpc.inside import repository, serving
    from hpc.inside.translating import Served

    with tempfile.TemporaryDirectory(prefix="bench-serve-") as own:
        folder = Path(own) / "repository"
        filling = repository.values("onnxruntime_genai", engine, engine, repository.Settings())
        repository.render(folder, "onnxruntime_genai", TEMPLATES / "triton", filling)
        ports = {name: serving._free_port() for name in ("http", "grpc", "metrics")}
        told = serving.Settings(
            repository=str(folder), stage=own, own=own, shm=f"bench{os.getpid()}_", page=str(TEMPLATES / "chat.html"),
            tokenizer=str(engine), served=asdict(Served(name="bench", target="ensemble", max_tokens=TOKENS)),
            stop_model="tensorrt_llm", bind="127.0.0.1", ports=ports, ready_s=120, drain_s=1, end_s=15,
        )  # fmt: skip
        (Path(own) / "settings.json").write_text(json.dumps(asdict(told)))
        argv = (python, "-m", "hpc.inside.serving", Path(own) / "settings.json")
        env = {**os.environ, **_ENV, "PYTHONPATH": str(ROOT), serving.TOKEN: TOKEN, "SLURM_CPUS_PER_TASK": str(cores)}
        log = Path(own) / "log"
        with _process(argv, env, log) as process:
            while not _healthy(ports["http"]):
                if process.poll() is not None:
                    raise SystemExit(log.read_text(errors="replace")[-3000:])
                time.sleep(0.1)
            said = re.search(r"Started HTTPService at 127\.0\.0\.1:(\d+)", log.read_text(errors="replace"))
            assert said is not None
            yield ports["http"], int(said[1])


def _healthy(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health", headers={"Authorization": f"Bearer {TOKEN}"})
        return connection.getresponse().status == 200
    except OSError:
        return False


@contextmanager
def _bare(python: Path, engine: Path, threads: int) -> Iterator[Callable[[str], Took]]:
    with _talking(python, HERE / "bare_genai.py", engine, str(threads)) as process:

        def ask(prompt: str) -> Took:
            process.stdin.write(json.dumps({"prompt": prompt, "tokens": TOKENS}) + "\n")
            process.stdin.flush()
            found = json.loads(process.stdout.readline())
            if found["tokens"] != TOKENS:
                raise SystemExit(f"the bare loop made {found['tokens']} tokens, and not {TOKENS}")
            return Took(first=found["first"] * 1000, token=found["whole"] * 1000 / TOKENS)

        yield ask


@contextmanager
def _plain(python: Path, model: Path) -> Iterator[int]:
    with _talking(python, HERE / "plain_server.py", model) as process:
        yield int(process.stdout.readline())


@contextmanager
def _talking(*argv: str | Path) -> Iterator[Any]:
    pipe = subprocess.PIPE
    env = {**os.environ, **_ENV}
    process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def _process(argv: Sequence[str | Path], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with open(log, "wb") as said:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=env)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def _quiet(*argv: str | Path) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **_ENV})
    if done.returncode:
        raise SystemExit(f"{argv}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
