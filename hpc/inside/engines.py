"""
Inside the image: the programs that make engines, run with the argv of `hpc.core.trtllm`, and what they made checked.

TensorRT-LLM is never imported here: it is asked for its version, and its programs for their flags.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import IO, Any

from hpc.core import division, engines, passport, rundir, shape, trtllm
from hpc.core.errors import HpcError, VerificationFailed
from hpc.core.passport import Passport
from hpc.core.stage import Context
from hpc.inside import conversations, lorarrays, loras, meeting, models, onnxgraph

RECORD = "hpc.json"
"""In a folder of checkpoints: which model it is of."""
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken",
    "chat_template*", "generation_config.json",
)  # fmt: skip
_EVERY_S = 0.5


def onnx(config: Any, ctx: Context, part: Path) -> None:
    """The engine of onnxruntime-genai, by its model builder, with the model's tokenizer."""
    document = _document(ctx)
    model = models.local(ctx.inputs["model"], ctx.cache)
    plain = _config(model)
    precision = "int4" if config.quantization == "int4" else "fp32"
    work = ctx.cache / "onnx" / f"{os.uname().nodename}-{os.getpid()}"
    chosen = loras.named(config.lora)
    # the output matrix is needed for the last token alone; an adapter changes q, k and v each for itself
    options = ("prune_lm_head=true", *(("disable_qkv_fusion=true",) if chosen else ()))
    argv = (sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(part),
            "-p", precision, "-e", "cpu", "-c", str(work), "--extra_options", *options)  # fmt: skip
    ctx.progress(0, 1, "building")
    try:
        run_program(argv, ctx, cwd=part.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    made = rundir.read_json(part / "genai_config.json")
    if made is None or not (part / "model.onnx").is_file():
        raise VerificationFailed(f"the builder ended well, but {part.name} has no model.onnx and genai_config.json")
    onnxgraph.refuse(part / "model.onnx")
    if chosen:
        loras.add(part, chosen)
    _copy_tokenizer(model, part)
    positions = int(made.get("model", {}).get("context_length") or plain.get("max_position_embeddings") or 2048)
    longest = min(config.max_seq_len or positions, positions)
    _finish(part, Passport(
        engine="onnxruntime_genai",
        model=document["inputs"]["model"]["key"],
        architecture=_architecture(plain),
        image=document["environment"]["digest"],
        versions=_versions("onnxruntime-genai", "onnxruntime"),
        dtype="float32",
        quantization=config.quantization,
        max_batch_size=config.max_batch_size,
        max_input_len=min(config.max_input_len or longest, longest),
        max_seq_len=longest,
    ), ctx)  # fmt: skip


def checkpoints(config: Any, ctx: Context, part: Path) -> None:
    """TensorRT-LLM checkpoints, one per rank, by convert_checkpoint.py or quantize.py of the image."""
    document = _document(ctx)
    version = _version()
    known = trtllm.release(version)
    model = models.local(ctx.inputs["model"], ctx.cache)
    plain = _config(model)
    found = shape.read(plain)
    if found is not None:  # what planning could not see of a model that was still to be made
        division.judge("convert", "build", found, None, None, engines.way_of(config))
    calibration = None
    if trtllm.calibrated(config.quantization, config.kv_cache):
        calibration = str(_calibration(Path(ctx.inputs["dataset"]), model, part, config.calib_size))
    dtype = config.dtype if known.dtype_auto or config.dtype != "auto" else "float16"
    argv = trtllm.convert(
        known,
        examples=os.environ.get("HPC_TRTLLM_EXAMPLES", trtllm.EXAMPLES),
        architecture=_architecture(plain),
        model=str(model),
        output=str(part),
        dtype=dtype,
        tp=config.tp_size,
        pp=config.pp_size,
        quantization=config.quantization,
        kv_cache=config.kv_cache,
        workers=config.workers,
        calibration=calibration,
        calib_size=config.calib_size,
        calib_length=config.calib_length,
    )
    _check_flags(argv, version)
    ctx.metric(tensorrt_llm=version, argv=list(argv))
    ctx.progress(0, 1, "converting")
    run_program(argv, ctx, cwd=part.parent)
    if calibration is not None:
        shutil.rmtree(calibration)
    _refuse_ranks(part, "rank{}.safetensors", config.tp_size, config.pp_size)
    _copy_tokenizer(model, part)
    source = {
        "model": document["inputs"]["model"]["key"],
        "tensorrt_llm": version,
        "image": document["environment"]["digest"],
    }
    rundir.write_json(part / RECORD, {"schema": "hpc.checkpoint/1", **source})
    ctx.progress(1, 1, "converted")


def tensorrt(config: Any, ctx: Context, part: Path) -> None:
    """One TensorRT engine per rank, by trtllm-build, several at a time on the job's GPUs."""
    document = _document(ctx)
    version = _version()
    known = trtllm.release(version)
    folder = Path(ctx.inputs["checkpoint"])
    plain = _config(folder)
    mapping = plain.get("mapping") or {}
    tp, pp = int(mapping.get("tp_size", 1)), int(mapping.get("pp_size", 1))
    if (tp, pp) != (config.tp_size, config.pp_size):
        raise VerificationFailed(
            f"the checkpoints are for TP{tp} × PP{pp}, and build asks for TP{config.tp_size} × PP{config.pp_size}",
            hint="convert again, or set build.tp_size and build.pp_size to those of the checkpoints",
        )
    _refuse_ranks(folder, "rank{}.safetensors", tp, pp)
    record = rundir.read_json(folder / RECORD) or {}
    if record.get("tensorrt_llm", version) != version:
        raise VerificationFailed(
            f"the checkpoints were made by TensorRT-LLM {record['tensorrt_llm']}, and this image has {version}",
            hint="convert them again with this image: hpc submit convert",
        )
    cards = gpus()
    name, compute = cards[0]
    refuse_kinds(cards)
    chosen = loras.named(config.lora)
    max_rank, lora_modules = lorarrays.limits(config, lorarrays.read_sizes(config))
    dtype = str(plain.get("dtype", "float16"))
    ranks = meeting.of(ctx.folder, os.environ)
    quantization, cache = trtllm.precision(plain.get("quantization") or {})
    if chosen:
        lorarrays.refuse_kind(dtype, quantization)
    positions = int(plain.get("max_position_embeddings") or 2048)
    longest = config.max_seq_len or min(positions, engines.LONGEST)
    prompt = min(config.max_input_len or longest, longest)
    argv = trtllm.build(
        known,
        checkpoint=str(folder),
        output=str(part),
        quantization=quantization,
        kv_cache=cache,
        max_batch_size=config.max_batch_size,
        max_input_len=prompt,
        max_seq_len=longest,
        max_num_tokens=config.max_num_tokens,
        max_beam_width=config.max_beam_width,
        lora_modules=lora_modules,
        max_lora_rank=max_rank,
        workers=1 if ranks.world > 1 else min(len(cards), tp * pp),
    )
    _check_flags(argv, version)
    ctx.metric(tensorrt_llm=version, argv=list(argv), gpu=name)
    ctx.progress(0, tp * pp, "building")
    ranks.tell(argv=argv, cards=cards[0])
    try:
        run_program(argv, ctx, cwd=part.parent, done=lambda: len(list(part.glob("rank*.engine"))), total=tp * pp)
        ranks.wait(ctx.stopping)
    except HpcError:
        ranks.look()  # what another one says is the reason, where there is something
        raise
    finally:
        ranks.over()
    _refuse_ranks(part, "rank{}.engine", tp, pp)
    said = str((rundir.read_json(part / "config.json") or {}).get("version", version))
    if said != version:
        raise VerificationFailed(f"the engine says that TensorRT-LLM {said} built it, and this image has {version}")
    _copy_tokenizer(folder, part)
    _finish(part, Passport(
        engine="tensorrt_llm",
        model=record.get("model") or document["inputs"]["checkpoint"]["key"],
        architecture=str(plain.get("architecture", "")),
        image=document["environment"]["digest"],
        versions={"tensorrt-llm": version, **_versions("tensorrt", "tensorrt-cu12", "tensorrt-cu13")},
        gpu=name,
        compute=compute,
        tp_size=tp,
        pp_size=pp,
        dtype=dtype,
        quantization=quantization,
        kv_cache=cache,
        max_batch_size=config.max_batch_size,
        max_input_len=prompt,
        max_seq_len=longest,
        max_lora_rank=max_rank,
        adapters=lorarrays.write(part, chosen, dtype, max_rank),
    ), ctx)  # fmt: skip


def refuse_kinds(cards: Sequence[tuple[str, ...]]) -> None:
    """HpcError where they are not of one kind."""
    if len(set(cards)) > 1:
        raise HpcError(
            f"the job's GPUs are not of one kind: {', '.join(sorted({c[0] for c in cards}))}",
            hint="an engine runs only on the kind that built it: ask for one kind (gres in the site profile)",
        )


def gpus() -> list[tuple[str, str]]:
    """(name, compute capability) of each of the job's GPUs; HpcError where nvidia-smi tells none."""
    query = ("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader")
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise HpcError(
            f"nvidia-smi does not tell the job's GPUs: {error}", hint="does the job have a GPU? see hpc plan"
        ) from error
    rows = [tuple(cell.strip() for cell in line.split(",")) for line in done.stdout.splitlines() if "," in line]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    numbers = visible.split(",")
    if all(n.isdigit() and int(n) < len(rows) for n in numbers):  # a node without cgroups shows all of its cards
        rows = [rows[int(n)] for n in numbers]
    if not rows:
        raise HpcError("nvidia-smi shows no GPU", hint="does the job have a GPU? see hpc plan")
    return [(row[0], row[1]) for row in rows]


def _finish(part: Path, made: Passport, ctx: Context) -> None:
    passport.write(part, made)
    sizes = [p.stat().st_size for p in part.rglob("*") if p.is_file()]
    ctx.metric(
        engine=made.engine, engine_bytes=sum(sizes), tp_size=made.tp_size, pp_size=made.pp_size,
        quantization=made.quantization, max_seq_len=made.max_seq_len,
    )  # fmt: skip
    ctx.progress(1, 1, "built")


def _document(ctx: Context) -> Mapping[str, Any]:
    """The stage's config.json: the keys of its inputs, and the image's digest."""
    document = rundir.read_json(rundir.StageDir(ctx.folder).config)
    if document is None:
        raise HpcError(f"{ctx.folder} has no config.json")
    return document


def _config(folder: Path) -> Mapping[str, Any]:
    config = rundir.read_json(folder / "config.json")
    if config is None:
        raise HpcError(f"{folder} has no config.json", hint="is it a model, or TensorRT-LLM's checkpoints?")
    return config


def _architecture(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or [""])[0])


