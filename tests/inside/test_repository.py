"""Triton's model repository is complete and consistent before a server sees it, for every engine."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc.core import passport
from hpc.core.assets import TEMPLATES
from hpc.core.errors import HpcError, UsageError, VerificationFailed
from hpc.inside import pbtxt, repository
from hpc.inside import vendor as nvidia
from hpc.inside.repository import ENGINES, Settings
from stages import serve
from tests.support import vendor

TRITON = TEMPLATES / "triton"
LAB = Settings(
    triton_max_batch_size=64, decoupled_mode=False, preprocessing_instance_count=2, postprocessing_instance_count=3,
    bls_instance_count=4, max_queue_delay_microseconds=5, max_queue_size=6, max_tokens_in_paged_kv_cache=2560,
    max_attention_window_size=2561, kv_cache_free_gpu_mem_fraction=0.5, exclude_input_in_output=True,
    enable_kv_cache_reuse=True, enable_chunked_context=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def image(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the code that NVIDIA's images have."""
    folder = tmp_path_factory.mktemp("image")
    (folder / "model.py").write_text("# the vendor's")
    monkeypatch.setattr(repository, "_IMAGE_LLMAPI", folder)
    return folder


def render(folder: Path, engine: str, settings: Settings = LAB, engine_dir: Path = Path("/e")) -> Path:
    target = folder / "repository"
    repository.render(target, engine, TRITON, repository.values(engine, engine_dir, Path("/t"), settings))
    return target


def config(folder: Path, model: str) -> pbtxt.Message:
    return pbtxt.parse((folder / model / "config.pbtxt").read_text())


@pytest.mark.parametrize("engine", ["onnxruntime_genai", "tensorrt_llm"])
def test_the_five_models_with_the_labs_settings(tmp_path: Path, engine: str) -> None:
    made = render(tmp_path, engine)
    names = {"preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls"}
    assert {path.name for path in made.iterdir()} == names
    models = {name: config(made, name) for name in names}
    assert {m["max_batch_size"][0] for m in models.values()} == {"64"}
    assert {name for name in names if repository.decoupled(models[name])} == set()
    counts = {n: m["instance_group"][0].get("count") for n, m in models.items() if "instance_group" in m}
    assert counts == {
        "preprocessing": ["2"], "postprocessing": ["3"], "tensorrt_llm_bls": ["4"], "tensorrt_llm": ["1"],
    }  # fmt: skip
    assert repository.parameter(models["tensorrt_llm"], "gpt_model_path") == "/e"
    assert repository.parameter(models["preprocessing"], "tokenizer_dir") == "/t"
    assert models["tensorrt_llm"]["dynamic_batching"][0]["max_queue_delay_microseconds"] == ["5"]


def test_tritons_own_queues_refuse_nothing_that_the_door_lets_in() -> None:
    found = [serve.most(serve.ServeConfig(max_batch_size=8, queue_size=n, engine_batch_size=b)) for n, b in
             ((0, 0), (0, 2), (6, 0), (6, 2))]  # fmt: skip
    assert found == [0, 0, 14, 8]


def test_the_engine_backend_has_what_was_set_and_nothing_else(tmp_path: Path) -> None:
    found = config(render(tmp_path, "tensorrt_llm"), "tensorrt_llm")
    parameters = {p["key"][0]: p["value"][0]["string_value"][0] for p in found["parameters"]}
    assert found["backend"] == ["tensorrtllm"]
    assert parameters == {
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no", "gpt_model_path": "/e", "gpt_model_type": "inflight_fused_batching",
        "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
        "max_beam_width": "1", "max_tokens_in_paged_kv_cache": "2560", "max_attention_window_size": "2561",
        "batch_scheduler_policy": "guaranteed_no_evict", "kv_cache_free_gpu_mem_fraction": "0.5",
        "exclude_input_in_output": "true", "cancellation_check_period_ms": "100", "enable_kv_cache_reuse": "true",
        "enable_chunked_context": "true", "tokenizer_dir": "", "xgrammar_tokenizer_info_path": "",
        "guided_decoding_backend": "",
    }  # fmt: skip


