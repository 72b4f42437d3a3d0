"""A STUB of TensorRT-LLM: programs with the real ones' names and flags, which calculate nothing.

TensorRT-LLM can't even be imported without a GPU. These check what they are given (flags, ranks, GPUs) as strictly as
the real ones and write files with the real ones' names, so that all around them is tested: argv, ranks, GPUs, passport.
"""

from __future__ import annotations

import sys
from pathlib import Path

_HEAD = '#!/usr/bin/env python3\n"""A STUB, see tests/support/trtllm_stub.py."""\n'

_CONVERT = (
    _HEAD
    + """
import argparse, json, os, sys
parser = argparse.ArgumentParser()
for flag in ("--model_dir", "--output_dir", "--dtype"):
    parser.add_argument(flag, required=True)
for flag in ("--tp_size", "--pp_size", "--workers"):
    parser.add_argument(flag, type=int, default=1)
NEW_FLAGS = os.environ.get("STUB_WITHOUT_FLAG", "")
if NEW_FLAGS != "--use_weight_only":
    parser.add_argument("--use_weight_only", action="store_true")
parser.add_argument("--weight_only_precision", choices=["int8", "int4"])
parser.add_argument("--qformat")
parser.add_argument("--kv_cache_dtype", choices=["int8", "fp8"])
parser.add_argument("--awq_block_size", type=int)
parser.add_argument("--calib_dataset")
parser.add_argument("--calib_size", type=int)
parser.add_argument("--calib_max_seq_length", type=int)
args = parser.parse_args()
model = json.load(open(os.path.join(args.model_dir, "config.json")))
assert model["num_attention_heads"] % args.tp_size == 0, "num_attention_heads % tp_size"
if args.calib_dataset:
    rows = [json.loads(line) for line in open(os.path.join(args.calib_dataset, "train.jsonl"))]
    assert rows and all(set(row) == {"text"} and isinstance(row["text"], str) for row in rows), rows
algorithm = {"int8": "W8A16", "int4": "W4A16", "int4_awq": "W4A16_AWQ", "fp8": "FP8", "int8_sq": "W8A8_SQ_PER_CHANNEL"}
world = args.tp_size * args.pp_size
os.makedirs(args.output_dir, exist_ok=True)
made = int(os.environ.get("STUB_RANKS", world))
for rank in range(made):
    with open(os.path.join(args.output_dir, f"rank{rank}.safetensors"), "w") as file:
        file.write(f"weights of rank {rank}")
json.dump({
    "architecture": model["architectures"][0], "dtype": "float16" if args.dtype == "auto" else args.dtype,
    "max_position_embeddings": model.get("max_position_embeddings"),
    "mapping": {"world_size": world, "tp_size": args.tp_size, "pp_size": args.pp_size},
    "quantization": {
        "quant_algo": algorithm.get(args.qformat or (args.use_weight_only and args.weight_only_precision)),
        "kv_cache_quant_algo": args.kv_cache_dtype and args.kv_cache_dtype.upper(),
    },
}, open(os.path.join(args.output_dir, "config.json"), "w"))
print("converted", world)
"""
)

_BUILD = (
    _HEAD
    + """
import argparse, concurrent.futures, importlib.metadata, json, os, sys, time
parser = argparse.ArgumentParser()
for flag in ("--checkpoint_dir", "--output_dir"):
    parser.add_argument(flag, required=True)
for flag in ("--max_batch_size", "--max_input_len", "--max_seq_len", "--max_num_tokens", "--max_beam_width",
             "--workers", "--max_lora_rank"):
    parser.add_argument(flag, type=int)
parser.add_argument("--lora_target_modules", nargs="+")
for flag in ("--gpt_attention_plugin", "--gemm_plugin", "--kv_cache_type", "--remove_input_padding",
             "--use_paged_context_fmha", "--use_fp8_context_fmha", "--lora_plugin"):
    parser.add_argument(flag)
args = parser.parse_args()
config = json.load(open(os.path.join(args.checkpoint_dir, "config.json")))
cache, algorithm = (config["quantization"][k] for k in ("kv_cache_quant_algo", "quant_algo"))
if args.use_paged_context_fmha == "enable" and cache:
    assert cache == "FP8" == algorithm, "FP8 Paged Context FMHA only works with fp8 quantization workflow"
world = config["mapping"]["world_size"]
gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
workers = min(args.workers, len(gpus))
# under MPI rank r builds the engines r, r + n, ...; the number comes from the launcher, as MPI itself takes it
rank, ranks = int(os.environ.get("PMI_RANK", 0)), int(os.environ.get("PMI_SIZE", 1))
here = int(os.environ.get("SLURM_LOCALID", 0))
assert ranks == 1 or (args.workers == 1 and rank == int(os.environ["SLURM_PROCID"])), (args.workers, rank, ranks)

def build(rank):
    weights = os.path.join(args.checkpoint_dir, f"rank{rank}.safetensors")
    assert open(weights).read() == f"weights of rank {rank}"
    if os.environ.get("STUB_FAILS_AT") == str(rank):
        raise SystemExit(f"[TRT-LLM] [E] rank {rank}: out of GPU memory")
    time.sleep(float(os.environ.get("STUB_SECONDS", 0)))
    with open(os.path.join(args.output_dir, f"rank{rank}.engine"), "w") as file:
        gpu = gpus[here] if ranks > 1 else gpus[rank % workers]
        json.dump({"rank": rank, "gpu": gpu, "host": os.uname().nodename}, file)

with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    list(pool.map(build, range(world)[rank::ranks]))
if rank:
    sys.exit()
json.dump({
    "version": importlib.metadata.version("tensorrt_llm"), "pretrained_config": config, "build_config": vars(args),
}, open(os.path.join(args.output_dir, "config.json"), "w"))
print("built", world)
"""
)

