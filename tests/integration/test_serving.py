"""A real engine behind the real Triton in the real image, as an ordinary user's Slurm job."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hpc.core import rundir
from hpc.core.rundir import AttemptDir
from tests.support import vendor

from .cluster import Cluster
from .conftest import CHECKOUT
from .project import SITE, Project, holding, jobs
from .serving import QUESTION, TEXT, Served, events, make_model, said
from .test_laptop import Laptop
from .test_states import ended

OPENAI = "openai==3.57.0"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
LONG = {"text_input": "x", "max_tokens": 1900, "bad_words": ["</s>"], "min_tokens": 1900, "stream": True}
"""A request that runs for seconds."""


@pytest.fixture(scope="session")
def engine(cluster: Cluster, hpc_install: Path, serve_cpu_sif: Path) -> Iterator[Path]:
    """An engine for the CPU with its passport, by `hpc submit build`."""
    folder = Path(tempfile.mkdtemp(prefix="tests-engine-", dir="/home/alice"))
    shutil.chown(folder, "alice", "alice")
    hf = make_model(cluster, serve_cpu_sif, folder / "model")
    project = Project(cluster, folder, hpc_install)
    project.write("sites/slurm-test.toml", SITE.format(images=serve_cpu_sif.parent))
    project.write(
        "hpc.toml",
        f'site = "slurm-test"\n[environments]\nserve-cpu = "{serve_cpu_sif}"\n[pipeline]\nstages = ["build"]\n'
        f'[build]\nengine = "onnxruntime_genai"\nmodel = "{hf}"\n'
        'lora = ["first=model/adapters/first", "second=model/adapters/second"]\n'
        "[build.resources]\ncpus_per_task = 2\nmem_gb = 3\ntime_min = 10\n",
    )
    project.hpc("submit", "build", "--wait", timeout=300)
    folder.chmod(0o755)  # bob serves it too
    yield folder / "runs" / "build-1" / "build" / "out" / "engine"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def serving(cluster: Cluster, workdir: Path, hpc_install: Path, serve_cpu_sif: Path, engine: Path) -> Iterator[Project]:
    yield from project_of(Project(cluster, workdir, hpc_install), serve_cpu_sif, engine)


@pytest.fixture(scope="module")
def shared(cluster: Cluster, hpc_install: Path, serve_cpu_sif: Path, engine: Path) -> Iterator[Served]:
    """One that several tests ask, and none ends."""
    folder = Path(tempfile.mkdtemp(prefix="tests-", dir="/home/alice"))
    shutil.chown(folder, "alice", "alice")
    for project in project_of(Project(cluster, folder, hpc_install), serve_cpu_sif, engine, minutes=120):
        one = start(project, "--set", "serve.stream_interval_ms=0")
        yield one
        project.hpc("cancel", one.run)
        end_of(one)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def lasting(cluster: Cluster, hpc_install: Path, serve_cpu_sif: Path, engine: Path) -> Iterator[Project]:
    """alice's, of three minutes, with a successor after one. It is submitted early, and looked at late."""
    folder = Path(tempfile.mkdtemp(prefix="tests-", dir="/home/alice"))
    shutil.chown(folder, "alice", "alice")
    for project in project_of(Project(cluster, folder, hpc_install), serve_cpu_sif, engine):
        settings = ("serve.successors=1", "serve.handover_min=2", "serve.resources.time_min=3")
        project.hpc("submit", "serve", *(word for setting in settings for word in ("--set", setting)))
        # the second is still there when it is looked at, however long the tests in between take
        later = json.loads((project.folder / "runs/serve-1/serve/attempt-2/successor.json").read_text())
        cluster.run("root", "scontrol", "update", f"jobid={later['job_id']}", "TimeLimit=120")
        yield project
    places = ("squeue", "-h", "-u", "alice", "-o", "%Z")  # those that are ending, too: they write into the folder
    until(lambda: str(folder) not in cluster.run("alice", *places).stdout, "its jobs have ended", 60)
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Neighbour:
    """bob's service, on alice's engine, of two minutes; he asks it now and then until it ends."""

    cluster: Cluster
    folder: Path
    asking: subprocess.Popen[str] | None = None

    def load(self, *words: str, pause: str = "0") -> subprocess.Popen[str]:
        program = self.folder.parents[2] / "load.py"
        where = json.loads((self.folder / "endpoint.json").read_text())
        argv = ("/usr/bin/python3", str(program), f"http://{where['host']}:{where['ports']['http']}")
        pipe = subprocess.PIPE
        token = str(self.folder / "token")
        return self.cluster.popen("bob", *argv, token, *words, env={"PAUSE": pause}, stdout=pipe, stderr=pipe)

    def ask_until_it_ends(self) -> None:
        if self.asking is None:
            until((self.folder / "endpoint.json").exists, "bob's is ready", 100)
            self.asking = self.load("100000", "3", "60", pause="0.3")


@pytest.fixture(scope="module")
def neighbour(cluster: Cluster, hpc_install: Path, serve_cpu_sif: Path, engine: Path) -> Iterator[Neighbour]:
    folder = Path(tempfile.mkdtemp(prefix="tests-", dir="/home/bob"))
    (made,) = project_of(Project(cluster, folder, hpc_install), serve_cpu_sif, engine, minutes=2)
    made.write("load.py", (Path(__file__).parents[1] / "support" / "load.py").read_text())
    for path in (folder, *folder.rglob("*")):
        shutil.chown(path, "bob", "bob")
    hpc = str(hpc_install / "bin" / "hpc")
    cluster.run("bob", hpc, "submit", "serve", "--set", "serve.generation_config=false", cwd=made.folder)
    one = Neighbour(cluster, folder / "runs" / "serve-1" / "serve")
    yield one
    cluster.run("bob", hpc, "cancel", "serve-1", cwd=folder, check=False)
    if one.asking is not None:
        one.asking.kill()
    shutil.rmtree(folder, ignore_errors=True)


