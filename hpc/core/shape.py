"""A language model's shape out of its config.json: what its memory and its division among GPUs follow from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder of the Llama kind: gated MLP, grouped heads."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    positions: int
    """Longest text that the model was made for, tokens."""
    tied: bool
    """Input and output embeddings are one matrix."""
    dtype: str
    """The type of the weights in the files: bfloat16, float16, float32."""
    experts: int = 1
    bias: int = 0
    """Values of biases and further norms per layer."""

    @property
    def linear(self) -> int:
        """Parameters of the layers' matrices: what quantisation makes smaller."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        mlp = 3 * self.hidden * self.intermediate
        return self.layers * (attention + self.experts * mlp + (self.experts > 1) * self.experts * self.hidden)

    @property
    def embedding(self) -> int:
        """Parameters of one embedding matrix."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        norms = self.layers * (2 * self.hidden + self.bias) + self.hidden
        return self.linear + norms + self.embedding * (1 if self.tied else 2)

    def kv_bytes(self, width: float = 2) -> float:
        """Bytes that one token takes in the KV cache of the whole model, at `width` bytes a value.

        >>> Shape(architecture="LlamaForCausalLM", layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128,
        ...       intermediate=11008, vocab=32000, positions=4096, tied=False, dtype="float16").kv_bytes() / 2**20
        0.5
        """
        return 2 * self.layers * self.kv_heads * self.head_dim * width


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
        return Shape(
            architecture=architecture,
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            positions=int(config.get("max_position_embeddings") or 2048),
            tied=bool(config.get("tie_word_embeddings", architecture.startswith("Gemma"))),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            experts=int(config.get("num_local_experts") or config.get("num_experts") or 1),
            bias=_further(architecture, config, hidden, heads, kv_heads, head_dim),
        )
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):
        return None


def _further(
    architecture: str, config: Mapping[str, Any], hidden: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    """Per layer: Qwen2's biases of q, k and v, Llama's where it has them, Qwen3's and Gemma's further norms."""
    values = 0
    if architecture.startswith("Qwen2") or config.get("attention_bias") is True:
        values += head_dim * (heads + 2 * kv_heads)
    if config.get("attention_bias") is True and architecture.startswith("Llama"):
        values += hidden
    if architecture.startswith(("Qwen3", "Gemma3")):
        values += 2 * head_dim
    if architecture.startswith(("Gemma2", "Gemma3")):
        values += 2 * hidden
    return values
