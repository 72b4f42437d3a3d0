"""A model behind one door on a node: Triton's API, OpenAI's, and a page to chat with. Reached with `hpc tunnel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hpc.core import division, engines, passport, rundir
from hpc.core.division import KvCache, Quantization
from hpc.core.errors import Refused, UsageError
from hpc.core.stage import Around, Context, Input, Resources, Stage


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Which engine is served, and how."""

    engine: Literal["auto", "tensorrt_llm", "llmapi", "onnxruntime_genai"] = "auto"
    """Set in [build]. The container is `serve-cpu`, `trtllm` or `triton` by that."""
    engine_dir: str | None = None
    """The engine's folder; None: from the stage before (build)."""
    model: str | None = None
    """Set in [build]. For llmapi, which takes the model as it is."""
    tp_size: int = 1
    """Set in [build]."""
    pp_size: int = 1
    """Set in [build]."""
    nodes: int = 0
    """Set in [build]."""
    auto: bool = False
    """Set in [build]."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Set in [build]."""
    quantization: Quantization = "none"
    """Set in [build]."""
    kv_cache: KvCache = "auto"
    """Set in [build]."""
    max_batch_size: int = 64
    """Set in [build]. Requests that are taken at once."""
    max_seq_len: int | None = None
    """Set in [build]. Tokens of prompt and answer together."""
    tokenizer: str = ""
    """The folder with tokenizer.json; empty: the engine's."""
    name: str = "ensemble"
    """The model's name for clients of OpenAI's API."""
    streaming: bool = True
    """Answers come piece by piece. It sets `decoupled` in all models. Off, nothing joins a batch of the CPU engine."""
    stream_interval_ms: int = 32
    """Milliseconds between two pieces: faster tokens share one; 0: a piece for each token. (onnxruntime_genai)"""
    engine_batch_size: int = 0
    """Requests that the engine works on at once; 0: as many as are taken."""
    max_tokens: int = 512
    """Of an answer whose request names none."""
    generation_config: bool = True
    """Requests are drawn as the model's generation_config.json says, where they do not. Off: temperature 1, of all."""
    preprocessing_instances: int = 1
    postprocessing_instances: int = 1
    bls_instances: int = 0
    """0: one; of NVIDIA's own, which answers one request at a time, max_batch_size. Each is a process."""
    queue_delay_us: int = 0
    """Microseconds that a request waits for others to be taken with."""
    queue_size: int = 0
    """Requests that wait, beside those that the engine works on, before new ones are refused; 0: any number."""
    kv_cache_fraction: float = 0.9
    """Of the GPU's free memory; without GPUs, of what engine and server leave of the job's."""
    kv_cache_tokens: int = 0
    """Tokens in the KV cache; 0: by the fraction. Requests for which it has no room wait."""
    attention_window: int = 0
    """Tokens that attention looks back; 0: all. (TensorRT-LLM)"""
    kv_cache_reuse: bool = False
    chunked_context: bool = False
    batching: str = "inflight_fused_batching"
    exclude_input: bool = True
    """Answers hold what is new alone, without the prompt. Off: for Triton's own API; OpenAI's is refused then."""
    vendor_repository: str = ""
    """NVIDIA's own repository (inflight_batcher_llm) in the image, filled instead of ours. (TensorRT-LLM)"""
    private: bool = True
    """Refuse to serve where other users of the machine would reach Triton past the token."""
    ready_s: int = 900
    """Seconds until it must have answered."""
    drain_s: int = 20
    """Seconds that running requests get when the service is ended. Slurm kills it KillWait (30 s) after it asked."""
    successors: int = 0
    """Jobs that take over one after another, each before the time limit of the one before it."""
    handover_min: int = 15
    """Minutes before the limit that the next job may start: it waits in the queue and starts within them."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters that a request may name as its model, as name=/folder. (llmapi; others have them built in.)"""
    lora_cache_fraction: float = 0.05
    """Of the GPU memory that is left beside engine and KV cache, for adapters at work. (tensorrt_llm)"""
    extra: tuple[str, ...] = field(default=())
    """Further values for the repository's templates, as name=value."""


def container(config: ServeConfig) -> str:
    """The environment that has the engine."""
    return {"onnxruntime_genai": "serve-cpu", "llmapi": "triton"}.get(config.engine, "trtllm")


def resources(config: ServeConfig) -> Resources:
    """Where the model's shape is not known: guesses, on GPUs on the safe side of a 7 B model."""
    if config.engine == "onnxruntime_genai":
        return Resources(cpus_per_task=8, mem_gb=16, time_min=240)
    world, nodes = config.tp_size * config.pp_size, max(1, config.nodes)
    return _divided(Resources(cpus_per_task=8, mem_gb=64, time_min=240), world, nodes, config.private)


