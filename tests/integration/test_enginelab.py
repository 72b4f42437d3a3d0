"""The engine lab on a real cluster: by the menu to JupyterLab, its notebook run whole, with the real Triton in it."""

from __future__ import annotations

import json
import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.core.assets import TEMPLATES

from .conftest import CHECKOUT
from .project import Project, jobs
from .serving import QUESTION, TEXT, make_model
from .test_lab import execute, typed_into
from .test_running import Terminal
from .test_service import http
from .tunnels import opened, wish

NAME = "engine-lab.ipynb"
SETTINGS = """\
site = "slurm-test"
[jupyter]
folders = ["model"]
[enginelab]
resources = {{ cpus_per_task = 2, mem_gb = 6, time_min = 60 }}
[environments]
engine-lab = "{image}"
serve-cpu = "{serve_cpu}"
"""
OWN = {
    "parameters": f'MODEL, QUESTION, TOKENS, REQUESTS = "../model/hf", "{QUESTION}", 90, 4',
    "engines": "",
    "serve": """
import json, time
Path("at-work").write_text(json.dumps([server.url, str(server.folder)]))
until = time.monotonic() + 120
while Path("at-work").exists() and time.monotonic() < until:
    time.sleep(0.1)
""",
}
"""A tiny model that knows one answer; and while Triton runs, a pause in which others are let loose on it."""


@pytest.fixture
def lab(project: Project, engine_lab_sif: Path, serve_cpu_sif: Path) -> Project:
    site = project.folder / "sites" / "slurm-test.toml"
    site.write_text(site.read_text() + 'login_host = "login"\n')
    project.write("hpc.toml", SETTINGS.format(image=engine_lab_sif, serve_cpu=serve_cpu_sif))
    make_model(project.cluster, engine_lab_sif, project.folder / "model")
    return project


@pytest.fixture
def menu(lab: Project) -> Iterator[Terminal]:
    yield (shown := Terminal(lab, "menu", env={"TERM": "dumb"}))
    shown.hang_up()


def chosen(menu: Terminal, choice: str) -> None:
    menu.until("Choose: ", 60)
    menu.type(f"{choice}\n")


def test_from_the_menu_to_an_engine_that_answers(lab: Project, menu: Terminal, browser: Path) -> None:
    chosen(menu, "2")
    menu.until("/enginelab is ready on dgx", 240)
    menu.until("ENTER for alice): ")
    menu.type("\n")
    assert f"/lab/tree/{NAME}?token=" in menu.until("A port in use")
    (row,) = lab.states().values()
    run = row["run"]
    pictured(lab, run, browser)

    workspace = lab.folder / "workspace"
    assert (workspace / NAME).read_bytes() == (TEMPLATES / "labs" / NAME).read_bytes()
    copy = workspace / "mine.ipynb"
    lab.cluster.run("alice", "cp", str(workspace / NAME), str(copy))
    typed_into(copy, OWN)
    loose = Loose(lab, workspace / "at-work", row["node"])
    said, _ = execute(lab, run, "mine.ipynb", "enginelab")
    loose.join()
    assert loose.found == {"with the token": "200", "login": "000", "bob": "401", "bob, a wrong token": "401"}
    answers(said)
    assert same(workspace / "lab/repository", workspace / "lab/serve/repository"), "what was shown is what is served"
    assert not list(workspace.glob("lab/serve*/token"))
    assert not [p for p in (workspace / "lab").rglob("*") if p.is_file() and loose.token.encode() in p.read_bytes()]
    running = lab.cluster.run("alice", "ps", "-u", "alice", "-ww", "-o", "args=").stdout
    assert str(workspace / "lab") not in running, "nothing of Triton is left"

    words = shlex.split(said["cluster"].replace("\\\n", " "))
    planned = lab.json("plan", "pipeline", *words[3:])
    assert [s["stage"] for s in planned["stages"]] == ["build", "serve"]
    assert planned["stages"][1]["config"]["max_tokens"] == 90

    chosen(menu, "r")
    menu.until("no run has a stage 'jupyter'")
    chosen(menu, "t")
    menu.until("[y/N] ")
    menu.type("y\n")
    menu.until("/enginelab: reset", 60)
    chosen(menu, "t")
    menu.until("nothing to reset")
    chosen(menu, "x")
    assert menu.end() == 0
    assert jobs(lab) == []
    kept = ("workspace/mine.ipynb", "workspace/lab/build/out/engine/passport.json", "model/hf/config.json")
    assert all((lab.folder / name).is_file() for name in kept)