def test_tensorrt_llm_is_told_by_the_names_of_every_release(tmp_path: Path) -> None:
    """A backend ignores what it does not know, in silence: up to 0.19 min_length and random_seed, then the others."""
    made = render(tmp_path, "tensorrt_llm")
    inputs = {i["name"][0]: i for i in config(made, "tensorrt_llm")["input"]}
    (_, step, _) = config(made, "ensemble")["ensemble_scheduling"][0]["step"]
    maps = {m["key"][0]: m["value"][0] for m in step["input_map"]}
    for name, kind in (("min_tokens", "TYPE_INT32"), ("random_seed", "TYPE_UINT64")):
        asked = [engines for engines, value in maps.items() if value == name]
        assert sorted(asked) == sorted((name, {"min_tokens": "min_length", "random_seed": "seed"}[name]))
        assert [(inputs[a]["data_type"], inputs[a]["optional"]) for a in asked] == [([kind], ["true"])] * 2


def test_our_own_engine_makes_the_text_of_an_answer_itself(tmp_path: Path) -> None:
    """Its ensemble asks nobody else for it, nor by names that the engine has not."""
    made = render(tmp_path, "onnxruntime_genai")
    (_, step) = config(made, "ensemble")["ensemble_scheduling"][0]["step"]
    engine = config(made, "tensorrt_llm")
    for kind, names in (("input_map", "input"), ("output_map", "output")):
        assert {m["key"][0] for m in step[kind]} <= {entry["name"][0] for entry in engine[names]}
    assert {m["value"][0] for m in step["output_map"]} == {o["name"][0] for o in config(made, "ensemble")["output"]}


def test_llmapi_streams_because_it_is_written_out(tmp_path: Path) -> None:
    made = render(tmp_path, "llmapi", Settings())
    assert repository.decoupled(config(made, "tensorrt_llm"))
    text = (made / "tensorrt_llm" / "1" / "model.yaml").read_text()
    assert 'model: "/e"' in text
    for line in ("dtype: auto", "max_batch_size: 64", "max_seq_len: null", "  max_tokens: null",
                 "  max_attention_window: null", "  enable_block_reuse: false"):  # fmt: skip
        assert f"\n{line}\n" in text
    asked = Settings(max_seq_len=4096, max_tokens_in_paged_kv_cache=9999, max_attention_window_size=512,
                     enable_kv_cache_reuse=True, kv_cache_dtype="fp8", engine_max_batch_size=8)  # fmt: skip
    told = (render(tmp_path, "llmapi", asked) / "tensorrt_llm" / "1" / "model.yaml").read_text()
    for line in ("max_batch_size: 8", "max_seq_len: 4096", "  max_tokens: 9999", "  max_attention_window: [512]",
                 "  enable_block_reuse: true", "  dtype: fp8"):  # fmt: skip
        assert f"\n{line}\n" in told
    assert "decoupled: true" in text
    assert "${" not in text
    assert (made / "tensorrt_llm" / "1" / "model.py").read_text() == "# the vendor's"
    ensemble = (made / "ensemble" / "config.pbtxt").read_text()
    assert 'key: "sampling_param_exclude_input_from_output" value: "exclude_input"' in ensemble


def test_llmapi_knows_its_adapters_beforehand(tmp_path: Path) -> None:
    for name, rank in (("a", 8), ("b", 64)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(f'{{"r": {rank}}}')
    told = serve.lora_config([str(tmp_path / "a"), str(tmp_path / "b")])
    made = render(tmp_path, "llmapi", Settings(enable_lora=True, lora_config=told))
    text = (made / "tensorrt_llm" / "1" / "model.yaml").read_text()
    assert "enable_lora: true" in text
    assert f"lora_config: {{lora_dir: ['{tmp_path}/a'], max_lora_rank: 64, max_loras: 2, max_cpu_loras: 2}}" in text
    for model in ("ensemble", "tensorrt_llm"):
        assert {"lora_id", "lora_name", "lora_path"} <= {i["name"][0] for i in config(made, model)["input"]}
    plain = render(tmp_path, "llmapi", Settings())
    assert "lora_config: null" in (plain / "tensorrt_llm" / "1" / "model.yaml").read_text()


def test_llmapi_needs_the_images_own_code(tmp_path: Path, image: Path) -> None:
    (image / "model.py").unlink()
    with pytest.raises(HpcError, match=r"model\.py is not there"):
        render(tmp_path, "llmapi", Settings())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be 1 or more"),
        ({"stream_interval_ms": -1}, "stream_interval_ms must be 0 or more"),
        ({"successors": -1}, "successors must be 0 or more"),
        ({"handover_min": 0}, "handover_min 1 or more"),
        ({"lora_cache_fraction": 0.0}, "more than 0, and 1 at most"),
        ({"extra": ("alone",)}, "'alone' is not name=value"),
        ({"vendor_repository": "/app"}, "is for tensorrt_llm alone"),
    ],
)
def test_settings_that_could_not_work_are_refused(wrong: dict[str, Any], told: str) -> None:
    serve.check(serve.ServeConfig(engine="onnxruntime_genai"))
    with pytest.raises(UsageError, match=told):
        serve.check(serve.ServeConfig(engine="onnxruntime_genai", **wrong))