def project_of(made: Project, serve_cpu_sif: Path, engine: Path, minutes: int = 10) -> Iterator[Project]:
    made.write("sites/slurm-test.toml", SITE.format(images=serve_cpu_sif.parent))
    made.write(
        "hpc.toml",
        f'site = "slurm-test"\n[environments]\nserve-cpu = "{serve_cpu_sif}"\n[pipeline]\nstages = ["serve"]\n'
        '[build]\nengine = "onnxruntime_genai"\n'
        f'[serve]\nengine_dir = "{engine}"\nname = "tiny"\n'
        f"[serve.resources]\ncpus_per_task = 2\nmem_gb = 3\ntime_min = {minutes}\n",
    )
    yield made
    left = jobs(made, "%i")
    if left:
        made.cluster.run("alice", "scancel", *left)


def start(project: Project, *options: str) -> Served:
    done = project.hpc("submit", "serve", "--wait", *options, timeout=180)
    (run,) = {row["run"] for row in project.json("status")["stages"]}
    document = json.loads((project.folder / "runs" / run / "serve" / "endpoint.json").read_text())
    assert f"{run}/serve is ready" in done.stderr
    return Served(project, run, document["host"], document["ports"])


@pytest.fixture
def served(serving: Project) -> Served:
    return start(serving)


def end_of(one: Served, timeout: float = 60) -> dict[str, Any]:
    return one.project.until(ended("serve"), one.run, timeout)["serve"]


def listed(one: Served, what: str) -> list[list[str]]:
    """Processes of alice's whose command line has this text: pid, group, words."""
    rows = one.project.cluster.run("alice", "ps", "-u", "alice", "-o", "pid=,pgid=,args=", "-ww").stdout.splitlines()
    return [row.split(None, 2) for row in rows if what in row and " ps " not in row]


def server_of(one: Served) -> str:
    """The number of Triton's process."""
    (row,) = [row for row in listed(one, f"{one.folder}/repository") if "bin/tritonserver" in row[2]]
    return row[0]


def regions(one: Served) -> set[str]:
    """The server's regions in its own /dev/shm, as root sees them."""
    return {path.name for path in Path(f"/proc/{server_of(one)}/root/dev/shm").iterdir()}


def nothing_left(one: Served, names: set[str]) -> None:
    repository = f"{one.folder}/repository"
    deadline = time.monotonic() + 60
    while (found := listed(one, repository)) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert found == []
    assert one.ask("/health", token="x")[0] == 0
    assert not (one.folder / "token").exists()
    assert names
    assert not names & {path.name for path in Path("/dev/shm").iterdir()}


def test_two_users_serve_and_ask_at_once(shared: Served, neighbour: Neighbour, lasting: Project) -> None:
    until((neighbour.folder / "endpoint.json").exists, "bob's is ready", 100)
    where = json.loads((neighbour.folder / "endpoint.json").read_text())
    theirs, token = f"http://{where['host']}:{where['ports']['http']}", (neighbour.folder / "token").read_text()
    both = [load(shared, 100, 8, 16), neighbour.load("100", "8", "16")]
    assert [said(process)["ends"] for process in both] == [{"whole": 100}] * 2
    (code, body), (_, own) = shared.ask("/v1/models", user="bob", url=theirs, token=token), shared.ask("/v1/models")
    assert (code, json.loads(body)["data"][0]["sampling"]) == (200, {})
    assert json.loads(own)["data"][0]["sampling"] == {"temperature": 0.1}
    assert shared.ask("/v1/models", url=theirs)[0] == 401
    assert shared.ask("/v1/models", user="bob", token=token)[0] == 401
    assert (where["host"], *where["ports"].values()) != (shared.node, *shared.ports.values())
    neighbour.ask_until_it_ends()  # for the last but one test of this file


def until(found: Callable[[], Any], what: str, timeout: float) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := found()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.2)
    return value


