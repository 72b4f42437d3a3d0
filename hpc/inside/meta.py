"""
LLaMA as Meta gives it (params.json, consolidated.NN.pth, tokenizer.model) -> a folder for transformers.

The shards are Meta's model parallelism: each holds a part of every matrix. They are mapped, joined layer by layer and
written at once, so that memory holds one output file and not the model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hpc.core.errors import HpcError, VerificationFailed
from hpc.inside import tiktokens, weights

_ALONG = {
    "attention.wq": 0,
    "attention.wk": 0,
    "attention.wv": 0,
    "attention.wo": 1,
    "feed_forward.w1": 0,
    "feed_forward.w2": 1,
    "feed_forward.w3": 0,
    "output": 0,
}
"""Matrix -> the dimension that is divided among the shards."""
_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_CHUNK = 1 << 20
_LLAMA_3 = 100_000
"""More words than this has only LLaMA 3."""
_NARROW = 4096
"""Narrower than this are of those with scaled positions only the two of 3.2, which stretch them more than 3.1."""
_LLAMA_1 = 1e-6
"""No other has so small a norm_eps."""

Tell = Callable[[float, float, str], None]


def is_folder(folder: Path) -> bool:
    """Whether a folder holds a model in Meta's own format."""
    return (folder / "params.json").is_file() and not (folder / "config.json").is_file()


def check(folder: Path, allowed: tuple[str, ...], tell: Tell) -> None:
    """VerificationFailed where a file is not the one in Meta's list; without that list, pickles must be named."""
    lists = [path for path in (folder / "checklist.chk", folder / "tokenizer_checklist.chk") if path.is_file()]
    shards = [path.name for path in _shards(folder)]
    if not lists:
        weights.refuse(shards, f"{folder}, which has no checklist.chk,", allowed)
    known: dict[str, str] = {}
    for path in lists:
        for line in path.read_text(encoding="utf-8").splitlines():
            digest, _, name = line.strip().partition(" ")
            if name.strip():
                known[name.strip().lstrip("*")] = digest.lower()
    if lists and (unknown := sorted(set(shards) - set(known))):
        raise VerificationFailed(f"{folder}: {unknown[0]} is not in checklist.chk", hint="is it another model's?")
    for number, (name, digest) in enumerate(sorted(known.items())):
        path = folder / name
        tell(number, len(known), f"checking {name}")
        if not path.is_file():
            raise VerificationFailed(f"{folder} lacks {name}, which its list names", hint="copy or fetch it again")
        if _md5(path) != digest:
            raise VerificationFailed(
                f"{path} is not the file in Meta's list: its md5 differs", hint="copy or fetch it again"
            )


def is_instruct(folder: Path) -> bool:
    """Whether it is a model to chat with, by the name that Meta gives its folder: nothing inside says so."""
    return "instruct" in folder.resolve().name.lower()


def convert(folder: Path, target: Path, tell: Tell, *, instruct: bool) -> bool:
    """Write config, weights and tokenizer for transformers; whether it is a LLaMA 3. `instruct` counts for those."""
    params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
    shards = [weights.loaded(path) for path in _shards(folder)]
    try:
        config = _config(params, shards, _tokenizer_model(folder), instruct)
        weights.write(_joined(params, config, shards, tell), target)
    except (KeyError, RuntimeError, TypeError) as error:
        raise HpcError(
            f"{folder} is no LLaMA of a known shape: {error}", hint="fetch the model in transformers' form"
        ) from error
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    _tokenizer(folder, target, config, instruct)
    return bool(config["bos_token_id"] != 1)


def _shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("consolidated*.pth"))
    if not found:
        raise VerificationFailed(f"{folder} has no consolidated.00.pth", hint="copy or fetch it again")
    return found


