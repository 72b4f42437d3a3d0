"""
fetch: models and data sets from the hub, a URL or a path -> folders of the run, each file checked.

What is fetched stays in the cache of the runs, by its content: the next run finds it there, and many jobs that want
the same fetch it once. A broken download goes on where it broke off. Models become safetensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpc.core.errors import UsageError
from hpc.core.stage import Artifact, Context, Input, Resources, Stage
from hpc.inside import families

_PATHS = ("/", ".", "~")
"""So begins a path; a name on the hub does not."""


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """What to get."""

    model: str | None = None
    """A name on the hub (organisation/name[@revision]), the URL of a GGUF file or of a .tar of a model's folder, or a
    path: a model's folder, a GGUF file, or a folder as Meta gives it."""
    datasets: tuple[str, ...] = ()
    """Names on the hub, URLs of files (with #sha256=… where it is known), or paths that begin with / or a dot."""
    dataset_files: tuple[str, ...] = ()
    """Patterns of the files to take of data sets on the hub; empty: every file that prepare can read."""
    pickles: tuple[str, ...] = ()
    """Names of weight files that are pickles, and are trusted: they are read as tensors alone, and converted."""
    family: families.Family = "own"
    """Chat template to put beside a model that has none, as Meta's own files have not: llama-2, llama-3, …"""
    hub_home: str | None = None
    """Folder of the hub's own files, with the `token` of `hf auth login`; None: HF_TOKEN, or HF_HOME."""


def resources(config: FetchConfig) -> Resources:
    """No GPU; memory for one file of a model that is converted."""
    return Resources(cpus_per_task=4, mem_gb=24, time_min=480)


def outputs(config: FetchConfig) -> dict[str, Artifact]:
    made = {"model": Artifact(kind="hf_model", path="model")} if config.model is not None else {}
    return {**made, "data": Artifact(kind="records", path="data")} if config.datasets else made


def files(config: FetchConfig) -> tuple[str, ...]:
    return tuple(given for given in config.datasets if given.startswith(_PATHS))


def folders(config: FetchConfig) -> tuple[str, ...]:
    return (config.hub_home,) if config.hub_home is not None else ()


def unneeded(config: FetchConfig) -> str:
    return "" if config.model is not None or config.datasets else "no fetch.model and no fetch.datasets is named"


def check(config: FetchConfig) -> None:
    """UsageError for what can't be a source. Standard library."""
    from hpc.inside import fetching

    names = [given.partition("#")[0].partition("@")[0].rstrip("/").rpartition("/")[2] for given in config.datasets]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"fetch.datasets names two data sets '{name}'", hint="fetch one, or rename a file of yours"
            )
    for given in (*config.datasets, *([config.model] if config.model is not None else [])):
        if fetching.is_url(given):
            fetching.url_of(given)
        elif given.count("/") != 1 and not given.startswith(_PATHS):
            raise UsageError(
                f"fetch: '{given}' is neither a name on the hub, nor a URL, nor a path",
                hint="organisation/name, https://…, or a path that begins with / or ./",
            )


def run(config: FetchConfig, ctx: Context) -> None:
    """Get everything; without an output where the scheduler asked to stop."""
    from hpc.inside import fetching, models

    models.settle()
    fetcher = fetching.Fetcher(ctx, config.hub_home, config.pickles, config.family)
    try:
        if config.datasets:
            with models.written_whole(ctx.outputs["data"]) as part:
                got = [fetcher.dataset(given, config.dataset_files, part) for given in config.datasets]
            ctx.metric(datasets=got)
        if config.model is not None:
            ctx.metric(model=fetcher.model(ctx.inputs.get("model", config.model), ctx.outputs["model"]))
    except fetching.StoppedError:
        return
    ctx.progress(1, 1, "everything is there")


STAGE = Stage(
    name="fetch",
    summary="Get models and data sets from the hub, a URL or a path, and check them",
    config=FetchConfig,
    container="train",
    network=True,
    consumes={"model": Input(kind="hf_model", optional=True)},
    outputs=outputs,
    resources=resources,
    run=run,
    files=files,
    folders=folders,
    check=check,
    unneeded=unneeded,
)