def test_what_it_says_is_whole_in_every_way_of_asking(shared: Served) -> None:
    for temperature in (None, 0):  # None: the model's own, which is 0.1
        code, body = shared.ask("/v1/chat/completions", {**CHAT, "temperature": temperature})
        answer = json.loads(body)
        assert (code, answer["choices"][0]["message"]["content"]) == (200, TEXT)
        assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 70, "total_tokens": 79}
    code, body = shared.ask("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}})
    assert code == 200
    assert body.rstrip().endswith("data: [DONE]")
    parts = events(body)
    texts = [c["delta"].get("content", "") for part in parts for c in part["choices"]]
    assert "".join(texts) == TEXT
    assert not [text for text in texts if "\ufffd" in text]
    assert len(texts) > 30
    assert parts[-1]["usage"]["completion_tokens"] == 70
    query = {"inputs": [{"name": "QUERY", "shape": [1, 1], "datatype": "BYTES", "data": ["abc"]}]}
    code, body = shared.ask("/v2/models/preprocessing/infer", query)  # Triton compresses it for whoever takes that
    assert (code, json.loads(body)["outputs"][0]["name"]) == (200, "INPUT_ID")
    prompt = f"<s><|user|>{QUESTION}<|assistant|>"
    for model in ("ensemble", "tensorrt_llm_bls"):
        asked = {"text_input": prompt, "max_tokens": 100, "add_special_tokens": False}
        code, body = shared.ask(f"/v2/models/{model}/generate", asked)
        assert (code, json.loads(body)["text_output"], json.loads(body)["finish_reason"]) == (200, TEXT, "stop")
        code, body = shared.ask(f"/v2/models/{model}/generate_stream", {**asked, "stream": True})
        texts = [event["text_output"] for event in events(body)]
        assert "".join(texts) == TEXT
        assert len(texts) > 30
        assert not [text for text in texts if "\ufffd" in text]


def test_it_says_what_transformers_itself_says(shared: Served, engine: Path) -> None:
    """Greedy, of something that it has not learned by heart; through the door, Triton and the engine."""
    said = json.loads((engine.parents[4] / "model" / "greedy.json").read_text())
    words = {"max_tokens": said["tokens"], "min_tokens": said["tokens"], "top_k": 1, "add_special_tokens": False}
    asked = {"text_input": "<|user|>naïve 인사<|assistant|>", **words}
    for model in ("ensemble", "tensorrt_llm_bls"):
        answer = json.loads(shared.ask(f"/v2/models/{model}/generate", asked)[1])
        assert (answer["text_output"], answer["sequence_length"]) == (said["text"], 48)


def test_stop_words_bad_words_and_lengths(shared: Served) -> None:
    chat = [{**CHAT, "stop": ["반갑습"]}, {**CHAT, "stop": ["zzz", "🙂 반"], "stream": True}]
    assert json.loads(shared.ask("/v1/chat/completions", chat[0])[1])["choices"][0]["message"]["content"] == (
        "안녕하세요 🙂 "
    )
    parts = events(shared.ask("/v1/chat/completions", chat[1])[1])
    assert "".join(c["delta"].get("content", "") for part in parts for c in part["choices"]) == "안녕하세요 "
    assert parts[-1]["choices"][0]["finish_reason"] == "stop"
    _, body = shared.ask("/v1/chat/completions", {**CHAT, "max_tokens": 4})
    answer = json.loads(body)
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 4)
    prompt = f"<s><|user|>{QUESTION}<|assistant|>"
    asked = {"text_input": prompt, "max_tokens": 100, "add_special_tokens": False}
    for model in ("ensemble", "tensorrt_llm_bls"):
        stopped = json.loads(shared.ask(f"/v2/models/{model}/generate", {**asked, "stop_words": ["니다!"]})[1])
        assert stopped["text_output"] == "안녕하세요 🙂 반갑습"
        without = json.loads(shared.ask(f"/v2/models/{model}/generate", {**asked, "bad_words": ["🙂"]})[1])
        assert "안녕하세요" in without["text_output"]
        assert "🙂" not in without["text_output"]


def test_answers_are_the_same_alone_and_together(shared: Served, engine: Path) -> None:
    """Different lengths, ends and adapters in one batch; the adapters' as transformers says them, merged."""
    asked = [
        {"text_input": f"{n} " * (1 + 9 * n), "max_tokens": 10 + 7 * n, "stream": bool(n % 2), "top_k": 1}
        for n in range(6)
    ]
    prompt = {"text_input": f"<s><|user|>{QUESTION}<|assistant|>", "max_tokens": 40, "add_special_tokens": False}
    chat = [{**prompt, **more} for more in ({"lora_name": "first"}, {"lora_name": "second"}, {"stop_words": ["반갑"]})]
    program = shared.project.write("at_once.py", (CHECKOUT / "tests" / "support" / "at_once.py").read_text())
    words = ("/usr/bin/python3", str(program), shared.url, str(shared.folder / "token"))
    done = shared.project.cluster.run("alice", *words, timeout=120, input=json.dumps([*asked, *chat, *asked[:3]]))
    found = json.loads(done.stdout)
    assert found["alone"] == found["together"]
    expected = json.loads((engine.parents[4] / "model" / "adapters" / "said.json").read_text())
    assert expected["first"] != expected["second"]
    assert [text for text, _ in found["together"][6:9]] == [expected["first"], expected["second"], "안녕하세요 🙂 "]


def test_an_adapter_is_a_model_for_openais_clients(shared: Served, engine: Path) -> None:
    expected = json.loads((engine.parents[4] / "model" / "adapters" / "said.json").read_text())
    code, body = shared.ask("/v1/chat/completions", {**CHAT, "model": "second", "max_tokens": 40})
    assert (code, json.loads(body)["model"]) == (200, "second")
    assert json.loads(body)["choices"][0]["message"]["content"] == expected["second"]
    code, body = shared.ask("/v1/chat/completions", {**CHAT, "model": "third"})
    assert (code, "it is 'tiny' or 'first' or 'second'" in body) == (404, True)
    for model in ("ensemble", "tensorrt_llm_bls"):
        words = {"text_input": "x", "max_tokens": 3, "lora_name": "third"}
        code, body = shared.ask(f"/v2/models/{model}/generate", words)
        assert "there is no adapter 'third' in this engine: there are first, second" in body