def _config(
    params: dict[str, Any], shards: list[dict[str, Any]], tokenizer: Path | None, instruct: bool
) -> dict[str, Any]:
    heads = params["n_heads"]
    hidden = sum(shard["layers.0.feed_forward.w1.weight"].shape[0] for shard in shards)
    rows, columns = shards[0]["tok_embeddings.weight"].shape
    vocabulary = rows if columns * len(shards) == params["dim"] and len(shards) > 1 else rows * len(shards)
    third = vocabulary > _LLAMA_3 or (tokenizer is not None and tiktokens.is_form(tokenizer))
    first, scaled = vocabulary - tiktokens.SPECIAL, bool(params.get("use_scaled_rope"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": params["dim"],
        "intermediate_size": hidden,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 10000.0),
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "max_position_embeddings": 8192 if third else 2048 if params["norm_eps"] <= _LLAMA_1 else 4096,
        "bos_token_id": first if third else 1,
        "eos_token_id": tiktokens.ends(first, scaled=scaled, instruct=instruct) if third else 2,
        "tie_word_embeddings": False,
        "dtype": str(shards[0]["norm.weight"].dtype).removeprefix("torch."),
    }
    if scaled:
        config["max_position_embeddings"] = 131072
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": params.get("rope_scale_factor", 32.0 if params["dim"] < _NARROW else 8.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return config


def _joined(
    params: dict[str, Any], config: dict[str, Any], shards: list[dict[str, Any]], tell: Tell
) -> Iterator[tuple[str, Any]]:
    """(transformers' name, tensor), one after the other."""
    import torch

    def whole(name: str, along: int | None) -> Any:
        parts = [shard[f"{name}.weight"] for shard in shards]
        return parts[0] if along is None or len(parts) == 1 else torch.cat(parts, dim=along)

    embedded = 0 if shards[0]["tok_embeddings.weight"].shape[1] == params["dim"] else 1
    yield "model.embed_tokens.weight", whole("tok_embeddings", embedded)
    for layer in range(params["n_layers"]):
        tell(layer, params["n_layers"], "converting Meta's shards")
        for theirs, ours in _NAMES.items():
            tensor = whole(f"layers.{layer}.{theirs}", _ALONG.get(theirs))
            if theirs in ("attention.wq", "attention.wk"):
                heads = config["num_attention_heads" if theirs == "attention.wq" else "num_key_value_heads"]
                tensor = _unpaired(tensor, heads)
            yield f"model.layers.{layer}.{ours}.weight", tensor
    yield "model.norm.weight", whole("norm", None)
    yield "lm_head.weight", whole("output", _ALONG["output"])


def _unpaired(tensor: Any, heads: int) -> Any:
    """Meta turns neighbouring dimensions by rotary positions, transformers the halves of a head."""
    rows, columns = tensor.shape
    return tensor.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _tokenizer_model(folder: Path) -> Path | None:
    return next((p for p in (folder / "tokenizer.model", folder.parent / "tokenizer.model") if p.is_file()), None)


def _tokenizer(folder: Path, target: Path, config: dict[str, Any], instruct: bool) -> None:
    """The tokenizer for transformers: made of Meta's, taken over where there is one beside it."""
    ready = [*folder.glob("tokenizer*.json"), folder / "special_tokens_map.json"]
    if (folder / "tokenizer.json").is_file():
        for path in ready:
            if path.is_file():
                shutil.copy(path, target / path.name)
        return
    model = _tokenizer_model(folder)
    if model is None:
        raise HpcError(
            f"{folder} has no tokenizer.model", hint="Meta gives it beside the model's folder: copy it there"
        )
    if tiktokens.is_form(model):
        scaled, longest = "rope_scaling" in config, config["max_position_embeddings"]
        tiktokens.write(model, target, config["vocab_size"], scaled=scaled, instruct=instruct, longest=longest)
        shutil.copy(model, target / "tokenizer.model")
        return
    from transformers import LlamaTokenizer

    try:
        LlamaTokenizer.from_pretrained(model.parent, add_bos_token=True).save_pretrained(target)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise VerificationFailed(f"{model} is not a tokenizer of LLaMA: {said}", hint="fetch it again") from error
    shutil.copy(model, target / "tokenizer.model")


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
