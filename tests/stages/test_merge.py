"""merge: the written model is base + adapter, whole, readable as asked, and never 4-bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc.core.errors import HpcError, UsageError
from hpc.inside import adapters
from stages import merge
from tests.support import tiny

RunStage = Callable[..., Any]


def test_what_it_asks_for_and_makes() -> None:
    config = merge.MergeConfig()
    assert merge.resources(config).gpus_per_node == 0
    assert merge.outputs(config)["model"].kind == "hf_model"


def test_the_base_is_the_recorded_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no adapter"):
        adapters.base_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="does not say which base"):
        adapters.base_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "theirs"}')
    assert adapters.base_of(tmp_path) == "theirs"
    (tmp_path / "base.json").write_text('{"base_model": "ours"}')
    assert adapters.base_of(tmp_path) == "ours"


def test_check_refuses_a_base_that_is_not_there() -> None:
    with pytest.raises(HpcError, match="no model at"):
        merge.check(merge.MergeConfig(base_model="./none"))


def make_adapter(base: Path, folder: Path, seed: int = 1, **options: Any) -> Path:
    """An adapter with large random weights, as peft saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config))
    for name, weight in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(weight, std=0.2)
        elif "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter"))


def logits(folder: Path, adapter: Path | None = None) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.inference_mode():
        return model.eval()(torch.tensor([[0, 5, 70, 99, 1]])).logits


@pytest.mark.generations
@pytest.mark.train
def test_the_merged_model_is_base_plus_adapter(run_stage: RunStage, tiny_model: Path, adapter: Path) -> None:
    result = run_stage("merge", {"adapter": adapter}, dtype="float32")
    assert result.code == 0
    together, apart = logits(result.out("model")), logits(tiny_model, adapter)
    assert float((together - apart).abs().max()) < 1e-4
    assert float((together - logits(tiny_model)).abs().max()) > 0.1
    assert result.metrics["largest_difference"] < 1e-4


@pytest.mark.generations
@pytest.mark.train
def test_the_written_folder_is_whole(run_stage: RunStage, tiny_model: Path, adapter: Path) -> None:
    result = run_stage("merge", {"adapter": adapter, "base_model": tiny_model}, ask="Which brick?")
    folder = result.out("model")
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["use_cache"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] in (1, [1])
    assert "im_start" in (folder / "chat_template.jinja").read_text()
    assert not list(folder.glob("*.bin"))
    assert result.metrics["question"] == "Which brick?"
    assert result.metrics["before"] != result.metrics["after"]


def untuned(tiny_model: Path, folder: Path) -> Path:
    """A base whose texts end otherwise than the turns of its chat template, as those of Qwen and Llama 3 do."""
    from transformers import AutoTokenizer

    shutil.copytree(tiny_model, folder)
    words = AutoTokenizer.from_pretrained(folder)
    words.eos_token = "<|im_start|>"
    words.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, "eos_token_id": 0}))
    return folder


@pytest.mark.generations
@pytest.mark.train
@pytest.mark.parametrize("method", ["merge", "peft", "full"])
def test_an_answer_ends_where_the_chat_template_ends_a_turn(
    run_stage: RunStage, tiny_model: Path, dataset: Path, tmp_path: Path, method: str
) -> None:
    from transformers import AutoTokenizer

    base = untuned(tiny_model, tmp_path / "base")
    if method == "full":
        given = {"base_model": base, "dataset": dataset}
        result = run_stage("finetune", given, method="full", max_steps=1, max_length=64)
    else:
        made = make_adapter(base, tmp_path / "adapter", **({"use_dora": True} if method == "peft" else {}))
        result = run_stage("merge", {"adapter": made})
    assert result.code == 0, result.error
    assert not (result.folder / "attempt-1" / "remark.json").exists()
    assert json.loads((result.out("model") / "generation_config.json").read_text())["eos_token_id"] == [1, 0]
    words = AutoTokenizer.from_pretrained(result.out("model"))
    assert (words.eos_token, words.chat_template) == ("<|im_end|>", tiny.TEMPLATE)


