"""
For notebooks: one stage, run as a job runs it, in a child process of the notebook's kernel.

    done = lab.run("prepare", data=["data/train.jsonl"], languages=["en"], out="lab/prepare")
    done.outputs["dataset"], done.metrics["train"]

A stage that serves runs beside the kernel, until it is stopped or the kernel ends:

    server = lab.start("serve", engine_dir=done.outputs["engine"], out="lab/serve")

The folder `out` is like a stage's folder of a run: config.json, the logs in attempt-N/, the outputs in out/ and,
written last, manifest.json. What is done there with the same settings, inputs and code is not done again.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.core import config as configs
from hpc.core import endpoint as endpoints
from hpc.core import rundir, shape
from hpc.core import stage as stages
from hpc.core.assets import PACKAGES
from hpc.core.digest import Digests
from hpc.core.errors import STOPPED, HpcError, Interrupted, UsageError, did_you_mean
from hpc.core.plan import Environment, Plan, Planned, Wish, plan
from hpc.core.rundir import AttemptDir, StageDir
from hpc.core.site import Site
from hpc.core.stage import Stage
from hpc.inside import beside
from hpc.inside.beside import Server
from hpc.inside.notebook import LabError, told
from hpc.inside.service import as_a_child

__all__ = ["Done", "LabError", "Server", "cache", "command", "run", "start"]

_LOOK_S = 0.2
_SAVE_S = 120
"""So long may a stage that is stopped save its work."""
_LINES = 15


@dataclass(frozen=True)
class Done:
    """A stage that has ended well."""

    folder: Path
    outputs: Mapping[str, str]
    """Output name -> absolute path."""
    metrics: Mapping[str, Any]
    """The figures that the stage recorded in its manifest."""


def run(stage: str, *, out: str | Path, **settings: Any) -> Done:
    """Run one stage with these settings (those of hpc.toml; relative paths count from here), and show its progress.

    An input (`base_model`, `dataset`, `adapter`) is a setting of that name. Interrupting the cell stops the stage, and
    the same call again goes on from its last checkpoint. LabError where it cannot work, or fails.
    """
    try:
        found = _plan({stage: settings}, service=False)
        if found.stages:
            return _run(found.stages[0], _folder(out))
        print(*found.notes, sep="\n")  # why there is nothing to do
        return Done(_folder(out).path, {}, {})
    except HpcError as error:
        raise told(error) from None


def start(stage: str, *, out: str | Path, **settings: Any) -> Server:
    """Start a stage that serves, and wait until it answers. One that runs with the same settings is kept.

    Nobody else on the machine gets in. It ends with the kernel, or by `stop()`. LabError where it cannot work, or dies.
    """
    folder = _folder(out)
    try:
        (planned,) = _plan({stage: settings}, service=True).stages
        earlier = _servers.pop(folder.path, None)
        if earlier is not None and earlier.runs and (rundir.read_json(folder.config) or {}).get("key") == planned.key:
            print(f"{stage}: runs already, on {earlier.url}")
        else:
            if earlier is not None:
                earlier.stop()
            earlier = _started(planned, folder)
        return _servers.setdefault(folder.path, earlier)
    except HpcError as error:
        raise told(error) from None


_servers: dict[Path, Server] = {}
"""Of this kernel: folder -> what serves there."""


def command(**settings: Mapping[str, Any]) -> str:
    """The same as one command on the login node: stage=its settings, in the pipeline's order."""
    try:
        planned = _plan(settings).stages
    except HpcError as error:
        raise told(error) from None
    values = {}
    for one in planned:
        whole = configs.encode(one.config)  # with absolute paths
        for name in settings[one.name]:
            owner = one.stage.settings_of if name in one.stage.shared() else one.name
            values[f"{owner}.{name}"] = json.dumps(whole[name], ensure_ascii=False)
    words = [f"pipeline.stages={','.join(settings)}", *(f"{name}={value}" for name, value in values.items())]
    return " \\\n    ".join(["hpc submit pipeline", *(f"--set {shlex.quote(word)}" for word in words)])


def cache() -> Path:
    """The folder for what is made once, such as a converted model: that of the runs, in a job of `hpc`."""
    return Path(os.path.abspath(os.environ.get("HPC_CACHE", ".cache")))


def _folder(out: str | Path) -> StageDir:
    return StageDir(Path(os.path.abspath(out)))


