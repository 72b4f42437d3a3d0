"""A language model's shape out of its config.json: what its memory and its division among GPUs follow from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Attention of DeepSeek's kind: a token's keys and values are cached as one short vector, whole on each rank."""

    query_rank: int
    """0: queries are made of the whole width."""
    rank: int
    plain: int
    turned: int
    """Values of a head's query without and with its position (RoPE)."""
    value: int

    def linear(self, hidden: int, heads: int) -> int:
        """Parameters of a layer's matrices."""
        query = heads * (self.plain + self.turned)
        queries = self.query_rank * (hidden + query) if self.query_rank else hidden * query
        keys = hidden * (self.rank + self.turned) + self.rank * heads * (self.plain + self.value)
        return queries + keys + heads * self.value * hidden


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder of the Llama kind: gated MLP or experts, grouped heads."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the MLP; where every layer has experts, of one of these."""
    vocab: int
    positions: int
    """Longest text that the model was made for, tokens."""
    tied: bool
    """Input and output embeddings are one matrix."""
    dtype: str
    """The type of the weights in the files: bfloat16, float16, float32."""
    experts: int = 1
    expert: int = 0
    """Width of an expert; 0: intermediate."""
    shared: int = 0
    """Width of all experts together that work on every token."""
    dense: int = 0
    """Layers that have an MLP in the experts' place."""
    latent: Latent | None = None
    bias: int = 0
    """Values of biases and further norms per layer."""
    understood: bool = True
    """All that config.json says of its layers is known here; else sizes say nothing."""
    quantized: bool = False
    """Its files are."""
    stored: int | None = None
    """Bytes of its files of weights, where they lie here."""

    @property
    def linear(self) -> int:
        """Parameters of the layers' matrices: what quantisation makes smaller."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        if self.latent is not None:
            attention = self.latent.linear(self.hidden, self.heads)
        mlp = 3 * self.hidden * self.intermediate
        if self.experts == 1:
            return self.layers * (attention + mlp)
        each = 3 * self.hidden * (self.expert or self.intermediate) + self.hidden  # and its row of the router
        sparse = self.experts * each + 3 * self.hidden * self.shared
        return self.layers * attention + self.dense * mlp + (self.layers - self.dense) * sparse

    @property
    def embedding(self) -> int:
        """Parameters of one embedding matrix."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        norms = self.layers * (2 * self.hidden + self.bias) + self.hidden
        return self.linear + norms + self.embedding * (1 if self.tied else 2)

    def kv_values(self, tp: int = 1) -> int:
        """Values of one token in one layer's KV cache, on each of `tp` ranks."""
        if self.latent is not None:
            return self.latent.rank + self.latent.turned
        return 2 * max(1, -(-self.kv_heads // tp)) * self.head_dim

    def kv_bytes(self, width: float = 2) -> float:
        """Bytes that one token takes in the KV cache of the whole model, at `width` bytes a value.

        >>> Shape(architecture="LlamaForCausalLM", layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128,
        ...       intermediate=11008, vocab=32000, positions=4096, tied=False, dtype="float16").kv_bytes() / 2**20
        0.5
        """
        return self.layers * self.kv_values() * width


def stored(folder: Path) -> int | None:
    """Bytes of the model's *.safetensors, by their sizes alone; None where there are none.

    The same weights may lie there once more in one file, consolidated.safetensors.
    """
    files = list(folder.glob("*.safetensors"))
    found = [path for path in files if "consolidated" not in path.name] or files
    return sum(path.stat().st_size for path in found) if found else None


def read(config: Mapping[str, Any]) -> Shape | None:
    """The shape that a config.json describes; None for a model that is no such decoder."""
    text = config.get("text_config")
    if isinstance(text, Mapping):  # a model for pictures too: its language part
        config = {**config, **text}
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        names = config.get("architectures") or [""]
        architecture = str(names[0])
        head_dim = int(config.get("head_dim") or hidden // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        layers, intermediate = int(config["num_hidden_layers"]), int(config["intermediate_size"])
        experts = max(int(config.get(name) or 1) for name in _EXPERTS)
        expert = int(config.get("moe_intermediate_size") or intermediate)
        sparse = _sparse(config, layers) if experts > 1 else 0
        several = int(config.get("n_shared_experts") or config.get("num_shared_experts") or 0)
        latent = _latent(config)
        return Shape(
            architecture=architecture,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=expert if sparse == layers else intermediate,
            vocab=int(config["vocab_size"]),
            positions=positions(config),
            tied=bool(config.get("tie_word_embeddings", architecture.startswith("Gemma"))),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            experts=experts,
            expert=expert if experts > 1 else 0,
            shared=int(config.get("shared_expert_intermediate_size") or several * expert),
            dense=layers - sparse if experts > 1 else 0,
            latent=latent,
            bias=_further(architecture, config, hidden, heads, kv_heads, head_dim, latent),
            understood=not _strange(config, latent),
            quantized=bool(config.get("quantization_config") or config.get("compression_config")),
        )
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):
        return None


def positions(config: Mapping[str, Any]) -> int:
    """Longest text in tokens; of stretched positions, too. Llama 3's, LongRoPE's and Gemma's figures say it already."""
    made_for = int(config.get("max_position_embeddings") or 2048)
    turning = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = turning.get("rope_type") or turning.get("type")
    if kind not in _STRETCHED or str(config.get("model_type", "")).startswith("gemma"):
        return made_for
    plain = int((kind == "yarn" and turning.get("original_max_position_embeddings")) or made_for)
    return max(made_for, int(plain * float(turning.get("factor") or 1)))


_STRETCHED = ("linear", "dynamic", "yarn")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_KNOWN = {
    *_EXPERTS, "n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size", "moe_intermediate_size",
    "moe_layer_freq", "num_experts_per_tok", "num_experts_per_token", "experts_per_token",
}  # fmt: skip
_STRANGE = ("moe", "expert", "mamba", "ssm", "linear_", "lru", "hybrid", "attn_layer_", "kv_shared", "per_layer_input")
"""What the names of settings hold that make layers of another kind, or not all of the same."""
_PLAIN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def _strange(config: Mapping[str, Any], latent: Latent | None) -> bool:
    """Whether it says more of the layers than is read here."""
    names = [name for name in config.keys() - _KNOWN if config[name] and any(part in name for part in _STRANGE)]
    kinds = config.get("layer_types") or ()
    return (
        bool(names)
        or config.get("moe_layer_freq", 1) != 1
        or not _PLAIN_LAYERS.issuperset(kinds)
        or (latent is None and bool(config.get("kv_lora_rank") or config.get("q_lora_rank")))
    )


def _sparse(config: Mapping[str, Any], layers: int) -> int:
    """Layers with experts: all but DeepSeek's first ones, and those that Qwen leaves out."""
    first, step = int(config.get("first_k_dense_replace") or 0), int(config.get("decoder_sparse_step") or 1)
    left_out = config.get("mlp_only_layers") or ()
    return sum(n not in left_out and (n + 1) % step == 0 for n in range(first, layers))


def _latent(config: Mapping[str, Any]) -> Latent | None:
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    if not all(config.get(name) for name in names):
        return None
    rank, plain, turned, value = (int(config[name]) for name in names)
    return Latent(query_rank=int(config.get("q_lora_rank") or 0), rank=rank, plain=plain, turned=turned, value=value)


def _further(
    architecture: str,
    config: Mapping[str, Any],
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    latent: Latent | None,
) -> int:
    """Per layer: Qwen2's biases of q, k and v, Llama's where it has them, Qwen3's and Gemma's further norms.

    And DeepSeek's norms, all that gpt-oss has, and the gate of Qwen2's shared expert.
    """
    if latent is not None:
        return latent.query_rank + latent.rank
    values = hidden if config.get("shared_expert_intermediate_size") else 0
    if architecture.startswith("GptOss"):
        experts, width = int(config["num_local_experts"]), int(config["intermediate_size"])
        values += hidden + heads + experts * (1 + 2 * width + hidden)
    if architecture.startswith("Qwen2") or config.get("attention_bias") is True:
        values += head_dim * (heads + 2 * kv_heads)
    if config.get("attention_bias") is True and architecture.startswith("Llama"):
        values += hidden
    if architecture.startswith(("Qwen3", "Gemma3")):
        values += 2 * head_dim
    if architecture.startswith(("Gemma2", "Gemma3")):
        values += 2 * hidden
    return values