def test_the_engines_loop(cluster: Cluster, engine: Path, serve_cpu_sif: Path, hpc_install: Path) -> None:
    """In the image, without Triton: who shares a pass, who waits, and who is told what."""
    (code,) = hpc_install.glob("lib/python*/site-packages/hpc/_assets/templates/triton/onnxruntime_genai")
    program = engine.parents[4] / "engine_alone.py"
    shutil.copyfile(CHECKOUT / "tests" / "support" / "engine_alone.py", program)
    inside = ("srun", "-c2", "apptainer", "-s", "exec", "--bind", str(hpc_install), str(serve_cpu_sif))
    words = ("python3", str(program), str(code / "tensorrt_llm" / "1"), str(engine))
    seen = json.loads(cluster.run("alice", *inside, *words, timeout=120).stdout.splitlines()[-1])
    assert seen["together"] == seen["alone"]
    assert seen["rows"] == len(seen["alone"]), "all of them in one pass"
    assert {len(tokens) for tokens, *_ in seen["alone"]} > {5, 23, 41, 59, 77}
    assert seen["pieces"] == [64] * 23 + [28], "a long prompt, in pieces"
    assert min(seen["between"]) >= 1, "and those that run go on in between"
    assert seen["interval"][0] == 1, "the first token does not wait for others"
    assert 2 < len(seen["interval"]) <= 2 + seen["interval_s"] / 0.05
    assert (sum(seen["interval"]), seen["whole"], seen["same"]) == (400, True, True)
    assert (seen["left"], seen["stayed"], seen["late"]) == (["cancelled", True], True, 0)
    assert seen["ended_s"] < 5
    assert seen["told"] == ["the engine has ended"] * 4
    assert seen["room_for"] == 1, "the cache has room for one of them at a time"
    assert [(len(tokens), reason) for tokens, reason, _ in seen["waited"]] == [(30, "length")] * 5
    assert [error for _, _, error in seen["too_much"]] == [
        "prompt and answer may have 120 tokens; the engine's cache has room for 100",
        "there is no adapter 'third' in this engine: there are first, second",
        "the prompt has tokens that the model does not know",
    ]
    assert seen["broken"] == "the engine has ended"


def test_sampling_follows_its_seed(shared: Served) -> None:
    def said(**words: Any) -> str:
        asked = {"model": "tiny", "prompt": "x", "max_tokens": 40, "temperature": 2.0, **words}
        code, body = shared.ask("/v1/completions", asked)
        assert code == 200, body
        text: str = json.loads(body)["choices"][0]["text"]
        return text

    assert said(seed=1) == said(seed=1)
    assert said(seed=1) != said(seed=2)
    assert said(temperature=0) == said(temperature=0)


@pytest.mark.parametrize(
    ("path", "words", "code", "told"),
    [
        ("chat/completions", {**CHAT, "model": "other"}, 404, "it is 'tiny'"),
        ("chat/completions", {**CHAT, "n": 2}, 400, "n = 2"),
        ("chat/completions", {**CHAT, "messages": []}, 400, "at least one message"),
        ("chat/completions", {**CHAT, "messages": [{"role": "system", "content": "x"}]}, 400, "no role system"),
        ("chat/completions", {**CHAT, "temperature": 3}, 400, "temperature must be from 0 to 2"),
        ("completions", {"model": "tiny", "prompt": "x" * 2500}, 400, "the prompt has 2500 tokens"),
        ("nowhere", {}, 404, "Not Found"),
    ],
)
def test_errors_have_openais_form(shared: Served, path: str, words: dict[str, Any], code: int, told: str) -> None:
    got, body = shared.ask(f"/v1/{path}", words)
    assert (got, told in json.loads(body)["error"]["message"]) == (code, True), body
    got, body = shared.ask(f"/v1/{path}", {**words, "stream": True})
    assert got == code, body


def test_tritons_own_client_over_grpc(shared: Served, serve_cpu_sif: Path) -> None:
    found = said(shared.grpc("whole", serve_cpu_sif))
    assert (found["ready"], found["text"], found["ids"]) == (True, TEXT, ["mine"])
    assert found["pieces"] > 30
    assert (found["marked"], found["last"]) == (False, True)  # Triton's mark of the last, for those who asked for it
    assert found["models"] == ["ensemble", "postprocessing", "preprocessing", "tensorrt_llm", "tensorrt_llm_bls"]
    assert "the prompt has 2500 tokens" in found["refused"][0]
    assert found["tokens"] == [1, 3]
    assert found["failed"].startswith("StatusCode.UNIMPLEMENTED: ModelInfer RPC doesn't support models with decoupled")
    assert found["unknown"].startswith("StatusCode.NOT_FOUND")
    assert (found["elsewhere"], found["malformed"]) == ("UNIMPLEMENTED", ["INVALID_ARGUMENT"] * 2)
    tunnel = shared.project.json("tunnel", shared.run)
    assert tunnel["ports"] == shared.ports
    assert [f"-L localhost:{18000 + place}:{shared.node}:{shared.ports[name]}" in tunnel["command"]
            for place, name in enumerate(("http", "grpc", "metrics"))] == [True] * 3  # fmt: skip
    wrong = [shared.grpc("refused", serve_cpu_sif, token=token) for token in ("", "x")]
    wrong.append(shared.grpc("refused", serve_cpu_sif, user="bob", node=shared.node, host="127.0.0.1", token="x"))
    for process in wrong:
        words = {name: word for name, word in said(process).items() if name != "seconds"}
        assert words.keys() == {"live", "config", "infer", "stream"}
        assert all("StatusCode.UNAUTHENTICATED" in word and "hpc tunnel" in word for word in words.values()), words
    until(lambda: json.loads(shared.ask("/health")[1])["running"] == 0, "none is left in work", 20)


