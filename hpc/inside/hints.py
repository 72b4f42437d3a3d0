"""Lines of a serving log that newcomers trip over -> what they mean, and what to do. Data, and one search."""

from __future__ import annotations

import re

_HINTS: tuple[tuple[str, str], ...] = (
    (
        r"OMPI was not built with SLURM's PMI|PMI2_Init failed|PMIX? ERROR",
        "MPI of the image and Slurm do not fit: serve on one node, or compare `srun --mpi=list` with the image's MPI",
    ),
    (
        r"mpi/pmix.*(not found|cannot|unable)|invalid MPI type",
        "this Slurm has no such --mpi type: see `srun --mpi=list`",
    ),
    (
        r"SLURM process starter.*unable to locate.*srun",
        "mpirun inside the image looks for srun: start it without the SLURM_* variables",
    ),
    (r"OMPI_COMM_WORLD_RANK is not set|MPI_Comm_spawn|MPI_ERR_SPAWN", "MPI was started by something else than mpirun"),
    (r"mpi4py.*(Spawn|spawn)", "this image's Open MPI cannot spawn: take another release of the image"),
    (
        r"mpiSize == tp \* pp|MPI worldSize is expected to be equal",
        "the engine is for another number of GPUs: ask for tp x pp of its config.json",
    ),
    (
        r"Version tag does not match|expecting library version|Serialized Engine Version",
        "the engine was built by another release of TensorRT: build it again with the image that serves it",
    ),
    (r"incompatible device|expecting compute \d", "the engine was built on another type of GPU: build it on this one"),
    (
        r"CUDA out of memory|cudaMalloc.*out of memory|OutOfMemory|maxTokensInPagedKvCache must be large enough",
        "the GPU's memory does not suffice: lower kv_cache_free_gpu_mem_fraction or max_batch_size",
    ),
    (r"oom-kill|Out Of Memory|Cannot allocate memory", "the node's memory does not suffice: ask for more with --mem"),
    (
        r"initialize shared memory key|No space left on device.*shm|Error while creating shared memory",
        "/dev/shm of the node is full: remove what your ended jobs left there, or take another node",
    ),
    (r"memlock|cudaHostAlloc.*(fail|error)", "memory cannot be locked: raise it with `ulimit -l unlimited` in `setup`"),
    (
        r"huggingface\.co|Incorrect path_or_model_id|is not a local folder",
        "the tokenizer's folder is not seen in the image: set `tokenizer` to a folder that has tokenizer.json",
    ),
    (
        r"doesn't support models with decoupled|Non-decoupled model cannot send more than one",
        "streaming is set differently in the models: set `streaming` and let the repository be made anew",
    ),
    (
        r"[Pp]rompt length.*exceeds|exceeds (the )?max_input_len|input length.*exceed|takes \d+ at most",
        "a prompt is longer than the engine takes: shorten it, or build the engine with a larger max_seq_len",
    ),
    (r"[Aa]ddress already in use|already in use", "a port is taken on this node: submit again"),
    (r"num_(key_value_)?heads.*divisible|not divisible by tp", "tp_size must divide the model's heads and KV heads"),
    (
        r"ORTE was unable to reliably start|NCCL WARN.*(connect|socket)|ncclSystemError",
        "the nodes do not reach each other: name the interface in NCCL_SOCKET_IFNAME and OMPI_MCA_btl_tcp_if_include",
    ),
    (
        r"Not enough space allocated to (host|device) LoRA cache",
        "the adapters' cache is too small: raise serve.lora_cache_fraction, or lower serve.kv_cache_fraction",
    ),
    (
        r"LoRA task \d+ not found|lora_config.*(not found|missing)",
        "a LoRA adapter must be sent whole with its first request",
    ),
    (
        r"Stub process .* is not healthy|failed to launch the stub|Failed to initialize Python stub",
        "a model's Python process has ended: its last words stand above",
    ),
    (r"unpack_from requires a buffer", "numpy 2 with this Triton: take numpy below 2"),
    (r"No module named", "a Python package is missing in the image: serve with the environment that the engine names"),
    (r"Error parsing text-format", "a config.pbtxt is not readable: it stands in the run's folder, under repository/"),
)
_HARMLESS = re.compile(
    r"Unable to allocate pinned system memory|CudaDriverHelper has not been initialized|unable to create stream for"
    r"|Failed to initialize NVML|DCGM unable to start|CUDA memory pool disabled|no GPU"
)
"""What Triton says on every machine without a GPU."""


def hint(line: str) -> str:
    """What to do about this line of the log; "" where it is none of those that are known.

    >>> hint("E1 logging.cc] 6: expecting compute 9.0 got compute 8.9")
    'the engine was built on another type of GPU: build it on this one'
    """
    if harmless(line):
        return ""
    return next((text for pattern, text in _HINTS if re.search(pattern, line)), "")


def harmless(line: str) -> bool:
    """True for the complaints of a Triton that has no GPU."""
    return _HARMLESS.search(line) is not None


def is_error(line: str) -> bool:
    """True for a line that Triton marks as an error.

    >>> is_error("E1125 04:05:30.455769 24540 main.cc:535] failed"), is_error("I1125 04:05:30 ready")
    (True, False)
    """
    return re.match(r"E\d{4} ", line) is not None and not harmless(line)
