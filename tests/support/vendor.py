"""A STUB of NVIDIA's own repository (inflight_batcher_llm): the names and shape of its files, none of its code.

The names are those of triton-inference-server/tensorrtllm_backend, tags v0.16.0 and v0.19.0, all_models/
inflight_batcher_llm, and of NVIDIA/TensorRT-LLM, triton_backend/all_models, after that ("later").
"""

from __future__ import annotations

from pathlib import Path

_OF_ENGINE = """
    max_beam_width gpt_model_type=batching_strategy gpt_model_path=engine_dir encoder_model_path=encoder_engine_dir
    max_tokens_in_paged_kv_cache max_attention_window_size sink_token_length batch_scheduler_policy
    kv_cache_free_gpu_mem_fraction cross_kv_cache_fraction kv_cache_host_memory_bytes kv_cache_onboard_blocks
    exclude_input_in_output cancellation_check_period_ms stats_check_period_ms
    iter_stats_max_iterations request_stats_max_iterations enable_kv_cache_reuse normalize_log_probs
    enable_chunked_context gpu_device_ids participant_ids lora_cache_optimal_adapter_size lora_cache_max_adapter_size
    lora_cache_gpu_memory_fraction lora_cache_host_memory_bytes decoding_mode medusa_choices eagle_choices
    gpu_weights_percent enable_context_fmha_fp32_acc multi_block_mode cuda_graph_mode cuda_graph_cache_size
    speculative_decoding_fast_logits
"""
_SINCE_19 = """
    num_nodes lora_prefetch_dir lookahead_window_size lookahead_ngram_size lookahead_verification_set_size
    tokenizer_dir guided_decoding_backend xgrammar_tokenizer_info_path
"""
_OF_BLS = "accumulate_tokens tensorrt_llm_model_name tensorrt_llm_draft_model_name multimodal_encoders_name"
_ASKED = "max_tokens:TYPE_INT32 stop_words:TYPE_STRING top_k:TYPE_INT32 stream:TYPE_BOOL"
_FIRST_NAMES, _LATER_NAMES = "min_length:TYPE_INT32 random_seed:TYPE_UINT64", "min_tokens:TYPE_INT32 seed:TYPE_UINT64"
_LOGITS, _PYTHON = "${logits_datatype}", 'backend: "python"'
_DECOUPLED = "model_transaction_policy {\n  decoupled: ${decoupled_mode}\n}\n"
_QUEUE = """dynamic_batching {
    preferred_batch_size: [ ${triton_max_batch_size} ]
    max_queue_delay_microseconds: ${max_queue_delay_microseconds}
    default_queue_policy: { max_queue_size: ${max_queue_size} }
}
"""
RELEASES = ("v0.16.0", "v0.19.0", "later")


def make(folder: Path, release: str) -> Path:
    """The five models, to be filled."""
    old, later = release == "v0.16.0", release == "later"
    inputs = _tensors("input", f"text_input:TYPE_STRING {_ASKED} {_LATER_NAMES if later else _FIRST_NAMES}")
    outputs = _tensors("output", f"text_output:TYPE_STRING generation_logits:{'TYPE_FP32' if old else _LOGITS}")
    table = "prompt_embedding_table:${prompt_embedding_table_data_type}" if later else ""
    features = _tensors(
        "input", f"input_ids:TYPE_INT32 encoder_input_features:${{encoder_input_features_data_type}} {table}"
    )
    prepares = (
        f"tokenizer_dir add_special_tokens {'visual' if old else 'multimodal'}_model_path gpt_model_path=engine_dir"
    )
    prepares += " max_num_images" + (" hf_model_path" if later else "")
    of_engine = _parameters(_OF_ENGINE + ("" if old else _SINCE_19) + (" enable_trt_overlap" if later else ""))
    steps = ",\n".join(map(_step, ("preprocessing", "tensorrt_llm", "postprocessing")))
    for model, text in {
        "preprocessing": ("" if old else _QUEUE) + _tensors("input", "QUERY:TYPE_STRING") + _parameters(prepares),
        "postprocessing": "dynamic_batching {}\n"
        + _tensors("input", "TOKENS_BATCH:TYPE_INT32 SEQUENCE_LENGTH:TYPE_INT32")
        + _parameters("tokenizer_dir skip_special_tokens"),
        "tensorrt_llm": _DECOUPLED + _QUEUE + features + outputs + of_engine,
        "tensorrt_llm_bls": _DECOUPLED + inputs + outputs + _parameters(_OF_BLS),
        "ensemble": f"{inputs}{outputs}ensemble_scheduling {{\n  step [\n{steps}\n  ]\n}}\n",
    }.items():
        _write(folder / model, text)
    return folder


def _write(folder: Path, text: str) -> None:
    """A model; those with instances to be counted are in Python."""
    (folder / "1").mkdir(parents=True)
    kinds = {"tensorrt_llm": 'backend: "${triton_backend}"', "ensemble": 'platform: "ensemble"'}
    head = f'name: "{folder.name}"\n{kinds.get(folder.name, _PYTHON)}\nmax_batch_size: ${{triton_max_batch_size}}\n'
    if folder.name not in kinds:
        count = folder.name.replace("tensorrt_llm_bls", "bls")
        text += f"instance_group [\n  {{\n    count: ${{{count}_instance_count}}\n    kind: KIND_CPU\n  }}\n]\n"
        (folder / "1" / "model.py").touch()
    (folder / "config.pbtxt").write_text(head + text)


def _tensors(kind: str, wanted: str) -> str:
    pairs = (entry.split(":") for entry in wanted.split())
    said = [f'  {{\n    name: "{name}"\n    data_type: {of}\n    dims: [ -1 ]\n  }}' for name, of in pairs]
    return f"{kind} [\n" + ",\n  # of the next one: ${nothing}\n".join(said) + "\n]\n"


def _step(model: str) -> str:
    maps = (
        '      input_map {\n        key: "a",\n        value: "b"\n      },\n      output_map { key: "c" value: "d" }\n'
    )
    return f'    {{\n      model_name: "{model}"\n      model_version: -1\n{maps}    }}'


def _parameters(names: str) -> str:
    pairs = [(key, name or key) for key, _, name in (entry.partition("=") for entry in names.split())]
    return "".join(
        f'parameters: {{\n  key: "{key}"\n  value: {{\n    string_value: "${{{name}}}"\n  }}\n}}\n'
        for key, name in pairs
    )
