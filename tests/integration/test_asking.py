"""query, chat and bench of two real engines (fp32, int4) in the real image, from the login node and from the laptop."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.slowed import slowed
from tests.support.terminal import CONTROLLING, Terminal

from .cluster import Cluster
from .project import SITE, Project, jobs
from .serving import PROMPT, QUESTION, TEXT, Served, make_model
from .test_laptop import Laptop
from .tunnels import wish

SAID = re.sub(r"<think>.*</think>\s*", "", TEXT)
GREEDY = ("--temperature", "0")


@dataclass(frozen=True)
class Two:
    """The services of both engines, of one project of alice's."""

    laptop: Laptop
    sif: Path
    fp32: Served
    int4: Served

    def hpc(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """On the login node."""
        hpc = str(self.laptop.venv / "bin" / "hpc")
        options = {"cwd": self.laptop.folder, "check": False, "timeout": 120, **options}
        return self.laptop.cluster.run(options.pop("user", "alice"), hpc, *arguments, **options)

    def query(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.hpc("query", *arguments, "--run", self.fp32.run, **options)


@pytest.fixture(scope="module")
def two(cluster: Cluster, hpc_install: Path, serve_cpu_sif: Path, base_sif: Path) -> Iterator[Two]:
    folder = Path(tempfile.mkdtemp(prefix="tests-", dir="/home/alice"))
    shutil.chown(folder, "alice", "alice")
    made = Laptop(cluster, folder, hpc_install)
    hf = make_model(cluster, serve_cpu_sif, folder / "model")
    made.write("sites/slurm-test.toml", SITE.format(images=serve_cpu_sif.parent))
    made.write(
        "hpc.toml",
        f'site = "slurm-test"\n[environments]\nserve-cpu = "{serve_cpu_sif}"\ntrain = "{base_sif}"\n'
        f'[pipeline]\nstages = ["build", "serve"]\n'
        f'[build]\nengine = "onnxruntime_genai"\nmodel = "{hf}"\n'
        "[build.resources]\ncpus_per_task = 1\nmem_gb = 3\ntime_min = 10\n"
        '[serve]\nname = "tiny"\n[serve.resources]\ncpus_per_task = 2\nmem_gb = 3\ntime_min = 120\n'
        '[generate]\nprompts = ["prompts.txt"]\ntemperature = 0.0\neval_share = 0.0\nmax_tokens = 90\n'
        "[generate.resources]\ncpus_per_task = 1\nmem_gb = 1\n",
    )
    made.write("bin/hpc", f'#!/bin/sh\nXDG_STATE_HOME={folder}/state exec {hpc_install}/bin/hpc "$@"\n').chmod(0o755)
    made.write("tmp/x", "").unlink()
    try:
        # a model so small says all in one interval: where the time of a token is asked for, each is a piece
        settings = ("serve.stream_interval_ms=0", "build.quantization=int4")
        runs = [made.json("submit", "serve", "--set", setting)["run"] for setting in settings]
        early = made.hpc("query", QUESTION, "--run", runs[0], check=False)
        assert (early.returncode, "does not answer yet: " in early.stderr) == (5, True), early.stderr
        yield Two(made, serve_cpu_sif, *(_served(made, run) for run in runs))
    finally:
        if left := jobs(made, "%i"):
            cluster.run("alice", "scancel", *left)
        shutil.rmtree(folder, ignore_errors=True)


def _served(project: Project, run: str) -> Served:
    """Once it answers, which `--wait` waits for."""
    project.hpc("query", QUESTION, "--run", run, "--wait", "--max-tokens", "1", "--show-thinking", timeout=240)
    document = json.loads((project.folder / "runs" / run / "serve" / "endpoint.json").read_text())
    return Served(project, run, document["host"], document["ports"])


# ---- query


def test_query_says_what_the_model_says(two: Two) -> None:
    done = two.query(QUESTION, *GREEDY)
    assert (done.returncode, done.stdout) == (0, SAID + "\n"), done.stderr
    assert two.query("-", *GREEDY, "--show-thinking", "--no-stream", input=QUESTION).stdout == TEXT + "\n"
    found = json.loads(two.query(QUESTION, *GREEDY, "--json").stdout)
    assert (found["what"], found["text"], found["thought"]) == (f"{two.fp32.run}/serve", SAID, "음…")
    assert (found["finish_reason"], found["prompt_tokens"], found["completion_tokens"]) == ("stop", 9, 70)
    cut = two.query(QUESTION, *GREEDY, "--max-tokens", "3")
    assert (cut.stdout, "cut at 3 tokens" in cut.stderr) == ("안\n", True)
    assert two.query(QUESTION, *GREEDY, "--stop", "반갑습").stdout.startswith("안녕하세요 🙂")


def test_tritons_own_api_says_the_same(two: Two) -> None:
    for more in ((), ("--no-stream",)):
        done = two.query(PROMPT, *GREEDY, "--raw", "--protocol", "http", *more)
        assert (done.returncode, done.stdout) == (0, SAID + "\n"), done.stderr
    assert two.query(PROMPT, *GREEDY, "--raw").stdout == SAID + "\n"
    without = two.query(PROMPT, "--raw", "--protocol", "grpc")
    assert (without.returncode, "hpc-batch[client]" in without.stderr) == (2, True)


def test_grpc_with_nvidias_client_says_the_same(two: Two) -> None:
    """The image has the client: hpc runs in it, and reaches the service by its address."""
    (code,) = two.laptop.venv.glob("lib/python*/site-packages")
    inside = ("apptainer", "-s", "exec", "--bind", str(code), "--env", f"PYTHONPATH={code}", str(two.sif), "python3")

    def ask(*arguments: str, user: str = "alice") -> subprocess.CompletedProcess[str]:
        hpc = (
            *inside,
            "-m",
            "hpc",
            "query",
            "--protocol",
            "grpc",
            "--raw",
            "--url",
            f"{two.fp32.node}:{two.fp32.ports['grpc']}",
        )
        return two.laptop.cluster.run(user, *hpc, *GREEDY, *arguments, cwd=two.laptop.folder, check=False)

    token = ("--token-file", str(two.fp32.folder / "token"))
    for more in ((), ("--no-stream",)):
        done = ask(PROMPT, *token, *more)
        assert (done.returncode, done.stdout) == (0, SAID + "\n"), done.stderr
    long = ask("x" * 2500, *token)
    assert (long.returncode, "the prompt has 2500 tokens" in long.stderr) == (2, True), long.stderr
    wrong = two.laptop.write("wrong", "not-the-token\n")
    wrong.chmod(0o600)
    refused = ask(PROMPT, "--token-file", str(wrong))
    assert (refused.returncode, "does not take this token" in refused.stderr) == (2, True), refused.stderr


def test_what_cannot_be_answered_is_said(two: Two) -> None:
    for arguments, code, told in (
        (("x" * 2500,), 2, "takes 2047 at most"),
        (("x" * 2500, "--raw", "--protocol", "http"), 2, "takes 2047 at most"),
        (("x", "--system", "brief"), 2, "no role system"),
        (("x", "--temperature", "3"), 2, "temperature must be from 0 to 2"),
    ):
        done = two.query(*arguments)
        assert (done.returncode, told in done.stderr) == (code, True), done.stderr
    for run in ("serve-99", "jupyter", "build"):
        done = two.hpc("query", "x", "--run", run, "--json")
        assert (done.returncode, json.loads(done.stdout)["exit_code"]) == (7, 7), done.stderr


def test_another_user_is_refused_and_sees_no_token(two: Two) -> None:
    assert two.hpc("query", "x", "--run", two.fp32.run, user="bob", cwd="/home/bob").returncode == 7
    for env in ({}, {"HPC_TOKEN": "guessed"}):
        done = two.hpc("query", "x", "--url", two.fp32.url, user="bob", cwd="/home/bob", env=env)
        assert done.returncode == 2, done.stderr
    hpc = str(two.laptop.venv / "bin" / "hpc")
    asked = (hpc, "query", "x", "--raw", "--run", two.fp32.run, "--max-tokens", "1900", "--min-tokens", "1900")
    with slowed(*two.fp32.engine()):  # it is still at it when it is looked at
        running = two.laptop.cluster.popen("alice", *asked, cwd=two.laptop.folder, stdout=subprocess.DEVNULL)
        while not json.loads(two.fp32.ask("/health")[1])["running"]:
            assert running.poll() is None
            time.sleep(0.05)
        seen = two.laptop.cluster.run("bob", "ps", "-eww", "-o", "args").stdout
    running.terminate()
    running.wait(20)
    assert "--min-tokens 1900" in seen
    assert two.fp32.token not in seen


@pytest.mark.parametrize("reach", ["jump", "relay"])
def test_through_a_step_where_the_node_is_not_reached(two: Two, reach: str) -> None:
    profile = SITE.format(images=two.sif.parent)
    state = {"XDG_STATE_HOME": str(two.laptop.folder / "state")}
    two.laptop.write("sites/slurm-test.toml", f'{profile}reach = "{reach}"\n')
    try:
        done = two.query(QUESTION, *GREEDY, env=state)
        assert (done.returncode, done.stdout) == (0, SAID + "\n"), done.stderr
        measured = two.hpc("bench", two.fp32.run, "-c", "4", "--requests", "8", "--json", env=state)
        assert json.loads(measured.stdout)["endpoints"][0]["levels"][0]["answered"] == 8, measured.stderr
        assert "the relay has ended" in two.hpc("tunnel", two.fp32.run, "--stop", env=state).stderr
    finally:
        two.laptop.write("sites/slurm-test.toml", profile)


# ---- chat


def test_chat_on_a_terminal(two: Two) -> None:
    hpc = (
        str(two.laptop.venv / "bin" / "hpc"),
        "chat",
        two.fp32.run,
        *GREEDY,
        "--max-tokens",
        "1900",
        "--min-tokens",
        "1900",
    )
    argv = ("/usr/bin/python3", "-c", CONTROLLING, *hpc)
    shown = Terminal(
        lambda **streams: two.laptop.cluster.popen(
            "alice", *argv, cwd=two.laptop.folder, env={"TERM": "xterm"}, **streams
        )
    )
    try:
        shown.until("> ")
        with slowed(*two.fp32.engine()):  # it has much to say yet when the key is pressed
            shown.type(f"{QUESTION}\n")
            shown.until("안녕하세요 🙂 반갑습니다! ")
            assert "음…" not in shown.until("끝")  # and then whatever comes: it may not end yet
            shown.type("\x03")
            shown.until("(stopped)")
        shown.until("> ")
        shown.type("/think\n")
        shown.until("음…")
        shown.until("> ")
        shown.type("/reset\n")
        shown.until("(forgotten)")
        shown.until("> ")
        shown.type(f"{'x' * 1500}\n")
        shown.until("a long conversation)")  # it has spoken to the engine's limit
        shown.until("> ")
        shown.type(f"{'y' * 1000}\n")
        shown.until("the model is told less of the beginning")
        shown.until("the oldest turn is left out")
        shown.until("> ")
        shown.type("\x04")
        assert shown.end() == 0
    finally:
        if shown.process.poll() is None:
            shown.process.kill()
            shown.process.wait()
        shown.hang_up()


# ---- bench


def test_bench_of_one_and_of_two_side_by_side(two: Two) -> None:
    questions = two.laptop.write(
        "questions.jsonl", "".join(json.dumps({"prompt": q}) + "\n" for q in (QUESTION, "인사 2"))
    )
    asked = ("--prompts", str(questions), "--requests", "16", "--max-tokens", "70")
    done = two.hpc("bench", two.fp32.run, "-c", "1,8", *asked, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    told = json.loads(two.hpc("report", two.fp32.run, "--json").stdout)
    assert [s["bench"] for s in told["stages"] if s["name"] == "serve"] == [found]
    (endpoint,) = found["endpoints"]
    for level, concurrency in zip(endpoint["levels"], (1, 8), strict=True):
        assert (level["concurrency"], level["answered"], level["errors"]) == (concurrency, 16, {})
        assert (level["tokens_counted"], level["tokens"] > 16 * 8) == ("by the server", True)
        assert 0 < level["itl_ms"]["p50"] <= level["itl_ms"]["p99"]
        assert level["ttft_ms"]["p50"] < level["e2e_ms"]["p50"]
    done = two.hpc(
        "bench", f"{two.fp32.run}/serve", two.int4.run, "-c", "1,4,8", *asked, "--names", "fp32,int4",
        "--slo", "ttft=5000", "--plot", "bench.svg",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^fp32 +c=8 .*^int4 +c=8 ", done.stdout, re.M | re.S)
    assert re.search(r"greedy answers to 2 questions: \d+% are equal", done.stdout)
    assert ET.parse(two.laptop.folder / "bench.svg").getroot().tag.endswith("svg")
    shutil.copy(two.laptop.folder / "bench.svg", two.laptop.cluster.dir)  # for docs/
    done = two.hpc("bench", two.fp32.run, "--rate", "8", "--duration", "1", "--prompts", str(questions), "--json")
    (level,) = json.loads(done.stdout)["endpoints"][0]["levels"]
    assert (level["loop"], level["errors"], level["answered"] > 1) == ("open", {}, True)


# ---- from the laptop


def test_all_three_from_the_laptop(two: Two) -> None:
    laptop, (_, port) = two.laptop, wish()
    there = laptop.here("query", QUESTION, *GREEDY, "--run", two.fp32.run, "--via", laptop.via)
    assert (there.returncode, there.stdout) == (0, SAID + "\n"), there.stderr
    there = laptop.here("--via", laptop.via, "query", "-", *GREEDY, "--run", two.fp32.run, input=QUESTION)
    assert there.stdout == SAID + "\n", there.stderr
    opened = laptop.tunnel(two.fp32.run, "--local-port", port)
    url = opened.url().partition("/?")[0]
    through = laptop.here("query", QUESTION, *GREEDY, "--url", url)
    assert (through.returncode, through.stdout) == (0, SAID + "\n"), through.stderr
    lines = f"{QUESTION}\n/reset\n{QUESTION}\n"
    assert laptop.here("chat", "--url", url, *GREEDY, input=lines).stdout == f"{SAID}\n{SAID}\n"
    measured = laptop.here("bench", "--url", url, "-c", "1,8", "--requests", "8", "--json", timeout=120)
    assert [v["answered"] for v in json.loads(measured.stdout)["endpoints"][0]["levels"]] == [8, 8], measured.stderr
    opened.ends(2)
    gone = laptop.here("query", QUESTION, "--url", url)
    assert (gone.returncode, "no token" in gone.stderr) == (2, True), gone.stderr


# ---- generate


def test_its_answers_become_a_data_set(two: Two) -> None:
    two.laptop.write("prompts.txt", f"{QUESTION}\n{'too long ' * 300}\n")
    asked = ("submit", "generate", "--set", f"generate.endpoint=runs/{two.fp32.run}/serve", "--wait")
    run = two.laptop.json(*asked)["run"]
    folder = two.laptop.folder / "runs" / run / "generate" / "out" / "dataset"
    (row,) = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    assert [message["content"] for message in row["messages"]] == [QUESTION, TEXT]
    (dropped,) = map(json.loads, (folder / "dropped.jsonl").read_text().splitlines())
    assert dropped["reason"] == "the service refused the request"
    assert json.loads((folder / "provenance.json").read_text())["models"] == ["tiny"]
    assert "nothing to do for generate" in two.laptop.hpc(*asked).stdout