def _plan(settings: Mapping[str, Mapping[str, Any]], *, service: bool | None = None) -> Plan:
    """What a stage shares with another one of these is that one's. `service`: they must be services, or none."""
    loaded = {name: stages.load(name) for name in settings}
    for stage in loaded.values():
        if service is not None and stage.service != service:
            how = f'lab.{"start" if stage.service else "run"}("{stage.name}", …)'
            what = "serves, it does not end" if stage.service else "does not serve"
            raise UsageError(f"{stage.name} {what}", hint=how)
    wishes = [
        Wish(
            stage=loaded[name], config=_config(loaded[name], {**_shared(loaded[name], settings), **given}), overrides={}
        )
        for name, given in settings.items()
    ]
    facts = _Facts()
    try:
        return plan(wishes, list(settings), Site(name="lab", gpus="gpus_per_node"), facts)
    finally:
        facts.digests.save()


def _shared(stage: Stage, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    others = settings.get(stage.settings_of or "", {})
    return {name: value for name, value in others.items() if name in stage.shared()}


class _Facts:
    """The Facts of `hpc.core.plan`, of the kernel's own machine."""

    def __init__(self) -> None:
        self.digests = Digests(cache() / "digests.json", print)

    def path(self, text: str) -> str | None:
        return place if os.path.exists(place := self.place(text)) else None

    def place(self, text: str) -> str:
        return os.path.abspath(os.path.expanduser(text))

    def digest(self, path: str) -> str:
        return self.digests.of(Path(path))

    def document(self, path: str) -> dict[str, Any] | None:
        return rundir.read_json(Path(path) / "config.json")

    def weights(self, path: str) -> int | None:
        return shape.stored(Path(path))

    def environment(self, name: str) -> Environment:
        """The kernel's own, known by what is installed in it."""
        image = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
        installed = {p.name for entry in sys.path for p in Path(entry or ".").glob("*.dist-info")}
        return Environment(
            name=name,
            kind="sif" if image else "venv",
            path=image or sys.prefix,
            digest=configs.key_of(sorted(installed)),
        )

    def source(self, stage: Stage) -> bytes:
        return stages.source(stage)

    def limits(self) -> None:
        return None


def _config(stage: Stage, settings: Mapping[str, Any]) -> Any:
    """The stage's config with these settings, each checked; UsageError names the one that is wrong."""
    hints = typing.get_type_hints(stage.config)
    values = {}
    for name, value in {**stage.chosen(settings), **settings}.items():
        if name not in hints:
            raise UsageError(f"{stage.name} has no setting '{name}'", hint=did_you_mean(name, list(hints)))
        values[name] = _as_typed(value, hints[name])
        if not _fits(values[name], hints[name]):
            raise UsageError(f"{stage.name}.{name} = {value!r} does not fit", hint=f"it must be {_words(hints[name])}")
    try:
        return stage.config(**values)
    except (TypeError, ValueError) as error:  # one is missing, or a __post_init__ refuses
        raise UsageError(f"{stage.name}: {error}") from error


def _as_typed(value: Any, hint: Any) -> Any:
    """A path is a text; a list, or a single text, is a tuple where that is wanted."""
    if isinstance(value, Path):
        value = str(value)
    if typing.get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        texts = typing.get_args(hint)[0] is str
        return tuple(map(str, items) if texts else items) if isinstance(items, list | tuple) else value
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _words(hint: Any) -> str:
    """The type as Python writes it, without its module.

    >>> _words(int), _words(str | None), _words(tuple[str, ...])
    ('int', 'str | None', 'tuple[str, ...]')
    """
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _run(planned: Planned, folder: StageDir) -> Done:
    done = _done(folder, planned.key)
    if done is not None:
        print(f"{planned.name}: done already in {_short(folder.path)}; without that folder it is done again")
        return done
    attempt = _prepare(planned, folder)
    begin = time.monotonic()
    code = _follow(planned.name, folder, attempt)
    if code == STOPPED:
        raise Interrupted(f"{planned.name} was stopped", hint="run the cell again: it goes on from its last checkpoint")
    if code:
        raise _failure(planned.name, code, attempt)
    print(f"\r{planned.name}: done in {time.monotonic() - begin:.0f} s".ljust(_WIDTH))
    done = _done(folder, planned.key)
    assert done is not None, "the runner writes the manifest before it leaves with 0"
    return done


def _started(planned: Planned, folder: StageDir) -> Server:
    attempt = _prepare(planned, folder)
    endpoints.clear(folder)  # a kernel that was killed may have left it
    with beside.sockets_for(planned.stage.ports if planned.stage.private else ()) as sockets:
        process = _process(planned.name, folder, attempt, tuple(sockets.values()), beside.environment(sockets))
    return beside.until_ready(
        planned.name, folder, attempt, process, lambda code: _failure(planned.name, code, attempt)
    )


def _prepare(planned: Planned, folder: StageDir) -> AttemptDir:
    """The stage's folder as its runner wants it."""
    _clear(folder, planned.key)
    inputs = {s.name: {"kind": s.kind, "path": s.value, "key": s.key, "stage": None} for s in planned.sources}
    number = 1 + sum(1 for _ in folder.path.glob("attempt-*"))
    attempt = folder.attempt(number)
    attempt.path.mkdir(parents=True)
    rundir.write_json(folder.config, planned.document(inputs=inputs, out=folder.out, cache=cache()))
    return attempt


def _done(folder: StageDir, key: str) -> Done | None:
    """What is there, where it was made by just this, and is whole."""
    manifest = rundir.read_json(folder.manifest) or {}
    outputs = {name: str(output["path"]) for name, output in manifest.get("outputs", {}).items()}
    if manifest.get("key") != key or not all(map(os.path.exists, outputs.values())):
        return None
    return Done(folder.path, outputs, manifest["metrics"])


def _clear(folder: StageDir, key: str) -> None:
    """Take away what other settings left there: their checkpoints must not be gone on from."""
    earlier = rundir.read_json(folder.config)
    if earlier is None:
        if folder.path.exists() and any(folder.path.iterdir()):
            raise UsageError(f"{_short(folder.path)} holds other files", hint="give a new folder as `out`")
        return
    folder.manifest.unlink(missing_ok=True)
    if earlier.get("key") != key:
        for path in (folder.out, folder.checkpoints):
            shutil.rmtree(path, ignore_errors=True)


_WIDTH = 78


def _follow(name: str, folder: StageDir, attempt: AttemptDir) -> int:
    """The stage in its own process, until it has ended; its exit code. An interrupt lets it save its work."""
    process = _process(name, folder, attempt)
    try:
        _show(name, process, attempt)
    except KeyboardInterrupt:
        print(f"\r{name}: stopping".ljust(_WIDTH))
        process.terminate()
        process.wait(_SAVE_S)
        return STOPPED
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return process.returncode


def _process(
    name: str, folder: StageDir, attempt: AttemptDir, sockets: Sequence[int] = (), own: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "hpc.inside.runner", name, str(folder.config), str(attempt.path)]
    env = {**os.environ, "PYTHONPATH": str(PACKAGES), "PYTHONUNBUFFERED": "1", **(own or {})}
    env.pop("MPLBACKEND", None)  # the kernel's own
    with open(attempt.stdout, "wb") as out, open(attempt.stderr, "wb") as err:
        # a session of its own: the interrupt of a cell goes to the kernel's whole process group
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=env,
            start_new_session=True,
            preexec_fn=as_a_child,
            pass_fds=sockets,
        )


