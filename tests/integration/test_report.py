"""The page of `hpc report` in a real browser: drawn, nothing blocked, nothing fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from hpc.login.page import render
from hpc.login.report import Attempt, Report, StageReport

from .cluster import Cluster
from .conftest import CHECKOUT

HOSTILE = "<script>fetch('http://login/')</script><img src='http://login/x.png' onerror='alert(1)'>안녕"


def test_the_page_in_a_browser(cluster: Cluster, browser: Path, workdir: Path) -> None:
    sides = {"base": {"figures": {"held-out loss": 2.0}}, "tuned": {"figures": {"held-out loss": 3.0}}}
    answers = [{"prompt": HOSTILE, "reference": None, "base": HOSTILE, "tuned": HOSTILE}]
    stage = StageReport(
        name="finetune", state="COMPLETED", reason=HOSTILE, job_id="7", node="dgx01", after=(), submitted=1.0,
        reused="",
        attempts=[Attempt(number=1, state="COMPLETED", cause="", host="dgx01", started=2.0, ended=9.0)],
        gpus=1, nodes=1, gpu_hours=1.0, node_hours=1.0, settings={"data": HOSTILE}, environment="train", digest="0",
        versions={}, metrics={}, outputs={}, curves={"loss": [(1.0, 3.0), (2.0, 2.0)]},
        evaluation={"schema": "hpc.evaluation/1", **sides, "answers": answers},
    )  # fmt: skip
    report = Report(
        run="pipeline-1", project="p", site="s", created=1.0, made=10.0, problem="", commit="", stages=[stage]
    )
    page = workdir / "report.html"
    page.write_text(render(report))
    program = shutil.copy(CHECKOUT / "tests" / "support" / "looking.py", workdir)
    shown = json.loads(cluster.run("alice", str(browser), str(program), str(page), node="laptop", timeout=60).stdout)
    assert shown["title"] == "pipeline-1 — hpc report"
    assert shown["said"] == []
    assert shown["asked"] == [f"file://{page}"]
    assert len(shown["heights"]) == 2
    assert min(shown["heights"]) > 20