def test_a_client_that_leaves_frees_its_place(serving: Project, serve_cpu_sif: Path) -> None:
    one = start(serving, "--set", "serve.engine_batch_size=1")
    began = time.monotonic()
    assert one.ask("/v2/models/ensemble/generate_stream", {**LONG, "max_tokens": 200, "min_tokens": 200})[0] == 200
    alone = (time.monotonic() - began) * 1900 / 200
    waiting = [
        one.project.cluster.popen(
            "alice", "curl", "-sN", "--max-time", "2", "-o", "/dev/null", "-H", f"Authorization: Bearer {one.token}",
            "-d", json.dumps(LONG), f"{one.url}/v2/models/{model}/{way}",
        )
        for model in ("ensemble", "tensorrt_llm_bls") for way in ("generate_stream", "generate") for _ in range(4)
    ]  # fmt: skip
    streams = [one.grpc("leave", serve_cpu_sif) for _ in range(2)]
    for process in waiting:
        process.wait(30)
    for process in streams:
        assert said(process)["came"] > 5
    left = time.monotonic()
    while json.loads(one.ask("/health")[1])["running"]:
        assert time.monotonic() - left < 20
        time.sleep(0.2)
    assert time.monotonic() - left < 0.5 * (16 + 8) * alone
    assert one.ask("/v1/chat/completions", CHAT)[0] == 200
    one.project.hpc("cancel", one.run)
    assert end_of(one)["state"] == "CANCELLED"
    log = (one.folder / "attempt-1" / "stdout").read_text()
    assert "Triton has ended with exit code 0" in log


def load(
    one: Served, requests: int, concurrency: int, tokens: int, *, where: str = "", until: str = "", node: str = "login"
) -> Any:
    program = one.project.write("load.py", (Path(__file__).parents[1] / "support" / "load.py").read_text())
    words = (where or one.url, str(one.folder / "token"), str(requests), str(concurrency), str(tokens), until)
    pipe = subprocess.PIPE
    return one.project.cluster.popen(
        "alice", "/usr/bin/python3", str(program), *words, node=node, stdout=pipe, stderr=pipe
    )


def test_none_of_a_thousand_requests_is_lost(shared: Served) -> None:
    def figures() -> dict[str, Any]:
        (row,) = shared.project.json("status", f"{shared.run}/serve")["stages"]
        found: dict[str, Any] = row["figures"]
        return found

    assert shared.ask("/v2/models/ensemble/generate", {"text_input": "x", "max_tokens": 1})[0] == 200
    until(lambda: json.loads(shared.ask("/health")[1])["running"] == 0, "it is counted", 20)
    asked, kept = time.time(), shared.folder / "figures.json"
    # what is written after it has all that was before it
    until(lambda: kept.exists() and json.loads(kept.read_text())["t"] > asked, "it is written down", 60)
    before = figures()
    out, err = load(shared, 1000, 32, 16).communicate(timeout=240)
    assert json.loads(out.splitlines()[-1])["ends"] == {"whole": 1000}, out + err
    deadline = time.monotonic() + 60
    while (now := figures())["done"] != before["done"] + 1000:
        assert time.monotonic() < deadline, now
        time.sleep(0.5)
    assert (now["running"], now["left"], now["tokens"] - before["tokens"]) == (0, 0, 16_000)
    assert f"{now['done']} done" in shared.project.hpc("status", shared.run).stdout
    for url in (shared.url, f"http://{shared.node}:{shared.ports['metrics']}"):
        code, text = shared.ask("/metrics", url=url)
        assert (code, "nv_inference_request_success" in text) == (200, True)
        assert shared.ask("/metrics", url=url, token="x")[0] == 401


def test_the_end_under_load_loses_nothing_that_was_let_in(served: Served, serve_cpu_sif: Path) -> None:
    memory = regions(served)
    stream = served.grpc("stay", serve_cpu_sif)
    assert stream.stdout is not None
    assert stream.stdout.readline() == "begun\n"
    process = load(served, 100_000, 16, 100)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(1)
    served.project.hpc("cancel", served.run)
    out, _ = process.communicate(timeout=90)
    ends = json.loads(out.splitlines()[-1])["ends"]
    assert set(ends) <= {"whole", "refused"}, ends
    found = said(stream)
    assert (found["reason"], found["errors"]) == ("length", [])
    assert "UNAVAILABLE" in found["then"] or "is ending" in found["then"]
    assert ends["whole"] > 16
    assert end_of(served)["state"] == "CANCELLED"
    nothing_left(served, memory)
    log = (served.folder / "attempt-1" / "stdout").read_text()
    assert "Triton has ended with exit code 0" in log


