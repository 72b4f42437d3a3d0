"""Parameters and KV cache of known models, out of their config.json."""

from __future__ import annotations

from typing import Any

import pytest

from hpc.core import shape


def config(
    architecture: str, hidden: int, heads: int, layers: int, mlp: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": [architecture], "hidden_size": hidden, "num_attention_heads": heads,
        "num_hidden_layers": layers, "intermediate_size": mlp, "vocab_size": vocab, **more,
    }  # fmt: skip


LLAMA_7B = config("LlamaForCausalLM", 4096, 32, 32, 11008, 32000, max_position_embeddings=4096, torch_dtype="float16")
LLAMA_70B = config(
    "LlamaForCausalLM", 8192, 64, 80, 28672, 32000,
    num_key_value_heads=8, max_position_embeddings=4096, torch_dtype="bfloat16",
)  # fmt: skip
QWEN_7B = config(
    "Qwen2ForCausalLM", 3584, 28, 28, 18944, 152064,
    num_key_value_heads=4, max_position_embeddings=32768, dtype="bfloat16",
)  # fmt: skip


@pytest.mark.parametrize(
    ("document", "parameters"),
    [
        (LLAMA_7B, 6_738_415_616),
        (LLAMA_70B, 68_976_648_192),
        (QWEN_7B, 7_615_616_512),
        (
            config("Qwen2ForCausalLM", 896, 14, 24, 4864, 151936, num_key_value_heads=2, tie_word_embeddings=True),
            494_032_768,
        ),
        (config("MistralForCausalLM", 4096, 32, 32, 14336, 32000, num_key_value_heads=8), 7_241_732_096),
        (
            config("MixtralForCausalLM", 4096, 32, 32, 14336, 32000, num_key_value_heads=8, num_local_experts=8),
            46_702_792_704,
        ),
        (config("GemmaForCausalLM", 2048, 8, 18, 16384, 256000, num_key_value_heads=1, head_dim=256), 2_506_172_416),
        (config("Gemma2ForCausalLM", 3584, 16, 42, 14336, 256000, num_key_value_heads=8, head_dim=256), 9_241_705_984),
        (
            config("LlamaForCausalLM", 576, 9, 30, 1536, 49152, num_key_value_heads=3, tie_word_embeddings=True),
            134_515_008,
        ),
        (
            config(
                "Qwen3ForCausalLM", 1024, 16, 28, 3072, 151936,
                num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
            ),
            596_049_920,
        ),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_published_model(document: dict[str, Any], parameters: int) -> None:
    found = shape.read(document)
    assert found is not None
    assert found.parameters == parameters


def test_a_token_of_llama_2_7b_takes_half_a_mebibyte_in_float16() -> None:
    found = shape.read(LLAMA_7B)
    assert found is not None
    assert found.kv_bytes() == 2**19


def test_the_language_part_of_a_model_for_pictures_counts() -> None:
    found = shape.read({"architectures": ["X"], "text_config": LLAMA_7B})
    assert found is not None
    assert found.layers == 32


@pytest.mark.parametrize(
    "document", [{}, {"hidden_size": 8}, {**LLAMA_7B, "num_attention_heads": 0}, {**LLAMA_7B, "vocab_size": "many"}]
)
def test_what_is_no_such_decoder_has_no_shape(document: dict[str, Any]) -> None:
    assert shape.read(document) is None