@pytest.mark.parametrize("streaming", [True, False])
def test_one_switch_sets_streaming_everywhere(tmp_path: Path, streaming: bool) -> None:
    made = render(tmp_path, "onnxruntime_genai", Settings(decoupled_mode=streaming))
    for model in ("tensorrt_llm", "tensorrt_llm_bls"):
        assert repository.decoupled(config(made, model)) is streaming


def test_made_again_for_another_engine_nothing_of_the_first_stays(tmp_path: Path) -> None:
    made = render(tmp_path, "onnxruntime_genai")
    (made / "tensorrt_llm" / "1" / "old").touch()
    made = render(tmp_path, "tensorrt_llm", engine_dir=Path("/other"))
    assert not (made / "tensorrt_llm" / "1" / "old").exists()
    assert not (made / "tensorrt_llm" / "1" / "model.py").exists()
    assert repository.parameter(config(made, "tensorrt_llm"), "gpt_model_path") == "/other"
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


@pytest.mark.parametrize("path", ['/a "b"', "/a\\b", "/한글 폴더", "/a${b}"])
def test_odd_paths_come_through(tmp_path: Path, path: str) -> None:
    try:
        made = render(tmp_path, "onnxruntime_genai", engine_dir=Path(path))
    except VerificationFailed:
        assert "${" in path  # it cannot be told from a name that was forgotten
        return
    assert repository.parameter(config(made, "tensorrt_llm"), "gpt_model_path") == path


def test_a_name_without_a_value_is_told_and_leaves_the_old_one(tmp_path: Path) -> None:
    old = render(tmp_path, "onnxruntime_genai")
    values = repository.values("onnxruntime_genai", Path("/e"), Path("/t"), LAB)
    del values["max_queue_size"]
    with pytest.raises(HpcError, match=r"\$\{max_queue_size\}"):
        repository.render(old, "onnxruntime_genai", TRITON, values)
    repository.check(old)
    with pytest.raises(HpcError, match=r"\$\{open"):
        repository.fill("x: ${open", {"open": "1"})


@pytest.mark.parametrize("release", vendor.RELEASES)
def test_nvidias_own_repository_is_filled_whole(tmp_path: Path, release: str) -> None:
    source = vendor.make(tmp_path / "image", release)
    values = repository.values("tensorrt_llm", Path("/e"), Path("/t"), LAB)
    made = tmp_path / "made"
    repository.render(made, "tensorrt_llm", TRITON, nvidia.complete(source, values), source)
    assert not [path for path in made.rglob("*.pbtxt") if "${" in path.read_text()]
    backend = config(made, "tensorrt_llm")
    assert backend["backend"] == ["tensorrtllm"]
    found = {p["key"][0]: p["value"][0]["string_value"][0] for p in backend["parameters"]}
    assert (found["gpt_model_path"], found["gpt_model_type"]) == ("/e", "inflight_fused_batching")
    assert (found["max_tokens_in_paged_kv_cache"], found["enable_kv_cache_reuse"]) == ("2560", "true")
    assert {found[name] for name in ("encoder_model_path", "gpu_device_ids", "decoding_mode", "medusa_choices")} == {""}
    other = {"min_tokens": "min_length"} if release != "later" else {"random_seed": "seed"}
    bos = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"post_processor": bos}))
    assert nvidia.known(made, tmp_path) == {"cumulative": True, "names": other, "begins": "<s>"}
    values.update(accumulate_tokens="false", add_special_tokens="false")
    repository.render(made, "tensorrt_llm", TRITON, nvidia.complete(source, values), source)
    assert nvidia.known(made, tmp_path) == {"cumulative": False, "names": other, "begins": ""}