_SERVER = (
    _HEAD
    + """
import argparse, http.server, json, os, pathlib, signal, sys, threading, time
parser = argparse.ArgumentParser()
for flag in ("--model-repository", "--backend-config", "--exit-timeout-secs", "--model-control-mode", "--load-model",
             *(f"--{name}-{word}" for name in ("http", "grpc", "metrics") for word in ("address", "port")),
             *(f"--allow-{name}" for name in ("http", "grpc", "metrics"))):
    parser.add_argument(flag)
parser.add_argument("--disable-auto-complete-config", action="store_true")
args = parser.parse_args()
rank, ranks = int(os.environ.get("PMI_RANK", 0)), int(os.environ.get("PMI_SIZE", 1))
assert (args.http_port is None) == (args.allow_grpc == "false") == (args.load_model == "tensorrt_llm") == (rank > 0)
gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
meeting = pathlib.Path(args.model_repository).parent / ("stub-" + os.environ["SLURM_JOB_ID"])
meeting.mkdir(exist_ok=True)
(meeting / f"{rank}.part").write_text(json.dumps({
    "rank": rank, "ranks": ranks, "host": os.uname().nodename, "gpu": gpus[int(os.environ["SLURM_LOCALID"])],
    "shm": args.backend_config.partition("=")[2],
}))
(meeting / f"{rank}.part").rename(meeting / f"{rank}.json")
while len(list(meeting.glob("*.json"))) < ranks:  # as MPI_Init does
    time.sleep(0.05)
if rank:
    if os.environ.get("STUB_RANK_DIES") == str(rank):
        time.sleep(2)
        print("E1125 03:59:47.0 1 x.cc:1] expecting compute 9.0 got compute 8.9", flush=True)
        sys.exit(3)
    signal.sigwait({signal.SIGINT})
    sys.exit()

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, words):
        body = words if isinstance(words, bytes) else json.dumps(words).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(b"")

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"text_output": "a stub", "ranks": [json.loads(p.read_text()) for p in meeting.glob("*.json")]})

for port in (args.http_port, args.metrics_port):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
signal.sigwait({signal.SIGINT})
"""
)

_SMI = (
    _HEAD
    + """
import os, sys
assert sys.argv[1:] == ["--query-gpu=name,compute_cap", "--format=csv,noheader"], sys.argv
for line in os.environ.get("STUB_GPUS", "NVIDIA A100-SXM4-80GB, 8.0;" * 8).split(";"):
    if line:
        print(line)
"""
)


def install(venv: Path, version: str = "1.2.1", *, smi: bool = True, server: bool = False) -> Path:
    """Put the stub into a venv (or a folder with bin/), as TensorRT-LLM `version`; the folder of its examples."""
    examples = venv / "examples"
    old = tuple(map(int, version.split(".")[:2])) < (0, 20)
    family = examples / ("llama" if old else "models/core/llama")
    for path, text in (
        (family / "convert_checkpoint.py", _CONVERT),
        (examples / "quantization" / "quantize.py", _CONVERT),
        (venv / "bin" / "trtllm-build", _BUILD),
        *([(venv / "bin" / "tritonserver", _SERVER)] if server else []),
        *([(venv / "bin" / "nvidia-smi", _SMI)] if smi else []),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (packages,) = list(venv.glob("lib/python*/site-packages")) or [venv / "site-packages"]
    for name, number in (("tensorrt_llm", version), ("tensorrt", "10.14.1.48")):
        info = packages / f"{name}-{number}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    if packages.parent == venv and str(packages) not in sys.path:
        sys.path.append(str(packages))
    return examples