@pytest.mark.train
def test_what_ends_a_turn_stays_a_tokenizers_end_or_is_missed(
    run_stage: RunStage, adapter: Path, tmp_path: Path
) -> None:
    """A template that writes the tokenizer's end beside it would be changed; one without such a token is told of."""
    from transformers import AutoTokenizer, GenerationConfig

    from hpc.inside import generation

    words = AutoTokenizer.from_pretrained(adapter)
    words.eos_token, words.chat_template = "<|im_start|>", tiny.TEMPLATE + "{{ eos_token }}"
    made = GenerationConfig(eos_token_id=0)
    assert generation.mend(made, words)
    assert (made.eos_token_id, words.eos_token) == ([1, 0], "<|im_start|>")
    adapter = shutil.copytree(adapter, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("{% for m in messages %}### {{ m.role }}: {{ m.content }}{% endfor %}")
    result = run_stage("merge", {"adapter": adapter})
    remark = json.loads((result.folder / "attempt-1" / "remark.json").read_text())["remark"]
    assert "ends an answer with no token of its own" in remark


@pytest.fixture
def closed_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.train
@pytest.mark.usefixtures("closed_umask")
@pytest.mark.parametrize(("readable", "modes"), [(False, (0o600, 0o700)), (True, (0o644, 0o755))])
def test_who_may_read_it(run_stage: RunStage, adapter: Path, readable: bool, modes: tuple[int, int]) -> None:
    folder = run_stage("merge", {"adapter": adapter}, readable=readable).out("model")
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {modes[0]}
    assert folder.stat().st_mode & 0o777 == modes[1]


@pytest.mark.train
def test_a_token_without_a_weight_is_dropped(run_stage: RunStage, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    padded = tmp_path / "padded"
    shutil.copytree(adapter, padded)
    words = AutoTokenizer.from_pretrained(padded)
    words.add_special_tokens({"pad_token": "[PAD]"})
    words.save_pretrained(padded)
    result = run_stage("merge", {"adapter": padded})
    assert result.metrics["dropped_tokens"] == ["[PAD]"]
    written = AutoTokenizer.from_pretrained(result.out("model"))
    assert len(written) == 258
    assert written.chat_template == words.chat_template


@pytest.mark.generations
@pytest.mark.train
def test_added_tokens_with_weights_of_their_own_stay(run_stage: RunStage, tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tiny_model)
    words.add_tokens(["<tool>", "</tool>"])

    def wide() -> Any:
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        model.resize_token_embeddings(260, mean_resizing=False)
        return model

    for folder, modules in (("whole", ["embed_tokens", "lm_head"]), ("half", ["embed_tokens"])):
        config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules, task_type="CAUSAL_LM")
        get_peft_model(wide(), config).save_pretrained(tmp_path / folder, save_embedding_layers=False)
        words.save_pretrained(tmp_path / folder)
    given = {"adapter": tmp_path / "whole", "base_model": tiny_model}
    result = run_stage("merge", given, dtype="float32", ask="Which brick?")
    assert (result.code, result.metrics["merged_by"]) == (0, "peft"), result.error
    assert len(AutoTokenizer.from_pretrained(result.out("model"))) == 260
    ids = torch.tensor([[0, 5, 258, 259, 1]])
    apart = PeftModel.from_pretrained(wide(), str(tmp_path / "whole")).eval()
    merged = AutoModelForCausalLM.from_pretrained(result.out("model"), dtype=torch.float32)
    with torch.inference_mode():
        assert float((merged(ids).logits - apart(ids).logits).abs().max()) < 1e-4
    result = run_stage("merge", {**given, "adapter": tmp_path / "half"}, folder="half")
    assert (result.code, "lacks their weights in lm_head.weight" in result.error["cause"]) == (6, True)


@pytest.mark.train
def test_another_models_adapter_is_refused(
    run_stage: RunStage, tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    other = tmp_path / "other"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=258, **shape)).save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(other)
    result = run_stage("merge", {"adapter": adapter, "base_model": other})
    assert result.code == 6
    assert "does not fit the base" in result.error["cause"]
    assert not result.out("model").exists()