def _version() -> str:
    """TensorRT-LLM's version in this image, without loading it."""
    try:
        return metadata.version("tensorrt_llm")
    except metadata.PackageNotFoundError as error:
        raise HpcError(
            "this image has no TensorRT-LLM", hint="environments = { trtllm = '…' } in the site profile names it"
        ) from error


def _versions(*names: str) -> dict[str, str]:
    """Those of the packages that are there. TensorRT's wheel is named after its CUDA; here it is one name."""
    found = {}
    for name in names:
        try:
            found[name.partition("-cu")[0]] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _check_flags(argv: Sequence[str], version: str) -> None:
    """HpcError where the image's program does not know a flag that the table gives it."""
    program = tuple(argv[:2]) if argv[0] == "python3" else tuple(argv[:1])
    try:
        done = subprocess.run((*program, "--help"), capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        raise HpcError(f"{program[-1]} can't be started: {error}", hint="is this NVIDIA's own image?") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise HpcError(f"{program[-1]} --help fails: {last}", hint="TensorRT-LLM needs a GPU even for this")
    unknown = trtllm.missing_flags(tuple(argv), done.stdout)
    if unknown:
        raise HpcError(
            f"{Path(program[-1]).name} of TensorRT-LLM {version} has no {', '.join(unknown)}",
            hint="this release is not as our table says: take an image of 0.16, 0.18, 1.0 or 1.2",
        )


def run_program(
    argv: Sequence[str], ctx: Context, *, cwd: Path, done: Callable[[], int] = lambda: 0, total: int = 1
) -> None:
    """Run a program to its end; HpcError with its last line where it fails. It ends where the job is asked to.

    `done` counts what it has made of `total`; for the progress.
    """
    print("+", shlex.join(argv), flush=True)
    tail: deque[str] = deque(maxlen=20)
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )

    def copy(lines: IO[str]) -> None:
        with lines:
            for line in lines:
                print(line, end="", flush=True)
                tail.append(line.strip())

    assert process.stdout is not None
    reader = threading.Thread(target=copy, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            if ctx.stopping():
                raise HpcError("ended by the scheduler before the work was whole", hint="ask for more time: --time")
            ctx.progress(done(), total, Path(argv[0]).name)
            time.sleep(_EVERY_S)
    finally:
        with suppress(ProcessLookupError):  # its children too; and those that it left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(5)
    if process.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        raise HpcError(
            f"{_short(argv)} was killed: out of memory?", hint="raise resources.mem_gb; fewer workers need less"
        )
    if process.returncode:
        said = next((line for line in reversed(tail) if line), "it said nothing")
        raise HpcError(f"{_short(argv)} failed: {said[:300]}", hint="its whole output is in hpc logs")


def _short(argv: Sequence[str]) -> str:
    """The program's name."""
    words = list(argv)
    return words[2] if words[1] == "-m" else Path(words[1] if words[0] == "python3" else words[0]).name


def _refuse_ranks(folder: Path, pattern: str, tp: int, pp: int) -> None:
    """VerificationFailed where not every rank has its file, or there are more."""
    wanted = {pattern.format(rank) for rank in range(tp * pp)}
    there = {p.name for p in folder.glob(pattern.format("*"))}
    if there != wanted:
        raise VerificationFailed(
            f"TP{tp} × PP{pp} needs {len(wanted)} ranks, and {folder.name} has {', '.join(sorted(there)) or 'none'}",
            hint="see hpc logs; a program that ended well made something else than it was asked for",
        )


def _copy_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer's files beside what was made, so that it can be served by itself; what is there stays."""
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file() and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)


def _calibration(dataset: Path, model: Path, part: Path, most: int) -> Path:
    """A folder with the conversations as texts in the model's chat template, as quantize.py reads it."""
    words = models.tokenizer(model)
    folder = part.parent / ".calibration.part"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    kept = 0
    with open(folder / "train.jsonl", "w", encoding="utf-8") as out:
        for messages in islice(conversations.read(dataset, "train"), most):
            text = words.apply_chat_template(messages, tokenize=False)
            out.write(json.dumps({"text": text}) + "\n")
            kept += 1
    if not kept:
        raise HpcError(f"{dataset} has no conversation to calibrate with", hint="prepare more data")
    return folder
