"""The argv of TensorRT-LLM's programs, per release and setting, against tests/golden/engines/trtllm.txt."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from hpc.core import trtllm
from hpc.core.errors import Refused

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "engines" / "trtllm.txt"
ALL = ("attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate")
VERSIONS = ("0.16.0", "0.18.2", "1.0.0", "1.2.1")
SETTINGS: dict[str, dict[str, Any]] = {
    "float16": {},
    "bfloat16, TP2 x PP2": {"dtype": "bfloat16", "tp": 2, "pp": 2},
    "int8": {"quantization": "int8"},
    "int4, TP8": {"quantization": "int4", "tp": 8},
    "SmoothQuant": {"quantization": "int8_sq"},
    "AWQ": {"quantization": "int4_awq"},
    "fp8 with an fp8 cache": {"quantization": "fp8", "kv_cache": "fp8"},
    "int8 with an int8 cache": {"quantization": "int8", "kv_cache": "int8"},
    "nvfp4": {"quantization": "nvfp4"},
    "Qwen2": {"architecture": "Qwen2ForCausalLM"},
    "Gemma": {"architecture": "Gemma2ForCausalLM"},
    "LoRA": {"lora": 16},
    "LoRA, all modules, fp8": {"lora": 64, "modules": ALL, "quantization": "fp8"},
}


def argv(version: str, setting: dict[str, Any]) -> list[tuple[str, ...]]:
    known = trtllm.release(version)
    values = {
        "architecture": "LlamaForCausalLM", "dtype": "float16", "tp": 1, "pp": 1,
        "quantization": "none", "kv_cache": "auto", **setting,
    }  # fmt: skip
    rank, modules = values.pop("lora", 0), values.pop("modules", ("attn_q", "attn_k", "attn_v"))
    texts = "CALIBRATION" if trtllm.calibrated(values["quantization"], values["kv_cache"]) else None
    converting = trtllm.convert(
        known, examples=trtllm.EXAMPLES, model="MODEL", output="CHECKPOINT", workers=1, calibration=texts,
        calib_size=512, calib_length=512, **values,
    )  # fmt: skip
    building = trtllm.build(
        known, checkpoint="CHECKPOINT", output="ENGINE", quantization=values["quantization"],
        kv_cache=values["kv_cache"], max_batch_size=64, max_input_len=2048, max_seq_len=4096, max_num_tokens=8192,
        max_beam_width=1, max_lora_rank=rank, lora_modules=modules,
        workers=values["tp"] * values["pp"],
    )  # fmt: skip
    return [converting, building]


def test_argv_of_every_release_and_setting() -> None:
    lines = []
    for version in VERSIONS:
        for name, setting in SETTINGS.items():
            lines += [f"# {version}: {name}", *map(shlex.join, argv(version, setting)), ""]
    text = "\n".join(lines)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert GOLDEN.read_text() == text


# What --help of the programs shows, in the words of the files that hpc/core/trtllm.py names as its sources.
CONVERT_0_16 = """--model_dir --meta_ckpt_dir --tp_size --pp_size --moe_tp_size --moe_ep_size --dtype --vocab_size
--n_positions --n_layer --n_head --n_kv_head --n_embd --inter_size --multiple_of --ffn_dim_multiplier --rms_norm_eps
--use_weight_only --disable_weight_only_quant_plugin --weight_only_precision --calib_dataset --calib_size
--calib_max_seq_length --smoothquant --per_channel --per_token --int8_kv_cache --fp8_kv_cache --quant_ckpt_path
--use_fp8 --use_fp8_rowwise --use_meta_fp8_rowwise_recipe --per_group --load_by_shard --hidden_act --rotary_base
--group_size --load_model_on_cpu --use_parallel_embedding --embedding_sharding_dim --use_embedding_sharing
--output_dir --workers --moe_num_experts --moe_top_k --moe_renorm_mode --save_config_only
--remove_duplicated_kv_heads --log_level"""
CONVERT_QWEN = """--model_dir --tp_size --pp_size --cp_size --dtype --use_weight_only --disable_weight_only_quant_plugin
--weight_only_precision --calib_dataset --smoothquant --per_channel --per_token --int8_kv_cache --per_group --group_size
--load_model_on_cpu --use_parallel_embedding --embedding_sharding_dim --output_dir --workers --moe_tp_size
--moe_ep_size"""
QUANTIZE = """--model_dir --nemo_ckpt_path --decoder_type --device --device_map --calib_dataset --calib_tp_size
--calib_pp_size --dtype --qformat --seed --tokenizer_max_seq_length --batch_size --calib_size --calib_max_seq_length
--output_dir --tp_size --pp_size --cp_size --awq_block_size --kv_cache_dtype --quantize_lm_head"""
BUILD = """--checkpoint_dir --model_config --build_config --model_cls_file --model_cls_name --output_dir
--max_batch_size --max_input_len --max_seq_len --max_decoder_seq_len --max_beam_width --max_num_tokens --opt_num_tokens
--max_encoder_input_len --max_prompt_embedding_table_size --kv_cache_type --paged_kv_cache --input_timing_cache
--output_timing_cache --profiling_verbosity --strip_plan --weight_sparsity --weight_streaming --fast_build --workers
--log_level --logits_dtype --lora_dir --lora_ckpt_source --lora_target_modules --max_lora_rank
--gpt_attention_plugin --gemm_plugin --lora_plugin --nccl_plugin --remove_input_padding --use_paged_context_fmha
--use_fp8_context_fmha"""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_flag_is_one_that_the_program_has(version: str, name: str) -> None:
    converting, building = argv(version, SETTINGS[name])
    converter = CONVERT_QWEN if "/qwen/" in converting[1] else CONVERT_0_16
    assert trtllm.missing_flags(converting, QUANTIZE if "quantize.py" in converting[1] else converter) == []
    assert trtllm.missing_flags(building, BUILD) == []


@pytest.mark.parametrize(
    ("version", "folder"),
    [("0.16.0", "examples/llama/"), ("0.19.0", "examples/llama/"), ("0.20.0", "examples/models/core/llama/"),
     ("0.21.0", "examples/models/core/llama/"), ("1.1.0", "examples/models/core/llama/"),
     ("1.2.0rc2", "examples/models/core/llama/"), ("0.17.0.post1", "examples/llama/")],
)  # fmt: skip
def test_the_converter_lies_where_its_release_has_it(version: str, folder: str) -> None:
    assert folder in argv(version, {})[0][1]


@pytest.mark.parametrize("version", ["1.3.0", "1.3.0rc1", "1.4.0rc1", "2.0"])
def test_a_release_without_engines_is_refused_with_the_way_out(version: str) -> None:
    with pytest.raises(Refused, match="builds no engines any more") as caught:
        trtllm.release(version)
    assert "llmapi" in caught.value.hint


@pytest.mark.parametrize("version", ["0.15.0", "0.9.0", ""])
def test_a_release_older_than_the_table_is_refused(version: str) -> None:
    with pytest.raises(Refused, match=r"older than 0\.16"):
        trtllm.release(version)


def test_a_model_without_a_converter_is_refused() -> None:
    with pytest.raises(Refused, match="no converter for FalconForCausalLM"):
        argv("1.2.1", {"architecture": "FalconForCausalLM"})