@pytest.mark.train
def test_a_broken_adapter_is_refused(run_stage: RunStage, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    weights = load_file(broken / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    result = run_stage("merge", {"adapter": broken})
    assert result.code == 6
    assert "not finite" in result.error["cause"]
    weights.pop(next(name for name in weights if ".lora_B." in name))
    for left, told in ((weights, "one of the two matrices for model.layers.0."), ({}, "every matrix")):
        save_file(left, broken / "adapter_model.safetensors", metadata={"format": "pt"})
        result = run_stage("merge", {"adapter": broken}, folder=f"of-{len(left)}")
        assert (result.code, f"lacks {told}" in result.error["cause"]) == (6, True), result.error


@pytest.mark.train
def test_after_qlora_the_model_is_not_quantised(run_stage: RunStage, tiny_model: Path, dataset: Path) -> None:
    trained = run_stage(
        "finetune",
        {"base_model": tiny_model, "dataset": dataset},
        **{"method": "qlora", "max_steps": 2, "max_length": 64, "lora_r": 4, "learning_rate": 1e-2},
    )
    result = run_stage("merge", {"adapter": trained.out("adapter")}, dtype="float32")
    assert result.code == 0
    assert "quantization_config" not in json.loads((result.out("model") / "config.json").read_text())
    apart = logits(tiny_model, trained.out("adapter"))
    assert float((logits(result.out("model")) - apart).abs().max()) < 1e-4


@pytest.mark.generations
@pytest.mark.train
@pytest.mark.parametrize(
    ("options", "by"),
    [
        ({"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"layers.1.mlp.up_proj": 2}}, "hpc"),
        ({"use_dora": True}, "peft"),
        ({"modules_to_save": ["lm_head"]}, "peft"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "peft"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "peft"),
        ({"init_lora_weights": "pissa"}, "peft"),
        ({"init_lora_weights": "olora"}, "peft"),
    ],
    ids=["rslora", "dora", "modules_to_save", "embeddings", "bias", "pissa", "olora"],
)
def test_every_kind_of_lora_is_merged_right(
    run_stage: RunStage, tiny_model: Path, tmp_path: Path, options: dict[str, Any], by: str
) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", **options)
    result = run_stage("merge", {"adapter": adapter}, dtype="float32")
    assert (result.code, result.metrics["merged_by"]) == (0, by)
    together, apart = logits(result.out("model")), logits(tiny_model, adapter)
    assert float((together - apart).abs().max()) < 1e-4
    assert float((together - logits(tiny_model)).abs().max()) > 0.01


@pytest.mark.generations
@pytest.mark.train
def test_a_base_in_shards_with_tied_embeddings(run_stage: RunStage, tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = tmp_path / "base"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=258, **shape, tie_word_embeddings=True)).half().save_pretrained(
        base, max_shard_size="100KB"
    )
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    assert len(list(base.glob("*.safetensors"))) > 1
    adapter = make_adapter(base, tmp_path / "adapter")
    for dtype, allowed in (("float32", 1e-4), ("float16", 0.02), ("bfloat16", 0.1)):
        result = run_stage("merge", {"adapter": adapter}, folder=dtype, dtype=dtype)
        model = result.out("model")
        assert (result.code, result.metrics["merged_by"]) == (0, "hpc")
        assert {p.name for p in model.glob("*.safetensors")} == {p.name for p in base.glob("*.safetensors")}
        assert float((logits(model) - logits(base, adapter)).abs().max()) < allowed
        assert result.metrics["largest_difference"] < allowed
    small = tmp_path / "small"  # its head is the embeddings: adding to one would change the other
    result = run_stage(
        "merge", {"adapter": make_adapter(base, small, target_modules=["embed_tokens"])}, folder="tied", dtype="float32"
    )
    assert (result.code, "tied" in result.error["hint"]) == (6, True)


@pytest.mark.train
def test_a_single_number_is_converted_too(run_stage: RunStage, tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(tiny_model, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    number = "model.layers.0.attention.masked_bias"  # as GPT-NeoX has it
    save_file({**weights, number: torch.tensor(-1e4)}, base / "model.safetensors", metadata={"format": "pt"})
    result = run_stage("merge", {"adapter": adapter, "base_model": base}, dtype="float16")
    assert result.code == 0, result.error
    found = load_file(result.out("model") / "model.safetensors")[number]
    assert (found.dtype, found.item()) == (torch.float16, -1e4)


@pytest.mark.train
def test_several_adapters_are_added_by_their_weights(
    run_stage: RunStage, tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    other = make_adapter(tiny_model, tmp_path / "other", seed=2, r=2)
    both = {"more_adapters": (str(other),), "weights": (0.5, 2.0), "dtype": "float32"}
    model = run_stage("merge", {"adapter": adapter}, **both).out("model")
    name = "model.layers.1.mlp.up_proj"
    base, merged = (load_file(f / "model.safetensors")[f"{name}.weight"] for f in (tiny_model, model))
    for folder, scale in ((adapter, 0.5 * 8 / 4), (other, 2.0 * 8 / 2)):
        weights = load_file(folder / "adapter_model.safetensors")
        a, b = (weights[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        base += scale * (b @ a)
    assert float((merged - base).abs().max()) < 1e-5
    dora = make_adapter(tiny_model, tmp_path / "dora", use_dora=True)
    result = run_stage("merge", {"adapter": adapter}, folder="refused", more_adapters=(str(dora),))
    assert (result.code, "DoRA" in result.error["cause"]) == (3, True)
    result = run_stage("merge", {"adapter": dora}, folder="alone", weights=(0.5,))
    assert (result.code, "can't be weighted: it is a DoRA" in result.error["cause"]) == (3, True)


def test_weights_must_fit_the_adapters() -> None:
    with pytest.raises(UsageError, match=r"2 values for 1 adapters"):
        merge.check(merge.MergeConfig(weights=(1.0, 2.0)))


@pytest.mark.train
def test_what_cannot_be_read(run_stage: RunStage, tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    def said(**settings: Any) -> Callable[[Path], Any]:
        def write(folder: Path) -> None:
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))

        return write

    for name, spoil, message in (
        ("lora_ga", said(init_lora_weights="lora_ga"), "changed the base by what is not in the adapter"),
        ("layers", said(layer_replication=[[0, 2], [1, 2]]), "repeats layers of its base"),
        ("pickle", lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "as a pickle"),
        ("cut", lambda f: os.truncate(f / "adapter_model.safetensors", 5000), "cut off"),
    ):
        spoilt = shutil.copytree(adapter, tmp_path / name)
        spoil(spoilt)
        assert message in run_stage("merge", {"adapter": spoilt}, folder=name).error["cause"]
    quantised = shutil.copytree(tiny_model, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    result = run_stage("merge", {"adapter": adapter, "base_model": quantised})
    assert "stored quantised (gptq)" in result.error["cause"]
