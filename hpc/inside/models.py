"""
Base models, whatever their source, and the writing of model folders: what the training stages share.

A base is a local folder, a GGUF file, or a name on the Hugging Face hub (organisation/name[@revision]).
Standard library at module level; the libraries of the train environment are imported within the functions.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from hpc.core import digest
from hpc.core.config import key_of
from hpc.core.errors import HpcError, UsageError
from hpc.core.rundir import read_json

Dtype = Literal["auto", "bfloat16", "float16", "float32"]

_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def settle() -> None:
    """Environment for the training libraries; call it before any of them is loaded."""
    # Spinning OpenMP threads make a step ten times slower where other processes share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "LOCAL_RANK" not in os.environ:
        # One process on one card; a Trainer that sees several would split every batch among them.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # a job's log is a file


def inspect(base: str) -> None:
    """Refuse a local base that cannot work, by its file names alone; a hub name passes. Standard library."""
    path = Path(base)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"{base} is not a model", hint="give a model folder, a .gguf file or a hub name")
        return
    if not path.is_dir():
        if base.startswith(("/", ".", "~")) or path.suffix == ".gguf":
            raise UsageError(f"there is no model at {base}", hint="check base_model")
        return
    if not (path / "config.json").is_file():
        raise UsageError(
            f"{path} has no config.json",
            hint="a model in Meta's own format must be converted to Hugging Face's first"
            if (path / "params.json").exists()
            else "give the folder that holds config.json and the .safetensors files",
        )
    if next(path.glob("*.safetensors"), None):
        return
    if any(next(path.glob(pattern), None) for pattern in _PICKLES):
        raise UsageError(
            f"{path} holds its weights as pickles, which can run any code when they are loaded",
            hint="convert them: load the model where you trust it, then save_pretrained() writes safetensors",
        )
    raise UsageError(f"{path} has no .safetensors file", hint="the download or copy may be incomplete")


def local(base: str, cache: Path) -> Path:
    """The folder with config, tokenizer and safetensors of a base, fetched or converted if need be."""
    inspect(base)
    path = Path(base)
    if path.is_dir():
        return path
    if path.is_file():
        return _from_gguf(path, cache)
    found = _from_hub(base)
    inspect(str(found))
    return found


def load(folder: Path, dtype: str, **options: Any) -> Any:
    """The causal language model in a folder, with its weights in `dtype` ("float32", …)."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError) as error:
        raise HpcError(
            f"cannot load the model in {folder}: {_line(error)}", hint="is it a whole causal language model?"
        ) from error


def tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """The tokenizer in a folder; `chat_template` (Jinja text) replaces its own chat template.

    HpcError where there is no chat template at all.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise HpcError(f"cannot load the tokenizer in {folder}: {_line(error)}") from error
    loaded.chat_template = chat_template or loaded.chat_template
    if not loaded.chat_template:
        raise HpcError(
            "this model's tokenizer has no chat template",
            hint="take the chat variant of the model, or set finetune.chat_template to a Jinja file",
        )
    return loaded


def compute_dtype(asked: Dtype) -> str:
    """
    The type to calculate in: on a card bfloat16 where it has it, else float16; float32 on a CPU.

    HpcError where the one asked for can't be had.
    """
    import torch

    if not torch.cuda.is_available():
        if asked == "float16":
            raise HpcError("training in float16 needs a GPU", hint='set dtype = "auto"')
        return "float32" if asked == "auto" else asked
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "bfloat16" and not has_bf16:
        raise HpcError(
            f"{torch.cuda.get_device_name()} has no bfloat16",
            hint='set dtype = "auto" (float16 on this card)',
        )
    return ("bfloat16" if has_bf16 else "float16") if asked == "auto" else asked


def ask(folder: Path, dtype: str, tokenizer: Any, question: str) -> str:
    """The answer of the model in a folder; it is in memory only meanwhile."""
    from hpc.inside import answering

    return answering.answers(
        load(folder, dtype), tokenizer, [[{"role": "user", "content": question}]], max_new_tokens=96, batch_size=1
    )[0]


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a Trainer (it writes trainer_state.json last), newest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    newest = sorted(found, key=step_of, reverse=True)
    return [path for path in newest if read_json(path / "trainer_state.json") is not None]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


@contextmanager
def written_whole(path: Path, *, readable: bool = False) -> Iterator[Path]:
    """
    A folder to write into, which becomes `path` (replacing an old one) only if the block succeeds.

    Its files get the usual mode of new files, or are readable by everybody; safetensors itself writes 0600.
    What a writer that was killed has left goes first: an output has one writer at a time.
    """
    for left in path.parent.glob(f".{path.name}-*.part"):
        shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-", suffix=".part"))
    try:
        yield part
        _set_modes(part, readable)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _set_modes(folder: Path, readable: bool) -> None:
    umask = os.umask(0)
    os.umask(umask)
    mask = 0 if readable else umask
    for name, _, files in os.walk(folder):
        os.chmod(name, 0o755 & ~mask | 0o700)
        for path in (os.path.join(name, file) for file in files):
            if os.stat(path).st_nlink == 1:  # else it is somebody's elsewhere, too
                os.chmod(path, 0o644 & ~mask | 0o600)


def _from_gguf(file: Path, cache: Path) -> Path:
    """A GGUF file as bfloat16 safetensors and a tokenizer, made once per content and library version."""
    import transformers

    key = key_of(digest.sha256(file), transformers.__version__)
    made = cache / "models" / key
    if made.is_dir():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    (cache / "locks").mkdir(exist_ok=True)
    with open(cache / "locks" / key, "w") as lock:  # several ranks, or jobs: the second finds it made
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        return made if made.is_dir() else _converted(file, made)


def _converted(file: Path, made: Path) -> Path:
    part = Path(tempfile.mkdtemp(dir=made.parent, prefix=".part-"))
    try:
        _dequantise(file, part)
        os.chmod(part, 0o755)
        os.rename(part, made)
    except OSError:
        if not made.is_dir():  # else another process was quicker: its copy is as good
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return made


def _dequantise(file: Path, target: Path) -> None:
    """Convert without a Trainer: one would write its own use_cache=false into the model's config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        words = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # Without dequantize=True the model loads, but can't be saved.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError, struct.error) as error:
        raise HpcError(
            f"cannot read {file}: {_line(error)}", hint="is it a whole GGUF file of a known kind?"
        ) from error
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    words.save_pretrained(target)


def _from_hub(name: str) -> Path:
    """A model's snapshot from the hub, with the token of HF_TOKEN or the hub's token file, never shown."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    name, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=_HUB_FILES, ignore_patterns=["original/*"]
            )
        )
    except hub.GatedRepoError as error:
        raise HpcError(
            f"'{name}' is gated, and your token may not read it",
            hint=f"accept its licence on the page of {name} on the hub, and set HF_TOKEN",
        ) from error
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as error:
        raise HpcError(
            f"the hub has no model '{name}'"
            + (f" with revision '{revision}'" if revision else "")
            + ", or it is private",
            hint="check the name; for a private model set HF_TOKEN",
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, OSError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        raise HpcError(
            f"cannot get '{name}' from the hub: "
            + ("HF_HUB_OFFLINE is set, and the model is not in the cache" if offline else "it cannot be reached"),
            hint="compute nodes often have no internet: on the login node, hf download"
            f" {name} --local-dir models/{name.rpartition('/')[2]}, and set base_model to that folder",
        ) from error


def _line(error: Exception) -> str:
    """An error's first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