def test_a_successor_and_a_new_start_lose_none_of_a_thousand_requests(served: Served, serve_cpu_sif: Path) -> None:
    """32 at once, through a hand-over and a stop; from a laptop too, whose tunnel follows."""
    project, token = served.project, served.token
    laptop = on_a_laptop(project)
    tunnel = laptop.tunnel(f"{served.run}/serve")
    url = tunnel.url()
    tunnel.until(lambda: len(tunnel.out) > 2)
    local = dict(line.strip().split(": localhost:") for line in tunnel.out if ": localhost:" in line)
    assert local.keys() == {"grpc", "metrics"}
    through = said(served.grpc("whole", serve_cpu_sif, node="laptop", host="127.0.0.1", port=int(local["grpc"])))
    assert through["text"] == TEXT
    metrics = served.ask("/metrics", node="laptop", url=f"http://127.0.0.1:{local['metrics']}")
    assert "nv_inference_request_success" in metrics[1]
    told = str(project.folder / "enough")
    process = load(served, 1000, 32, 16, where=str(served.folder / "endpoint.json"), until=told)
    port = int(url.partition("localhost:")[2].partition("/")[0])
    there = project.write("there.json", json.dumps({"host": "127.0.0.1", "ports": {"http": port}}))
    far = load(served, 1, 2, 16, where=str(there), until=told + "-there", node="laptop")
    assert process.stdout.readline() == far.stdout.readline() == "begun\n"
    first = project.states(served.run)["serve"]["job_id"]
    done = project.hpc("submit", "serve", "--replace", "--wait", timeout=300)
    assert "attempt 2 has taken over" in done.stderr
    (row,) = project.json("status", f"{served.run}/serve")["stages"]
    assert (row["state"], row["attempt"], row["job_id"] != first) == ("RUNNING", 2, True)
    assert served.token == token  # whoever was let in is let in still
    tunnel.says("is ready again on")
    assert "another address" not in "".join(tunnel.err)
    old = served.folder / "attempt-1" / "outcome.json"
    until(old.exists, "the old one has ended", 60)
    assert json.loads(old.read_text())["state"] == "COMPLETED"
    assert f"{served.run}/serve" in project.hpc("status").stdout
    (project.folder / "enough-there").touch()
    ends = said(far)
    assert (set(ends["ends"]), ends["ends"]["whole"] > 20) == ({"whole"}, True), ends
    tunnel.ends(signal.SIGINT)
    # and now it stops, and starts again
    project.hpc("cancel", served.run)
    assert end_of(served)["state"] == "CANCELLED"
    assert project.hpc("submit", "serve", "--wait", timeout=120).returncode == 0
    (project.folder / "enough").touch()
    ends = said(process)
    assert set(ends["ends"]) == {"whole"}, ends
    assert ends["ends"]["whole"] >= 1000
    assert len(set(ends["retried"]) - {"times"}) == 3, ends  # three jobs have answered


def on_a_laptop(project: Project) -> Laptop:
    program = project.write("bin/hpc", f'#!/bin/sh\nexec {project.venv}/bin/hpc "$@"\n')
    program.chmod(0o755)
    (project.folder / "tmp").mkdir(exist_ok=True)
    shutil.chown(project.folder / "tmp", "alice", "alice")
    return Laptop(project.cluster, project.folder, project.venv)


def test_another_user_of_the_node_gets_nowhere(shared: Served) -> None:
    cluster, node = shared.project.cluster, shared.node
    for place, address in (("login", f"{node}:{shared.port}"), (node, f"127.0.0.1:{shared.port}")):
        for path in ("/health", "/", "/v2/health/ready", "/v1/models", "/metrics", "/v2/models/ensemble/config"):
            assert shared.ask(path, user="bob", token="", node=place, url=f"http://{address}")[0] == 401
            assert shared.ask(path, user="bob", token="x", node=place, url=f"http://{address}")[0] == 401
    log = (shared.folder / "attempt-1" / "stdout").read_text()
    ports = re.findall(r"Started (?:HTTPService|GRPCInferenceService|Metrics Service) at 127\.0\.0\.1:(\d+)", log)
    assert len(ports) == 3
    server = server_of(shared)
    for port in ports:
        url = f"http://127.0.0.1:{port}"
        assert shared.ask("/v2/health/ready", user="bob", node=node, url=url)[0] == 0
        assert shared.ask("/v2/health/ready", node=node, url=url)[0] == 0
    inside = ["nsenter", "-t", server, "-n", "curl", "-s", f"http://127.0.0.1:{ports[1]}/v2"]
    assert '"triton"' in subprocess.run(inside, check=True, capture_output=True, text=True).stdout
    names = regions(shared)
    assert names
    assert not names & {path.name for path in Path("/dev/shm").iterdir()}
    assert cluster.run("bob", "ls", f"/proc/{server}/root/dev/shm", node=node, check=False).returncode != 0
    texts = [
        cluster.run("bob", "ps", "-eww", "-o", "args", node=node).stdout,
        cluster.run("bob", "bash", "-c", f"cat /proc/{server}/environ", node=node, check=False).stdout,
    ]
    assert not [text for text in texts if shared.token in text]
    assert holding(shared.folder, shared.token) == []


def killed(one: Served, wanted: str) -> tuple[dict[str, Any], set[str]]:
    memory = regions(one)
    for row in listed(one, f"{one.folder}/repository"):
        if wanted in row[2]:
            with suppress(ProcessLookupError):
                os.kill(int(row[0]), signal.SIGKILL)
    return end_of(one), memory


def test_a_models_process_that_is_killed_is_told(served: Served) -> None:
    """Triton itself would say that it is ready, and refuse every request."""
    end, memory = killed(served, "repository/tensorrt_llm/1/model.py")
    assert (end["state"], end["reason"]) == ("FAILED", "the process of one of Triton's models has ended")
    nothing_left(served, memory)


def test_a_server_that_is_killed_leaves_nothing(served: Served) -> None:
    end, memory = killed(served, "bin/tritonserver")
    assert (end["state"], end["reason"]) == ("FAILED", "Triton ended by itself, with exit code -9")
    nothing_left(served, memory)


def test_a_job_that_is_killed_at_once_leaves_no_process(served: Served) -> None:
    job = str(served.project.states(served.run)["serve"]["job_id"])
    repository = f"{served.folder}/repository"
    assert listed(served, repository)
    served.project.cluster.run("alice", "scancel", "--signal=KILL", "--full", job)
    end_of(served)
    deadline = time.monotonic() + 60
    while listed(served, repository) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert listed(served, repository) == []