def _divided(asked: Resources, world: int, nodes: int, private: bool) -> Resources:
    """So many ranks on so many nodes: on one it starts them itself, on several Slurm does, as a task for each GPU."""
    if nodes == 1:
        return replace(asked, gpus_per_node=world)
    each = world // nodes
    return replace(asked, nodes=nodes, gpus_per_node=each, tasks_per_node=each, cpus_per_task=4, exclusive=private)


def size(config: ServeConfig, around: Around) -> tuple[Resources, tuple[str, ...]]:
    """GPUs and notes; Refused or VerificationFailed for what cannot be served here."""
    asked = resources(config)
    needed = "model" if config.engine == "llmapi" else "engine_dir"
    if needed not in around.inputs:
        hint = (
            "set build.model"
            if needed == "model"
            else "put build before serve in pipeline.stages, or set serve.engine_dir"
        )
        raise UsageError(f"serve needs an engine's folder for {config.engine}", hint=hint)
    if config.engine_dir is not None and needed == "engine_dir":
        from hpc.inside import matching

        matching.refuse_early(Path(config.engine_dir), config, around.versions)
    if config.engine == "onnxruntime_genai":
        return _on_cpu(config, asked, around), ()
    if config.engine == "llmapi":
        _refuse_for_llmapi(config)
    notes = engines.judged("serve", config, around)
    world = config.tp_size * config.pp_size
    card = around.card.card if around.card else None
    nodes = division.nodes("serve", card, around.node_gpus, engines.way_of(config), config.nodes)
    if nodes > 1:
        whole = "whole nodes, as its ranks have no network of their own" if config.private else "shared nodes"
        notes = (*notes, f"serve: {nodes} nodes with {world // nodes} ranks each (srun --mpi), {whole}")
    return _divided(asked, world, nodes, config.private), notes


def _on_cpu(config: ServeConfig, asked: Resources, around: Around) -> Resources:
    """With memory for the engine and the cache of some requests; Refused where the user's does not suffice."""
    from hpc.inside import kvbudget

    if config.engine_dir is not None:
        files, each = kvbudget.sizes(Path(config.engine_dir))
    elif around.shape is not None and around.shape.understood:
        files, each = kvbudget.expected(around.shape, config.quantization)
    else:
        return asked
    enough = kvbudget.enough(files, each, config.kv_cache_tokens or engines.LONGEST, config.kv_cache_fraction)
    least, given = kvbudget.least(files), around.given.get("mem_gb")
    if given is not None and given <= least and around.site.scheduler == "slurm" and around.site.mem:
        raise Refused(
            f"serve: {given} GiB of memory do not suffice for an engine of {files / division.GIB:.1f} GiB on the CPU,"
            f" which takes {least:.1f} GiB with its server",
            hint=f'set serve.resources.mem_gb to {enough} or more, or leave it out; an engine of "int4" takes less',
        )
    return replace(asked, mem_gb=max(asked.mem_gb, enough))


def _refuse_for_llmapi(config: ServeConfig) -> None:
    """Refused where a setting asks for what only a built engine has."""
    if config.quantization != "none":
        raise Refused(
            f"llmapi serves the model's files as they are: it can't make them {config.quantization}",
            hint='set build.quantization = "none", and give a model that is quantised already',
        )
    if config.kv_cache == "int8":
        raise Refused("llmapi has no int8 KV cache", hint='set build.kv_cache to "auto" or "fp8"')


def check(config: ServeConfig) -> None:
    """UsageError for what could not work."""
    if config.max_batch_size < 1:
        raise UsageError("serve.max_batch_size must be 1 or more")
    if config.stream_interval_ms < 0:
        raise UsageError("serve.stream_interval_ms must be 0 or more")
    if config.successors < 0 or config.handover_min < 1:
        raise UsageError("serve.successors must be 0 or more, serve.handover_min 1 or more")
    if config.adapters and config.engine not in ("llmapi", "auto"):
        raise UsageError("serve.adapters is for llmapi", hint="the other engines have them built in: build.lora")
    for name, folder in named(config):
        if not name or name == config.name or not Path(folder).is_absolute() or "'" in folder:
            raise UsageError(
                f"serve.adapters: {name}={folder} is not name=/folder", hint="with another name than serve.name"
            )
        if not (Path(folder) / "adapter_config.json").is_file():
            raise UsageError(f"serve.adapters: {folder} holds no LoRA adapter", hint="it needs adapter_config.json")
    for name in ("kv_cache_fraction", "lora_cache_fraction"):
        if not 0 < getattr(config, name) <= 1:
            raise UsageError(f"serve.{name} is more than 0, and 1 at most")
    wrong = [entry for entry in config.extra if "=" not in entry]
    if wrong:
        raise UsageError(f"serve.extra: {wrong[0]!r} is not name=value")
    if config.vendor_repository and config.engine != "tensorrt_llm":
        raise UsageError("serve.vendor_repository is for tensorrt_llm alone")


