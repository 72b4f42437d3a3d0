"""hpc report: what a run's files say, on one page that runs and fetches nothing."""

from __future__ import annotations

import json
import os
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hpc.core import rundir
from hpc.core.rundir import RunDir
from hpc.login import figures, states
from hpc.login.cli import main
from hpc.login.page import render
from hpc.login.report import collect
from hpc.login.stream import Sample

NOW = 1_700_000_000
HOSTILE = "<script>alert(1)</script><img src=http://evil/x onerror=alert(1)>\"'&안녕"
TOKEN = "secret-token-of-the-service"


class Page(HTMLParser):
    """Its tags, its attributes and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, str] = {}
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.update({name: value or "" for name, value in attrs})

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run: trained after a requeue, evaluated as worse, and a stage that was never submitted."""
    (tmp_path / "hpc.toml").write_text('site = "local"\nruns = "runs"\n')
    monkeypatch.chdir(tmp_path)
    run = RunDir(tmp_path / "runs" / "pipeline-1")
    names = ("finetune", "evaluate", "serve")
    keys = {name: f"key-{name}" for name in names}
    for name in names[:2]:
        folder = run.stage(name)
        folder.attempt(1).path.mkdir(parents=True)
        after = ["finetune"] if name == "evaluate" else []
        job = {"attempt": 1, "status": "submitted", "scheduler": "local", "submitted": NOW, "after": after}
        rundir.write_json(folder.job, {**job, "job_id": "7", "comment": "c"})
        ended = {"state": "COMPLETED", "started": NOW + 60, "ended": NOW + 3660, "host": "dgx01", "cause": ""}
        rundir.write_json(folder.attempt(1).outcome, ended)
        config = {"lora_r": 16, "method": "lora"} if name == "finetune" else {}
        rundir.write_json(folder.config, {"config": config, "resources": {"nodes": 2, "gpus_per_node": 4}})
        out = folder.out / "report.json"
        manifest: dict[str, Any] = {"key": keys[name], "versions": {"torch": "2.13.0"}, "metrics": {"steps": 3}}
        rundir.write_json(
            folder.manifest, {**manifest, "outputs": {"report": {"path": str(out), "files": {"": "abc"}}}}
        )
    training = run.stage("finetune")
    lost = {"state": "TIMEOUT", "started": NOW + 10, "ended": NOW + 40, "host": "dgx02", "cause": HOSTILE}
    rundir.write_json(training.attempt(1).path / "outcome-0.json", lost)
    (training.path / "training").mkdir()
    lines = [{"step": n, "loss": 3 - n / 10, "learning_rate": 1e-4} for n in range(1, 9)]
    lines += [{"step": 4, "eval_loss": 2.5}, {"step": 9, "loss": float("nan")}]
    (training.path / "training" / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines) + '{"step": 1')
    evaluate = run.stage("evaluate").out
    evaluate.mkdir()
    answer = {"prompt": HOSTILE, "reference": None, "base": "B", "tuned": f"{HOSTILE} {TOKEN}"}
    sides = {"base": {"figures": {"held-out loss": 2.0}}, "tuned": {"figures": {"held-out loss": 3.0}}}
    rundir.write_json(evaluate / "report.json", {"schema": "hpc.evaluation/1", **sides, "answers": [answer]})
    run.stage("serve").path.mkdir()
    run.stage("serve").token.write_text(TOKEN)
    samples = [Sample(0, began=1, ended=3, times=[1.5, 2, 3], tokens=3), Sample(0, began=1, ended=2, error=HOSTILE)]
    level = {"loop": "closed", "concurrency": 8, "rate": None, **figures.summary(samples, {})}
    measured = {"questions": 1, "max_tokens": 5, "exact": False, "endpoints": [{"name": HOSTILE, "levels": [level]}]}
    rundir.write_json(run.stage("serve").bench, {"schema": "hpc.bench/1", "at": NOW, **measured})
    asked = {"uid": os.getuid(), "keys": keys, "created": NOW, "project": str(tmp_path), "site": "local"}
    rundir.write_json(run.run, asked)
    return run


def test_the_page_is_written_for_its_owner_alone(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 0
    assert capsys.readouterr().out.strip() == str(run.report)
    assert stat.S_IMODE(run.report.stat().st_mode) == 0o600
    page = Page(run.report.read_text())
    for words in ("WORSE than its base", "finetune.lora_r", "torch 2.13.0", "NOT_SUBMITTED", "TIMEOUT", "c=8"):
        assert words in page.text
    # (30 s + 1 h) on 8 GPUs, and 1 h on 8 GPUs
    assert "16.07 GPU hours, 4.02 node hours; 1 of 3 attempts did not complete" in page.text
    assert page.tags.count("svg") == 3, "times, curves and the benchmark"


def test_hostile_text_stays_text_and_a_token_never_shows(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "pipeline-1", "-o", "-"]) == 0
    text = capsys.readouterr().out
    page = Page(text)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not {"src", "href", "onerror"} & set(page.attributes)
    assert HOSTILE in page.text
    assert TOKEN not in text
    assert "default-src 'none'" in page.attributes["content"] or "default-src 'none'" in text
    assert main(["report", "--json"]) == 0
    shown = capsys.readouterr().out
    assert TOKEN not in shown
    document = json.loads(shown)
    assert document["schema"] == "hpc.report/1"
    assert document["verdict"].startswith("WORSE")
    training = document["stages"][0]
    assert training["settings"] == {"lora_r": 16}
    assert len(training["curves"]["loss"]) == 8, "what is no number is left out, and so is a line cut off"
    assert [a["state"] for a in training["attempts"]] == ["TIMEOUT", "COMPLETED"]


def test_what_is_not_known_is_left_out(run: RunDir) -> None:
    asked = {**(rundir.read_json(run.run) or {}), "keys": {"serve": "key-serve"}}
    run.stage("serve").bench.unlink()
    rows = states.states([(run, asked)], states.Scheduler())
    page = Page(render(collect(run, asked, rows, "squeue: unable to contact slurm controller")))
    assert "unable to contact" in page.text
    assert "svg" not in page.tags
    for heading in ("Evaluation", "Ledger", "loss", "Settings", "benchmark"):
        assert heading not in page.text


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["report", "pipeline-9"], 7), (["report", "--json", "-o", "x"], 2), (["report", "-o", "/tmp"], 2)],
)
def test_what_cannot_be_reported(run: RunDir, argv: list[str], code: int) -> None:
    assert main(argv) == code


def test_the_file_that_a_link_leads_to_is_written(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to("page.html")
    assert main(["report", "-o", str(tmp_path / "link.html")]) == 0
    assert (tmp_path / "link.html").is_symlink()
    assert "pipeline-1" in (tmp_path / "page.html").read_text()


def test_run_of_somebody_else_is_said_to_be(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    rundir.write_json(run.run, {**(rundir.read_json(run.run) or {}), "uid": os.getuid() + 1})
    assert main(["report", "pipeline-1"]) == 7
    assert "pipeline-1 is another user's run" in capsys.readouterr().err