def test_what_cannot_be_served_is_told(serving: Project, engine: Path) -> None:
    broken = serving.folder / "broken"
    shutil.copytree(engine, broken)
    (broken / "model.onnx").write_bytes(b"no engine")
    for path in (broken, *broken.rglob("*")):
        shutil.chown(path, "alice", "alice")
    done = serving.hpc("submit", "serve", "--wait", "--set", f'serve.engine_dir="{broken}"', check=False, timeout=180)
    assert done.returncode == 1
    assert "Triton ended by itself, with exit code 1" in done.stderr
    assert "model.onnx" in done.stderr


def test_an_engine_that_does_not_fit_is_refused_with_exit_code_6(serving: Project, engine: Path) -> None:
    copy = serving.folder / "copy"
    shutil.copytree(engine, copy)
    passport = json.loads((copy / "passport.json").read_text())
    passport["versions"]["onnxruntime-genai"] = "99.0"
    passport["image"] = "another"
    (copy / "passport.json").write_text(json.dumps(passport))
    for path in (copy, *copy.rglob("*")):
        shutil.chown(path, "alice", "alice")
    given = ("--set", f'serve.engine_dir="{copy}"')
    done = serving.hpc("submit", "serve", "--wait", *given, check=False, timeout=120)
    assert done.returncode == 6, done.stderr
    assert "built with onnxruntime-genai 99.0" in done.stderr
    done = serving.hpc("submit", "serve", *given, "--set", "build.tp_size=2", check=False)
    assert done.returncode == 6, done.stderr
    (copy / "passport.json").unlink()
    done = serving.hpc("submit", "serve", *given, check=False)
    assert done.returncode == 6, done.stderr
    assert "is no engine of hpc's" in done.stderr


PARSED = """
import sys
from pathlib import Path
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from hpc.inside import repository, pbtxt, vendor
repository._IMAGE_LLMAPI = Path("llmapi")
nvidias = sorted(Path("vendor").iterdir())
for engine in (*repository.ENGINES, *nvidias):
    settings = repository.Settings(adapters='{"a b": 1}', lora_data_type="TYPE_FP32", lora_cache_max_adapter_size=8)
    source = engine if engine in nvidias else None
    name, engine = (engine.name, "tensorrt_llm") if source else (engine, engine)
    values = repository.values(engine, Path('/a "b"'), Path("/한글"), settings)
    values = vendor.complete(source, values) if source else values
    repository.render(Path("made", name), engine, Path(sys.argv[1]), values, source)
    for path in sorted(Path("made", name).glob("*/config.pbtxt")):
        assert "${" not in path.read_text()
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        own = pbtxt.parse(path.read_text())
        assert config.name == path.parent.name == own["name"][0]
        assert config.max_batch_size == int(own["max_batch_size"][0])
        assert [i.name for i in config.input] == [i["name"][0] for i in own["input"]]
        assert {k: v.string_value for k, v in config.parameters.items()} == {
            p["key"][0]: p["value"][0]["string_value"][0] for p in own.get("parameters", [])}
        assert config.model_transaction_policy.decoupled == repository.decoupled(own)
        print(name, config.name)
        if source:
            continue
        inputs = {i.name: (model_config_pb2.DataType.Name(i.data_type), list(i.dims)) for i in config.input}
        if (engine, config.name) == ("tensorrt_llm", "tensorrt_llm"):
            assert inputs["lora_task_id"] == ("TYPE_UINT64", [1])
            assert inputs["lora_weights"] == ("TYPE_FP32", [-1, -1])
            assert inputs["lora_config"] == ("TYPE_INT32", [-1, 3])
            assert config.parameters["lora_cache_max_adapter_size"].string_value == "8"
        if config.name == "tensorrt_llm_bls":
            assert inputs["lora_name"] == ("TYPE_STRING", [1])
            assert config.parameters["adapters"].string_value == '{"a b": 1}'
"""


def test_tritons_own_reader_agrees_with_ours(
    cluster: Cluster, serve_cpu_sif: Path, workdir: Path, hpc_install: Path
) -> None:
    (workdir / "llmapi").mkdir()
    (workdir / "llmapi" / "model.py").touch()
    for release in vendor.RELEASES:
        vendor.make(workdir / "vendor" / release, release)
    (workdir / "made").mkdir()
    shutil.chown(workdir / "made", "alice", "alice")
    (code,) = hpc_install.glob("lib/python*/site-packages")
    inside = ("apptainer", "-s", "exec", "--bind", str(code), "--env", f"PYTHONPATH={code}", str(serve_cpu_sif))
    shown = cluster.run(
        "alice", *inside, "python3", "-c", PARSED, str(code / "hpc" / "_assets" / "templates" / "triton"), cwd=workdir
    )
    assert len(shown.stdout.split("\n")) == 5 + 5 + 2 + 5 * len(vendor.RELEASES) + 1


def test_adapters_of_a_tensorrt_engine_are_models(
    cluster: Cluster, serve_cpu_sif: Path, workdir: Path, hpc_install: Path
) -> None:
    """Our models, the real Triton and the door; a STUB in TensorRT-LLM's place has room for one adapter."""
    (code,) = hpc_install.glob("lib/python*/site-packages")
    program = workdir / "lora_serving.py"
    program.write_text((CHECKOUT / "tests" / "support" / "lora_serving.py").read_text())
    inside = ("apptainer", "-s", "exec", "--bind", str(code), "--env", f"PYTHONPATH={code}", str(serve_cpu_sif))
    made = workdir / "made"
    shown = cluster.run("alice", *inside, "python3", str(program), str(made), cwd=workdir, timeout=120, check=False)
    assert shown.returncode == 0, shown.stderr + (made / "log").read_text()
    stars, law = "[[[1, 1, 2]]] 24", "[[[7, 0, 2]]] 48"
    assert json.loads(shown.stdout.splitlines()[-1]) == {
        "models": ["tiny", "stars", "law"],
        "said": [
            "alone", f"task 1, sent, {stars}", f"task 1, kept, {stars}", f"task 2, sent, {law}",
            f"task 1, sent, {stars}", [404, "there is no model 'none' here: it is 'tiny' or 'stars' or 'law'"],
        ],
        "wrong": "there is no adapter 'none' in this engine: there are stars, law",
        "empty": "alone",
        "code": 0,
    }  # fmt: skip