def named(config: ServeConfig) -> list[tuple[str, str]]:
    """(name, folder) of each adapter."""
    return [(name, folder) for name, _, folder in (entry.partition("=") for entry in config.adapters)]


def lora_config(folders: Sequence[str]) -> str:
    """What TensorRT-LLM's LLM API must know of them: where one lies, how many there are, the highest rank."""
    ranks = [(rundir.read_json(Path(folder) / "adapter_config.json") or {}).get("r", 8) for folder in folders]
    count = len(folders)
    return f"{{lora_dir: ['{folders[0]}'], max_lora_rank: {max(ranks)}, max_loras: {count}, max_cpu_loras: {count}}}"


def _adapters(config: ServeConfig, engine: Path) -> dict[str, dict[str, Any]]:
    """Adapter -> what Triton's model is told. The engines that are built have their adapters' names beside them."""
    from hpc.inside import loras

    if config.engine == "llmapi":
        return {
            name: {"lora_id": number, "lora_name": name, "lora_path": folder}
            for number, (name, folder) in enumerate(named(config), 1)
        }
    known = passport.read(engine).adapters if config.engine == "tensorrt_llm" else loras.names(engine)
    if config.name in known:
        raise UsageError(
            f"the engine has an adapter {config.name}, which is the model's own name", hint="set serve.name"
        )
    return {name: {"lora_name": name} for name in known}


def most(config: ServeConfig) -> int:
    """Requests that are let in at once; 0: any number. The door counts: models take all out of Triton's own queues."""
    return config.queue_size and config.queue_size + (config.engine_batch_size or config.max_batch_size)


def make_repository(config: ServeConfig, engine: Path, folder: Path) -> Path:
    """Fill Triton's model repository at `folder`, checked; the tokenizer's folder. The config is a settled one."""
    from hpc.core.assets import TEMPLATES
    from hpc.inside import kvbudget, lorarrays, repository, vendor

    tokenizer = repository.tokenizer_of(engine, config.tokenizer)
    cache = config.kv_cache_tokens
    if not cache and config.engine == "onnxruntime_genai":
        cache = kvbudget.tokens(engine, config.kv_cache_fraction)
    lora: dict[str, Any] = {}
    if config.engine == "tensorrt_llm":
        built = passport.read(engine)
        config = replace(config, max_seq_len=built.max_seq_len)
        if built.max_lora_rank:
            lorarrays.refuse_vendor(built, config.vendor_repository)
            lora = lorarrays.settings(built, config.lora_cache_fraction)
    settings = repository.Settings(
        triton_max_batch_size=config.max_batch_size,
        decoupled_mode=config.streaming,
        preprocessing_instance_count=config.preprocessing_instances,
        postprocessing_instance_count=config.postprocessing_instances,
        bls_instance_count=config.bls_instances or (config.max_batch_size if config.vendor_repository else 1),
        max_queue_delay_microseconds=config.queue_delay_us,
        max_queue_size=most(config),
        engine_max_batch_size=config.engine_batch_size,
        stream_interval_ms=config.stream_interval_ms,
        max_seq_len=config.max_seq_len or 0,
        default_max_tokens=config.max_tokens,
        exclude_input_in_output=config.exclude_input,
        batching_strategy=config.batching,
        kv_cache_free_gpu_mem_fraction=config.kv_cache_fraction,
        max_tokens_in_paged_kv_cache=cache or None,
        max_attention_window_size=config.attention_window or None,
        enable_kv_cache_reuse=config.kv_cache_reuse,
        enable_chunked_context=config.chunked_context,
        kv_cache_dtype=config.kv_cache,
        dtype=config.dtype,
        enable_lora=bool(config.adapters),
        lora_config=lora_config([folder for _, folder in named(config)]) if config.adapters else "null",
        tensor_parallel_size=config.tp_size,
        pipeline_parallel_size=config.pp_size,
        **lora,
    )
    filling = {
        **repository.values(config.engine, engine, tokenizer, settings),
        **dict(entry.split("=", 1) for entry in config.extra),
    }
    source = Path(config.vendor_repository) if config.vendor_repository else None
    if source is not None:
        filling = vendor.complete(source, filling)
    repository.render(folder, config.engine, TEMPLATES / "triton", filling, source)
    return tokenizer


