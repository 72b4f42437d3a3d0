"""A notebook's helper: the stages' own code in a process of its own: checked, shown, stopped, gone on with."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc.core import stage as stages
from hpc.inside import lab
from tests.support import probe, serving

ROOT = Path(lab.__file__).resolve().parents[2]
_FILES = ("train.jsonl", "eval.jsonl", "report.json", "dropped.jsonl")
ROWS = [{"instruction": f"What is wall {i}?", "output": f"Wall {i} is a wall."} for i in range(6)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A notebook's folder with some data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPC_CACHE", raising=False)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


@pytest.mark.train
def test_stage_leaves_what_a_job_leaves(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = lab.run("prepare", data=[Path("data.jsonl")], eval_rows=2, out="lab/prepare")
    assert (done.metrics["train"], done.metrics["eval"]) == (4, 2)
    assert len((Path(done.outputs["dataset"]) / "train.jsonl").read_text().splitlines()) == 4
    manifest = json.loads((here / "lab/prepare/manifest.json").read_text())
    assert manifest["schema"] == "hpc.manifest/1"
    assert manifest["outputs"]["dataset"]["files"].keys() == set(_FILES)
    config = json.loads((here / "lab/prepare/config.json").read_text())
    assert config["config"]["data"] == [str(here / "data.jsonl")]
    assert config["config"]["seed"] == 0, "every default is written out"
    assert (here / "lab/prepare/attempt-1/events.jsonl").exists()
    assert "prepare: done in" in capsys.readouterr().out


@pytest.mark.train
def test_what_is_done_is_not_done_again_and_other_settings_replace_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = lab.run("prepare", data="data.jsonl", out="p")
    assert lab.run("prepare", data="data.jsonl", out="p") == first
    assert "done already in p" in capsys.readouterr().out
    assert not (here / "p/attempt-2").exists()
    assert lab.run("prepare", data="data.jsonl", max_samples=3, out="p").metrics["train"] == 3
    (here / "data.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert lab.run("prepare", data="data.jsonl", max_samples=3, out="p").metrics["train"] == 1
    shutil.rmtree(first.outputs["dataset"])
    assert lab.run("prepare", data="data.jsonl", max_samples=3, out="p").metrics["train"] == 1
    assert (here / "p/attempt-4").exists()


@pytest.mark.parametrize(
    ("stage", "settings", "said", "hint"),
    [
        ("prepar", {}, "there is no stage 'prepar'", "did you mean 'prepare'?"),
        ("prepare", {"dat": ["data.jsonl"]}, "prepare has no setting 'dat'", "did you mean 'data'?"),
        ("prepare", {"data": "data.jsonl", "seed": "x"}, "prepare.seed = 'x' does not fit", "it must be int"),
        ("prepare", {"data": "data.jsonl", "max_samples": True}, "prepare.max_samples = True", "int | None"),
        ("prepare", {"data": "data.jsonl", "format": "csv"}, "prepare.format = 'csv'", "'guanaco'"),
        ("prepare", {"data": "data.jsonl", "languages": ["xx"]}, "'xx' is not known", ""),
        ("prepare", {"data": "date.jsonl"}, "the file 'date.jsonl' is not there", ""),
        pytest.param(
            *("prepare", {"data": "data.jsonl", "eval_rows": 6}, "6 of 6 records are left", "check prepare.languages"),
            marks=pytest.mark.train,
        ),
        ("prepare", {"data": "data.jsonl", "weights": ["x"]}, "prepare.weights = ['x']", "tuple[float, ...]"),
        ("prepare", {}, "prepare.data names no file", "fetch.datasets"),
        ("finetune", {}, "finetune needs a hf_model as 'base_model'", "set finetune.base_model"),
        ("finetune", {"base_model": "nowhere"}, "there is no 'nowhere'", "give a folder"),
        ("jupyter", {}, "jupyter serves", 'lab.start("jupyter", …)'),
    ],
)
def test_what_cannot_work_is_two_sentences(
    here: Path, stage: str, settings: dict[str, object], said: str, hint: str
) -> None:
    with pytest.raises(lab.LabError) as caught:
        lab.run(stage, **settings, out="p")
    assert said in caught.value.message
    assert hint in caught.value.hint
    lines = caught.value._render_traceback_()
    assert lines[0] == f"error: {caught.value.message}"
    assert "Traceback" not in "".join(lines)


def test_folder_with_other_files_is_left_alone(here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine/thesis.txt").write_text("years")
    with pytest.raises(lab.LabError, match="mine holds other files"):
        lab.run("prepare", data="data.jsonl", out="mine")
    assert [p.name for p in (here / "mine").iterdir()] == ["thesis.txt"]


def test_command_says_the_same_with_whole_paths(here: Path) -> None:
    (here / "models").mkdir()
    (here / "models/x.gguf").write_text("")
    finetune = {"base_model": "models/x.gguf", "lora_r": 4, "learning_rate": 1e-3}
    text = lab.command(prepare={"data": ["data.jsonl"]}, finetune=finetune, merge={"ask": "What's a 벽?"})
    assert text.replace(" \\\n    ", " ") == (
        f"hpc submit pipeline --set pipeline.stages=prepare,finetune,merge --set 'prepare.data=[\"{here}/data.jsonl\"]'"
        f" --set 'finetune.base_model=\"{here}/models/x.gguf\"' --set finetune.lora_r=4"
        """ --set finetune.learning_rate=0.001 --set 'merge.ask="What'"'"'s a 벽?"'"""
    )


def test_what_stages_share_is_said_once_under_the_name_that_settings_know(here: Path) -> None:
    (here / "m").mkdir()
    (here / "m/config.json").write_text("{}")
    (here / "m/model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    engine = {"engine": "onnxruntime_genai", "quantization": "int4"}
    text = lab.command(convert={}, build={**engine, "model": "m"}, serve={"max_tokens": 9, "max_batch_size": 2})
    assert text.replace(" \\\n    ", " ") == (
        "hpc submit pipeline --set pipeline.stages=convert,build,serve --set 'build.engine=\"onnxruntime_genai\"'"
        f" --set 'build.quantization=\"int4\"' --set 'build.model=\"{here}/m\"'"
        " --set serve.max_tokens=9 --set build.max_batch_size=2"
    )


def test_stage_that_has_nothing_to_do_says_why(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "m").mkdir()
    done = lab.run("convert", engine="onnxruntime_genai", model="m", out="c")
    assert (done.outputs, done.metrics) == ({}, {})
    assert capsys.readouterr().out == "convert: nothing to do, onnxruntime_genai takes the model as it is\n"
    assert not (here / "c").exists()


@pytest.mark.parametrize("name", stages.available())
def test_defaults_of_every_stage_fit_their_types(name: str) -> None:
    stage = stages.load(name)
    lab._config(stage, {f: v for f, v in vars(stage.config()).items() if v is not None})


# ---- a stage that takes long, in a kernel of its own

CELL = """
import sys
from hpc.inside import lab
try:
    done = lab.run("first", seconds=float(sys.argv[1]), checkpoint=True, out="p")
    print(open(done.outputs["dataset"]).read())