def _show(name: str, process: subprocess.Popen[bytes], attempt: AttemptDir) -> None:
    """One line that moves, for as long as the process runs."""
    shown = ""
    while process.poll() is None:
        latest = next((e for e in reversed(rundir.last_events(attempt.events)) if e.get("total")), None)
        if latest is not None:
            loss = f", loss {latest['loss']:.3f}" if "loss" in latest else ""
            line = f"{name}: {latest['done'] / latest['total']:4.0%}  {latest.get('message', '')}{loss}"
            if line != shown:
                print("\r" + line[:_WIDTH].ljust(_WIDTH), end="", flush=True)
                shown = line
        time.sleep(_LOOK_S)


def _failure(name: str, code: int, attempt: AttemptDir) -> HpcError:
    print("\r".ljust(_WIDTH))
    said = rundir.read_json(attempt.error)
    if said is None or said["exit_code"] == 1:
        print("\n".join(rundir.tail(attempt.stderr)[-_LINES:]))
    if said is not None:
        error = HpcError(said["cause"], hint=said["hint"])
        error.exit_code = said["exit_code"]
        return error
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = "it may have needed more memory than the job has" if code == -signal.SIGKILL else ""
    return HpcError(f"{name} {how}", hint=hint or f"its whole log is in {_short(attempt.path)}")


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