def run(config: ServeConfig, ctx: Context) -> None:
    import json
    import os
    import sys
    import tempfile
    from dataclasses import asdict

    from hpc.core.assets import TEMPLATES
    from hpc.core.errors import HpcError
    from hpc.inside import alone, following, matching, meeting, models, serving, triton, vendor
    from hpc.inside.service import Server, serve
    from hpc.inside.translating import Served, beginning, recommended

    ranks = meeting.of(ctx.folder, os.environ)
    if not ranks.first:
        return following.follow(ranks, within_s=config.ready_s, wrapped=config.engine == "llmapi")
    if config.private and ranks.world == 1:
        alone.become()
    engine = Path(ctx.inputs["model" if config.engine == "llmapi" else "engine_dir"])
    if config.engine == "llmapi":
        engine = models.local(str(engine), ctx.cache)
    else:
        matching.agree(matching.refuse(engine, ctx), config)
    folder = ctx.folder / "repository"
    tokenizer = make_repository(config, engine, folder)
    target = {"onnxruntime_genai": "ensemble", "tensorrt_llm": "tensorrt_llm_bls", "llmapi": "ensemble"}[config.engine]
    wraps, vendors = config.engine == "llmapi", bool(config.vendor_repository)
    generation = rundir.read_json(engine / "generation_config.json") if config.generation_config else None
    served = Served(
        name=config.name, target=target, max_tokens=config.max_tokens, wraps=wraps, vendors=vendors,
        **(vendor.known(folder, tokenizer) if vendors else {"cumulative": wraps, "begins": beginning(tokenizer)}),
        streams=config.streaming, adapters=_adapters(config, engine),
        echoes=not config.exclude_input and not wraps,
        sampling=recommended(generation or {}, wraps=wraps),
    )  # fmt: skip
    if served.sampling:
        drawn = ", ".join(f"{name} {value:g}" for name, value in served.sampling.items())
        print(f"requests that do not say otherwise are drawn as the model asks: {drawn}", flush=True)

    several = ranks.world > 1
    ranks.tell(repository=str(folder))
    with tempfile.TemporaryDirectory(prefix="hpc-serve-") as own:
        told = serving.Settings(
            repository=str(folder), stage=str(ctx.folder), own=own,
            shm=f"hpc{os.getpid()}_{os.urandom(4).hex()}_",
            page=str(TEMPLATES / "chat.html"), tokenizer=str(tokenizer), served=asdict(served),
            stop_model="" if served.foreign else "tensorrt_llm", bind=ctx.bind, ports={}, most=most(config),
            ready_s=config.ready_s, drain_s=config.drain_s, end_s=15,
            # llmapi starts the ranks of its own node by itself
            world=1 if config.engine == "llmapi" and not several else config.tp_size * config.pp_size,
            meeting=str(ranks.folder) if several else "", wrapped=several and config.engine == "llmapi",
        )  # fmt: skip

        def argv(ports: Mapping[str, int]) -> Sequence[str]:
            path = Path(own) / "settings.json"
            path.write_text(json.dumps({**asdict(told), "ports": ports}))
            return [sys.executable, "-m", "hpc.inside.serving", str(path)]

        try:
            serve(ctx, Server(
                argv=argv, env=lambda token: {serving.TOKEN: token}, health="/health", path="/", ports=STAGE.ports,
                ready_s=config.ready_s + 60, grace_s=config.drain_s + 30, cwd=Path(own),
            ))  # fmt: skip
        except HpcError:
            why = Path(own) / "why"
            if why.exists():
                message, hint = json.loads(why.read_text(encoding="utf-8"))
                raise HpcError(message, hint=hint) from None
            raise
        finally:  # what is left where that process was killed
            ranks.over()
            pid = Path(own) / "pid"
            if pid.exists():
                triton.end_session(int(pid.read_text()))
            triton.sweep(told.shm)


STAGE = Stage(
    name="serve",
    summary="A model behind Triton's API, OpenAI's, and a page to chat with",
    config=ServeConfig,
    container=container,
    consumes={"engine_dir": Input(kind="engine", optional=True), "model": Input(kind="hf_model", optional=True)},
    outputs=lambda config: {},
    resources=resources,
    files=lambda config: tuple(folder for _, folder in named(config)),
    check=check,
    service=True,
    private=True,
    ports=("http", "grpc", "metrics"),
    succession=lambda config: (config.successors, config.handover_min),
    launcher="mpi",
    settings_of="build",
    settle=engines.settle,
    size=size,
    run=run,
)