except lab.LabError as error:
    print(error.message, error.hint, sep="; ")
    sys.exit(error.exit_code)
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    for name in ("hpc", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    probe.write_chain(folder / "stages")
    return folder


def kernel(here: Path, packages: Path, seconds: float) -> subprocess.Popen[str]:
    env = {"PYTHONPATH": str(packages), "PATH": "/usr/bin:/bin"}
    return subprocess.Popen(
        [sys.executable, "-c", CELL, str(seconds)], cwd=here, env=env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def until_at_work(here: Path) -> None:
    events = here / "p/attempt-1/events.jsonl"
    deadline = time.monotonic() + 60
    while not (events.exists() and "sleeping" in events.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_interrupted_cell_saves_and_goes_on_where_it_was(here: Path, packages: Path) -> None:
    cell = kernel(here, packages, 600)
    until_at_work(here)
    cell.send_signal(signal.SIGINT)
    out, err = cell.communicate(timeout=60)
    assert cell.returncode == 130, err
    assert "first was stopped; run the cell again" in out
    assert (here / "p/checkpoints/saved").exists()
    other = kernel(here, packages, 0.1)  # other settings: the checkpoint is not theirs
    assert '"resumed": false' in other.communicate(timeout=60)[0]


def test_same_cell_goes_on_from_the_checkpoint(here: Path, packages: Path) -> None:
    cell = kernel(here, packages, 600)
    until_at_work(here)
    cell.send_signal(signal.SIGINT)
    cell.communicate(timeout=60)
    (here / "p/checkpoints" / probe.ENOUGH).touch()
    assert '"resumed": true' in kernel(here, packages, 600).communicate(timeout=60)[0]


def test_stage_ends_with_its_kernel(here: Path, packages: Path) -> None:
    cell = kernel(here, packages, 600)
    until_at_work(here)
    cell.kill()
    cell.communicate()
    deadline = time.monotonic() + 60
    while not (here / "p/checkpoints/saved").exists():  # written at SIGTERM
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- a stage that serves beside the notebook


def served(here: Path, packages: Path, *cells: str) -> subprocess.Popen[str]:
    """A kernel of its own that runs these cells on the service of the tests."""
    serving.write(packages / "stages")
    code = "\n".join(["import json, sys, time", "from hpc.inside import lab", *cells])
    env = {"PYTHONPATH": str(packages), "PATH": "/usr/bin:/bin"}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=here, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


START = 'server = lab.start("door", out="s"{})'


def test_service_is_started_asked_and_ended(here: Path, packages: Path) -> None:
    cells = (
        START.format(""), "first = server.url", START.format(""), "assert server.url == first",
        "print(server.ask('/page'), server.log())",
        "token = open('s/token').read()",
        "server.stop(); server.stop(); print(server)",
        START.format(", ready_s=30.0"),  # other settings: it is started anew, with another token
        "assert open('s/token').read() != token",
        START.format(", ready_s=31.0"),
    )  # fmt: skip
    out, err = served(here, packages, *cells).communicate(timeout=60)
    assert err == ""
    lines = [line.rstrip() for line in out.splitlines() if line and "starting" not in line]
    assert lines[0].startswith("door: answers on port ")
    assert lines[1].startswith("door: runs already, on http://127.0.0.1:")
    assert lines[2].endswith(" door opens")
    assert lines[3] == "door: ended"
    assert lines[4].endswith(", has ended>")
    assert [line.partition(" on ")[0] for line in lines[5:]] == ["door: answers", "door: ended", "door: answers"]
    assert not gone(here / "s/token", here / "s/endpoint.json"), "with the kernel"


def gone(*paths: Path) -> list[Path]:
    """Those that are still there after a while."""
    deadline = time.monotonic() + 60
    while (left := [path for path in paths if path.exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (['lab.start("door", out="s", fail="no room")'], "the service ended before it answered: exit code 1"),
        ([START.format(""), 'server.ask("/die")'], "door does not answer"),
        ([START.format(""), "server._token = 'x'; server.ask('/page')"], "door answered 403 to /page"),
        (['lab.run("door", out="s")'], 'door serves, it does not end lab.start("door", …)'),
        (['lab.start("prepare", data="data.jsonl", out="s")'], 'prepare does not serve lab.run("prepare", …)'),
    ],
)
def test_what_goes_wrong_with_a_service_is_two_sentences(
    here: Path, packages: Path, cells: list[str], said: str
) -> None:
    lines = [f"    {cell}" for cell in cells]
    code = ["try:", *lines, "except lab.LabError as error:", "    print(error.message, error.hint)"]
    out, err = served(here, packages, *code).communicate(timeout=60)
    assert said in out, out + err


def test_service_ends_with_a_kernel_that_is_killed(here: Path, packages: Path) -> None:
    cell = served(here, packages, START.format(""), "print('up', flush=True)", "time.sleep(60)")
    assert cell.stdout is not None
    while "up" not in cell.stdout.readline():
        assert cell.poll() is None
    pid = json.loads((here / "s/endpoint.json").read_text())["pid"]
    cell.kill()
    cell.communicate()
    assert not gone(Path(f"/proc/{pid}"), here / "s/endpoint.json")


def test_interrupted_start_ends_what_was_started(here: Path, packages: Path) -> None:
    cell = served(here, packages, "try:", f"    {START.format(', delay=60.0')}",
                  "except lab.LabError as error: print(error.message)")  # fmt: skip
    events = here / "s/attempt-1/stdout"
    deadline = time.monotonic() + 60
    while not (events.exists() and "door opens" in events.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cell.send_signal(signal.SIGINT)
    out, err = cell.communicate(timeout=60)
    assert "door was stopped" in out, err