CLIENT = """
import json, sys
import openai
url, token, question = sys.argv[1], sys.stdin.read().strip(), sys.argv[2]
client = openai.OpenAI(base_url=url + "/v1", api_key=token, max_retries=0)
asked = dict(model="tiny", messages=[{"role": "user", "content": question}], temperature=0)
found = {"models": [m.id for m in client.models.list()]}
whole = client.chat.completions.create(**asked)
found["whole"] = [whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.total_tokens]
parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
found["stream"] = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
found["usage"] = parts[-1].usage.total_tokens
text = client.completions.create(model="tiny", prompt="x", max_tokens=3, temperature=0)
found["text"] = [text.choices[0].finish_reason, text.usage.completion_tokens]
def error(call):
    try:
        call()
    except openai.APIStatusError as failed:
        return [type(failed).__name__, failed.status_code]
found["errors"] = [
    error(lambda: client.chat.completions.create(**{**asked, "model": "no"})),
    error(lambda: client.chat.completions.create(**asked, n=3)),
    error(lambda: openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0).models.list()),
]
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def openai_python(cluster: Cluster) -> Path:
    """A python with OpenAI's own client."""
    venv = cluster.dir / "openai-venv"
    if not (venv / "bin" / "is-there").exists():
        for argv in (["/usr/bin/python3", "-m", "venv", venv], [venv / "bin" / "pip", "-q", "install", OPENAI]):
            done = subprocess.run(argv, check=False, capture_output=True, text=True, umask=0o022)
            assert done.returncode == 0, done.stdout + done.stderr
        (venv / "bin" / "is-there").touch()
    return venv / "bin" / "python"


def test_openais_own_client(shared: Served, openai_python: Path) -> None:
    shown = shared.project.cluster.run(
        "alice", str(openai_python), "-c", CLIENT, shared.url, QUESTION, input=shared.token, timeout=120
    )
    assert json.loads(shown.stdout) == {
        "models": ["tiny", "first", "second"],
        "whole": [TEXT, "stop", 79],
        "stream": TEXT,
        "usage": 79,
        "text": ["length", 3],
        "errors": [["NotFoundError", 404], ["BadRequestError", 400], ["AuthenticationError", 401]],
    }


def test_a_person_chats_in_the_browser(shared: Served, browser: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="tests-chat-", dir="/home/alice"))
    program = folder / "chatting.py"
    shutil.copy(CHECKOUT / "tests" / "support" / "chatting.py", program)
    for path in (folder, program):
        shutil.chown(path, "alice", "alice")
    shown = shared.project.cluster.run(
        "alice", str(browser), str(program), f"{shared.url}/?token={shared.token}", QUESTION, str(folder), timeout=180
    )
    found = json.loads(shown.stdout)
    for scheme in ("light", "dark"):
        shutil.copy(folder / f"chat-{scheme}.png", shared.project.cluster.dir)  # for docs/
    shutil.rmtree(folder)
    assert (found["address"], found["model"], found["cookie"]) == (f"{shared.url}/", "tiny", "")
    assert (found["said"], found["folded"], found["thought"]) == (re.sub("<think>.*</think>", "", TEXT), True, "음…")
    assert found["note"].startswith("70 tokens")
    assert found["notes"][-1] == "stopped"
    assert (found["turns"], found["fresh"], found["errors"]) == (0, ["new"], [])


def test_the_time_limit_lets_running_requests_finish(neighbour: Neighbour) -> None:
    neighbour.ask_until_it_ends()
    assert neighbour.asking is not None
    attempt = AttemptDir(neighbour.folder / "attempt-1")
    until(attempt.outcome.exists, "bob's has ended", 240)
    ends = said(neighbour.asking)["ends"]
    assert set(ends) == {"whole", "refused"}, ends
    assert ends["whole"] > 4
    # the outcome is written when the end is asked for, and again at the end
    until(lambda: "Triton has ended with exit code 0" in attempt.stdout.read_text(), "Triton ends by itself", 60)
    outcome = json.loads(attempt.outcome.read_text())
    assert outcome["state"] == "TIMEOUT", outcome
    assert [e["phase"] for e in rundir.last_events(attempt.events, 1 << 20)].count("ending") == 1


def test_a_successor_takes_over_before_the_time_limit(lasting: Project) -> None:
    """after:ID+MINUTES is Slurm's own; nobody does anything."""
    folder = lasting.folder / "runs" / "serve-1" / "serve"
    until((folder / "attempt-1" / "outcome.json").exists, "the first has ended", 300)
    assert json.loads((folder / "attempt-1" / "outcome.json").read_text())["state"] == "COMPLETED"
    (row,) = lasting.json("status", "serve-1")["stages"]
    assert (row["state"], row["attempt"], bool(row["endpoint"])) == ("RUNNING", 2, True)
    done = lasting.json("tunnel", "serve-1")
    assert (done["job_id"], done["attempt"]) == (row["job_id"], 2)
    lasting.hpc("cancel", "serve-1")