def test_all_that_nvidias_repository_lacks_is_told_at_once(tmp_path: Path) -> None:
    source = vendor.make(tmp_path / "image", "v0.19.0")
    values = repository.values("tensorrt_llm", Path("/e"), Path("/t"), LAB)
    for model in ("ensemble", "tensorrt_llm"):
        with (source / model / "config.pbtxt").open("a") as file:
            file.write(f"version_policy: ${{later_{model}}}\n")
    with pytest.raises(HpcError, match=r"asks for \$\{later_ensemble\}, \$\{later_tensorrt_llm\}, which") as told:
        nvidia.complete(source, values)
    assert "serve.extra" in str(told.value.hint)
    shutil.rmtree(source / "postprocessing")
    shutil.rmtree(source / "tensorrt_llm_bls")
    with pytest.raises(HpcError, match=r"no model postprocessing, tensorrt_llm_bls, and asks for \$\{later_"):
        nvidia.complete(source, values)
    with pytest.raises(HpcError, match="is not there"):
        nvidia.complete(source / "none", values)


def test_nvidias_own_answers_as_many_at_once_as_are_taken(tmp_path: Path) -> None:
    source = vendor.make(tmp_path / "image", "v0.19.0")
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "tokenizer.json").write_text("{}")
    passport.write(engine, passport.Passport(
        engine="tensorrt_llm", model="m", architecture="LlamaForCausalLM", image="i", dtype="float16",
        max_batch_size=5, max_input_len=1, max_seq_len=1,
    ))  # fmt: skip
    served = serve.ServeConfig(engine="tensorrt_llm", max_batch_size=5, vendor_repository=str(source))
    made = tmp_path / "made"

    def count(served: serve.ServeConfig) -> Any:
        serve.make_repository(served, engine, made)
        return config(made, "tensorrt_llm_bls")["instance_group"][0]["count"]

    assert count(served) == ["5"]
    assert count(replace(served, bls_instances=2)) == ["2"]
    assert count(replace(served, vendor_repository="")) == ["1"]


BREAK = {
    "do not agree on decoupled": ("tensorrt_llm_bls", "decoupled: false", "decoupled: true"),
    "calls elsewhere, which is not there": ("tensorrt_llm_bls", '"tensorrt_llm"', '"elsewhere"'),
    "has a step elsewhere": ("ensemble", 'model_name: "preprocessing"', 'model_name: "elsewhere"'),
    "calls itself other": ("preprocessing", 'name: "preprocessing"', 'name: "other"'),
    "still asks for": ("preprocessing", '"/t"', '"${tokenizer_dir}"'),
    "not readable at line": ("preprocessing", "max_batch_size: 64", "max_batch_size: }"),
}


@pytest.mark.parametrize("told", BREAK)
def test_what_triton_would_accept_and_not_serve_is_refused(tmp_path: Path, told: str) -> None:
    made = render(tmp_path, "onnxruntime_genai")
    model, old, new = BREAK[told]
    path = made / model / "config.pbtxt"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(VerificationFailed, match=told):
        repository.check(made)


def test_a_model_without_its_code_is_refused(tmp_path: Path) -> None:
    made = render(tmp_path, "onnxruntime_genai")
    (made / "postprocessing" / "1" / "model.py").unlink()
    with pytest.raises(VerificationFailed, match=r"postprocessing has no 1/model\.py"):
        repository.check(made)


def test_every_engine_can_be_rendered(tmp_path: Path) -> None:
    for engine in ENGINES:
        render(tmp_path / engine, engine, Settings())


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(HpcError, match=r"has no tokenizer\.json"):
        repository.tokenizer_of(tmp_path, "")
    (tmp_path / "tokenizer.json").touch()
    assert repository.tokenizer_of(Path("/engine"), str(tmp_path)) == tmp_path


# ---- the reader of the text format


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: 1", {"a": ["1"]}),
        ("a: 1 a: 2 # no\nb { c: -1.5e3 }", {"a": ["1", "2"], "b": [{"c": ["-1.5e3"]}]}),
        ("a: [ { b: X }, { b: Y } ],", {"a": [{"b": ["X"]}, {"b": ["Y"]}]}),
        ('a: "x" "y" b: \'\\"z\'', {"a": ["xy"], "b": ['"z']}),
        ("a: < b: 1; >", {"a": [{"b": ["1"]}]}),
        ("a: [ ]", {"a": []}),
    ],
)
def test_text_format(text: str, found: pbtxt.Message) -> None:
    assert pbtxt.parse(text) == found


@pytest.mark.parametrize("text", ["a:", "a: {", "a }", ": 1", 'a: "x', "a: $", "\n\na: [1"])
def test_text_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(VerificationFailed, match="line"):
        pbtxt.parse(text)
