"""Parameters and KV cache of known models, out of their config.json."""

from __future__ import annotations

from pathlib import Path
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
LLAMA_3_70B = config(
    "LlamaForCausalLM", 8192, 64, 80, 28672, 128256,
    num_key_value_heads=8, max_position_embeddings=131072, torch_dtype="bfloat16", tie_word_embeddings=False,
    rope_scaling={
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
)  # fmt: skip
QWEN3_30B_A3B = config(
    "Qwen3MoeForCausalLM", 2048, 32, 48, 6144, 151936,
    num_key_value_heads=4, head_dim=128, attention_bias=False, max_position_embeddings=40960, torch_dtype="bfloat16",
    decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_experts=128,
    num_experts_per_tok=8, output_router_logits=False, router_aux_loss_coef=0.001, sliding_window=None,
    rope_scaling=None, tie_word_embeddings=False, use_sliding_window=False,
)  # fmt: skip
DEEPSEEK_V3 = config(
    "DeepseekV3ForCausalLM", 7168, 128, 61, 18432, 129280,
    attention_bias=False, ep_size=1, first_k_dense_replace=3, kv_lora_rank=512, max_position_embeddings=163840,
    moe_intermediate_size=2048, moe_layer_freq=1, n_group=8, n_routed_experts=256, n_shared_experts=1,
    norm_topk_prob=True, num_experts_per_tok=8, num_key_value_heads=128, num_nextn_predict_layers=1, q_lora_rank=1536,
    qk_nope_head_dim=128, qk_rope_head_dim=64, routed_scaling_factor=2.5, scoring_func="sigmoid", topk_group=4,
    topk_method="noaux_tc", tie_word_embeddings=False, torch_dtype="bfloat16", v_head_dim=128,
    quantization_config={
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
    rope_scaling={
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
)  # fmt: skip
GPT_OSS_120B = config(
    "GptOssForCausalLM", 2880, 64, 36, 2880, 201088,
    attention_bias=True, experts_per_token=4, head_dim=64, initial_context_length=4096,
    layer_types=["sliding_attention", "full_attention"] * 18, max_position_embeddings=131072, num_experts_per_tok=4,
    num_key_value_heads=8, num_local_experts=128, output_router_logits=False, router_aux_loss_coef=0.9,
    sliding_window=128, swiglu_limit=7.0, tie_word_embeddings=False,
    quantization_config={
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        "quant_method": "mxfp4",
    },
    rope_scaling={
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
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
        (LLAMA_3_70B, 70_553_706_496),
        (QWEN3_30B_A3B, 30_532_122_624),
        (
            config(
                "Qwen2MoeForCausalLM", 2048, 16, 24, 5632, 151936, num_key_value_heads=16, num_experts=60,
                moe_intermediate_size=1408, shared_expert_intermediate_size=5632, decoder_sparse_step=1,
            ),
            14_315_784_192,
        ),
        (DEEPSEEK_V3, 671_026_419_200 - 58 * 256),  # without the values that balance each layer's experts
        (GPT_OSS_120B, 116_829_156_672),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_published_model(document: dict[str, Any], parameters: int) -> None:
    found = shape.read(document)
    assert found is not None
    assert found.parameters == parameters
    assert found.understood


def test_latent_attention_caches_one_short_vector_that_is_whole_on_each_rank() -> None:
    found = shape.read(DEEPSEEK_V3)
    assert found is not None
    assert (found.kv_bytes(), found.kv_values(8)) == (61 * 576 * 2, 576)


@pytest.mark.parametrize(
    "more",
    [
        {"interleave_moe_layer_step": 2, "num_local_experts": 16},
        {"layer_types": ["linear_attention", "full_attention"]},
        {"mamba_d_state": 128},
        {"kv_lora_rank": 512},
        {"num_experts": 8, "moe_layer_freq": 2},
    ],
)
def test_layers_of_another_kind_are_not_taken_for_known_ones(more: dict[str, Any]) -> None:
    found = shape.read({**LLAMA_7B, **more})
    assert found is not None
    assert not found.understood


@pytest.mark.parametrize(
    ("document", "positions"),
    [
        (QWEN_7B, 32768),
        (
            {**QWEN_7B, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            131072,
        ),
        ({**QWEN_7B, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 131072),
        ({**QWEN_7B, "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6}}, 65536),
        ({**LLAMA_7B, "rope_scaling": {"type": "linear", "factor": 8.0}}, 32768),
        ({**LLAMA_7B, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 8192),
        ({**LLAMA_7B, "rope_scaling": {"type": "linear", "factor": 8.0}, "model_type": "gemma3_text"}, 4096),
        ({**LLAMA_7B, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, 4096),
        (LLAMA_3_70B, 131072),
        (DEEPSEEK_V3, 163840),
        (GPT_OSS_120B, 131072),
    ],
)
def test_stretched_positions_make_the_longest_text_longer(document: dict[str, Any], positions: int) -> None:
    found = shape.read(document)
    assert found is not None
    assert found.positions == positions


def test_the_files_of_a_folder_are_counted_once(tmp_path: Path) -> None:
    assert shape.stored(tmp_path) is None
    for name, size in (("model-00001-of-00002", 70), ("model-00002-of-00002", 30), ("consolidated", 100)):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(size))
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(100))
    assert shape.stored(tmp_path) == 100
    for path in tmp_path.glob("model*"):
        path.unlink()
    assert shape.stored(tmp_path) == 100, "where there is no other"


def test_a_token_of_llama_2_7b_takes_half_a_mebibyte_in_float16() -> None:
    found = shape.read(LLAMA_7B)
    assert found is not None
    assert found.kv_bytes() == 2**19


def test_the_language_part_of_a_model_for_pictures_counts() -> None:
    found = shape.read({"architectures": ["X"], "text_config": LLAMA_7B})
    assert found is not None
    assert found.layers == 32


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"hidden_size": 8},
        {**LLAMA_7B, "num_attention_heads": 0},
        {**LLAMA_7B, "vocab_size": "many"},
        {**LLAMA_7B, "rope_scaling": "yarn"},
    ],
)
def test_what_is_no_such_decoder_has_no_shape(document: dict[str, Any]) -> None:
    assert shape.read(document) is None