def pictured(lab: Project, run: str, browser: Path) -> None:
    """The printed address in Chromium on the laptop: it is the notebook."""
    document = lab.json("tunnel", run, *wish())
    picture = lab.folder / "picture.png"
    program = shutil.copy(CHECKOUT / "tests" / "support" / "browser.py", lab.folder)
    with opened(lab.cluster, document["command"]):
        argv = (str(browser), str(program), document["url"], str(picture), "Engine lab")
        shown = lab.cluster.run("alice", *argv, node="laptop", timeout=120)
    assert shown.stdout.startswith("Engine lab")
    shutil.copy(picture, lab.cluster.dir / "engine-lab.png")  # for docs/


class Loose(threading.Thread):
    """While the notebook's Triton runs: who gets in?"""

    def __init__(self, lab: Project, sign: Path, node: str) -> None:
        super().__init__(daemon=True)
        self.found: dict[str, str] = {}
        self.token = "-"
        self._lab, self._sign, self._node = lab, sign, node
        self.start()

    def run(self) -> None:
        until = time.monotonic() + 400
        while not self._sign.exists() or not self._sign.read_text():
            if time.monotonic() > until:
                return
            time.sleep(0.1)
        url, folder = json.loads(self._sign.read_text())
        self.token = (Path(folder) / "token").read_text()
        assert not (Path(folder) / "token").stat().st_mode & 0o077
        for name, user, node, token in (
            ("with the token", "alice", self._node, self.token), ("login", "alice", "login", self.token),
            ("bob", "bob", self._node, None), ("bob, a wrong token", "bob", self._node, "x" * 43),
        ):  # fmt: skip
            self.found[name] = http(self._lab, f"{url}/v2/health/ready", token, user=user, node=node)
        log = (Path(folder) / "attempt-1" / "stdout").read_text()
        inner = log.partition("Started HTTPService at ")[2].split()[0]
        for user in ("alice", "bob"):  # past the door
            if http(self._lab, f"http://{inner}/v2/health/ready", user=user, node=self._node) != "000":
                self.found[f"{user}, Triton itself"] = "reached"
        if self.token in self._lab.cluster.run("bob", "ps", "-eww", "-o", "args", node=self._node).stdout:
            self.found["ps"] = "shows the token"
        self._sign.unlink()


def answers(said: dict[str, str]) -> None:
    """What the cells have printed."""
    assert "model.safetensors" in said["look"]
    assert said["convert"] == "convert: nothing to do, onnxruntime_genai takes the model as it is\n"
    assert "model.onnx" in said["build"]
    assert '"engine": "onnxruntime_genai"' in said["build"]
    assert "ensemble_scheduling" in said["repository"]
    assert 'backend: "python"' in said["config"]
    assert "${" not in said["config"] + said["repository"]
    assert "serve: answers on port" in said["serve"]
    assert said["serve"].count(" READY") == 5
    assert f"<|user|>{QUESTION}<|assistant|>" in said["ask"]
    assert said["ask"].rstrip().endswith(TEXT)
    assert said["stream"] == TEXT
    assert said["openai"].startswith(TEXT)
    for cell, name in (("measure", "whole"), ("quantised", "quantised")):
        lines = [line.split() for line in said[cell].splitlines() if line.startswith(name) and "at once" in line]
        assert [line[1] for line in lines] == ["1", "4"]
        assert all(float(line[-2]) > 0 for line in lines), lines
    assert "Triton has ended with exit code 0" in said["stop"]


def same(one: Path, other: Path) -> bool:
    def files(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in {".pbtxt", ".py"}}

    return bool(files(one)) and files(one) == files(other)
