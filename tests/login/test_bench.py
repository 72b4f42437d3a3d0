"""`hpc bench` against a stub of the door whose times are known, and its figures and drawing by hand-made samples."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from hpc.core.errors import UsageError
from hpc.login import cli, figures, load, plot, prompts
from hpc.login.question import Sampling
from hpc.login.stream import Sample
from tests.support.door import Reply, chunk, stream

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("own_state")


def bench(*arguments: str) -> int:
    return cli.main(["bench", *arguments])


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["schema"] == "hpc.bench/1"
    return found


def test_times_are_those_of_the_service(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = stream([f"w{n} " for n in range(10)], reason="length")
    # those of the second level are answered once all of them are there: at once means so
    one = stub(lambda path, body: Reply(words, delay=0.02, together=3 + 8 + 8 if len(one.asked) > 3 + 8 else 0))
    assert bench("--url", one.url, "-c", "1,8", "--requests", "8", "--exact", "--max-tokens", "10", "--json") == 0
    found = document(capsys)
    (endpoint,) = found["endpoints"]
    assert [(v["loop"], v["concurrency"], v["answered"]) for v in endpoint["levels"]] == [
        ("closed", 1, 8), ("closed", 8, 8),
    ]  # fmt: skip
    for level in endpoint["levels"]:
        assert (level["tokens"], level["prompt_tokens"], level["tokens_counted"]) == (80, 40, "by the server")
        assert 19 <= level["ttft_ms"]["p50"] <= 1000  # the machine may be busy; it is never too early
        # a first token that was late is nearer to the last one, which comes no sooner than it is sent
        assert (195 - level["ttft_ms"]["max"]) / 9 <= level["itl_ms"]["p50"] <= 200
        assert 195 <= level["e2e_ms"]["p50"] <= 2000
        assert level["tokens_per_s"] == pytest.approx(level["tokens"] / level["seconds"], rel=0.01)
    asked = [body for path, body in one.asked if path == "/v1/chat/completions"]
    assert len(asked) == 3 + 8 + 8  # those to warm up
    assert all((b["temperature"], b["max_tokens"], b["min_tokens"], b["stream"]) == (0, 10, 10, True) for b in asked)
    assert [b["messages"][0]["content"] for b in asked[3:7]] == list(prompts.OWN[:4])


def test_open_loop_asks_whatever_was_answered(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one = stub(Reply(stream(["a"] * 10), delay=0.05))
    assert bench("--url", one.url, "--rate", "20", "--requests", "20", "--warmup", "0", "--json") == 0
    (level,) = document(capsys)["endpoints"][0]["levels"]
    assert (level["loop"], level["rate"], level["answered"]) == ("open", 20.0, 20)
    assert level["seconds"] < 8  # one after the other it would take ten
    assert level["client_late_ms"] >= 0


def test_arrivals_are_a_poisson_process_and_the_same_for_a_seed() -> None:
    first = list(itertools.islice(load.arrivals(10, 1), 20_000))
    assert first == list(itertools.islice(load.arrivals(10, 1), 20_000))
    assert first[:3] != list(itertools.islice(load.arrivals(10, 2), 3))
    gaps = [b - a for a, b in itertools.pairwise(first)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.1, rel=0.03)
    spread = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert spread**0.5 == pytest.approx(mean, rel=0.03)  # an exponential's


def test_errors_are_counted_and_shown(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = itertools.count()
    kinds = [
        Reply(stream(["a", "b"])),
        Reply(status=503, body={"error": {"message": "full"}}),
        Reply([chunk("a"), json.dumps({"error": {"message": "broke"}})]),
        Reply(stream(["a", "b"]), cut_after=1),
    ]
    one = stub(lambda path, body: kinds[next(numbers) % 4])
    assert bench("--url", one.url, "-c", "1", "--requests", "8", "--warmup", "0", "--json") == 0
    (level,) = document(capsys)["endpoints"][0]["levels"]
    assert (level["requests"], level["answered"], level["tokens"]) == (8, 2, 4)
    assert level["errors"] == {"503: full": 2, "broke": 2, "cut off in the middle of the answer": 2}
    assert bench("--url", one.url, "-c", "2", "--requests", "8", "--warmup", "0") == 0
    assert "2 × broke" in capsys.readouterr().out


@pytest.mark.parametrize(
    "reply",
    [Reply(status=500, body={"error": "x"}), Reply(stream([])), Reply([chunk("a")], cut_after=1)],
)
def test_no_token_at_all_is_a_failure(stub: Any, reply: Reply, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--url", stub(reply).url, "-c", "1", "--requests", "2") == 1
    out, err = capsys.readouterr()
    assert "without a single token" in err
    assert "c=1   0 " in out


def test_two_side_by_side_with_a_plot(
    stub: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def other(path: str, body: dict[str, Any]) -> Reply:
        same = body["messages"][0]["content"] in prompts.OWN[:4]
        return Reply(stream(["한글", "ab" if same else "aX"]))

    one, two = stub(Reply(stream(["한글", "ab"]))), stub(other)
    file = tmp_path / "plot.svg"
    options = (
        "-c",
        "1,2,4",
        "--requests",
        "16",
        "--names",
        "fp32,int4",
        "--slo",
        "ttft=500,itl=500",
        "--plot",
        str(file),
    )
    assert bench("--url", one.url, "--url", two.url, *options) == 0
    out = capsys.readouterr().out
    assert "25% are equal, and 81% of an answer's letters" in out
    assert "(100%)" in out
    drawn = ET.parse(file).getroot()
    texts = ["".join(t.itertext()) for t in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"fp32", "int4", "Time to first token (ms)", "Throughput (tokens/s)", "requests at once"} <= set(texts)
    assert "href" not in file.read_text()
    assert "<script" not in file.read_text()
    assert bench("--url", one.url, "-c", "1", "--requests", "2", "--plot", "-") == 0
    out, err = capsys.readouterr()
    assert ET.fromstring(out).tag.endswith("svg")
    assert "TOKENS/S" in err


def test_idle_connection_that_the_service_has_closed_is_no_error(
    stub: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = stub(Reply(stream(["a"]), close=True))
    assert bench("--url", one.url, "-c", "2", "--requests", "6", "--json") == 0
    (level,) = document(capsys)["endpoints"][0]["levels"]
    assert (level["answered"], level["errors"]) == (6, {})


def test_ctrl_c_shows_what_is_done(stub: Any) -> None:
    # the second level is still at work whenever it is looked at
    one = stub(lambda path, body: Reply(stream(["a"] * 5), delay=0.05 if len(one.asked) <= 4 else 60))
    argv = [sys.executable, "-m", "hpc", "bench", "--url", one.url, "-c", "2,1", "--requests", "4", "--warmup", "0"]
    pipe, env = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        assert process.stderr is not None
        assert any("c=1:" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=50)
    assert process.returncode == 130
    assert re.search(r"c=2 +4 +0 ", out)
    assert "c=1 " not in out
    assert "the benchmark was stopped" in err
    assert "Traceback" not in err


def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["-c", "0"], ["-c", "x"], ["-c", "1", "--rate", "2"], ["--requests", "0"], ["--rate", "-1"],
        ["--requests", "1", "--duration", "1"], ["--slo", "ttft"], ["--slo", "x=1"], ["--plot", "x.png"],
        ["--plot", "none/x.svg"],
        ["--plot", "-", "--json"], ["--warmup", "-1"], ["--url", "http://localhost:1", "serve-1"],
    ):  # fmt: skip
        assert bench(*words) == 2, words
    capsys.readouterr()


# ---- figures


def sample(ttft: float, itl: float, tokens: int, **more: Any) -> Sample:
    times = [10 + ttft + n * itl for n in range(tokens)]
    return Sample(0, began=10.0, times=times, ended=times[-1] + 0.001, text="x", reason="stop", tokens=tokens, **more)


def test_figures_of_known_samples() -> None:
    samples = [sample(0.1 * n, 0.01, 11) for n in (1, 2, 3, 4)]
    found = figures.summary(samples, {"ttft": 250, "itl": 20})
    assert found["ttft_ms"]["p50"] == pytest.approx(250)
    assert found["ttft_ms"]["p90"] == pytest.approx(370)
    assert found["itl_ms"]["p99"] == pytest.approx(10)
    assert found["gap_ms"]["max"] == pytest.approx(10)
    assert found["e2e_ms"]["max"] == pytest.approx(500)
    assert found["tokens"] == 44
    assert found["seconds"] == pytest.approx(0.501)
    assert found["goodput"] == {"share": 0.5, "requests_per_s": pytest.approx(2 / 0.501, abs=0.001)}


def test_pieces_that_hold_several_tokens_do_not_stretch_the_time_between_tokens() -> None:
    one = Sample(0, began=0, times=[1.0, 2.0], ended=2.0, text="x", reason="stop", tokens=11)
    assert figures.of_one(one)["itl"] == pytest.approx(100)
    one.tokens = None
    assert figures.of_one(one)["itl"] == pytest.approx(1000)


def test_plot_of_one_level_and_of_a_level_without_answers() -> None:
    level = {"loop": "open", "concurrency": None, "rate": 2.0, **figures.summary([sample(0.1, 0.01, 5)], {})}
    silent = {**level, **figures.summary([Sample(0, began=1, ended=2, error="x")], {})}
    common = {"questions": 1, "max_tokens": 5, "exact": False}
    for levels in ([level], [silent], [silent, {**level, "rate": 4.0}]):
        ET.fromstring(plot.draw({"endpoints": [{"name": "<a&b>", "levels": levels}], **common}))


# ---- questions


def test_questions_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "questions"
    rows = [
        "a plain line", "", '{"prompt": "p"}', '"quoted"', '{"instruction": "i"}',
        '{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "known"}]}',
    ]  # fmt: skip
    file.write_text("\n".join(rows))
    found = prompts.questions(str(file), Sampling(), raw=False)
    assert [q.messages[-1]["content"] for q in found] == ["a plain line", "p", "quoted", "i", "u"]
    assert prompts.questions(str(file), Sampling(), raw=True)[0].text == "a plain line"
    for wrong in ("", '{"x": 1}', '{"messages": []}', "{"):
        file.write_text(wrong)
        with pytest.raises(UsageError):
            prompts.questions(str(file), Sampling(), raw=False)
