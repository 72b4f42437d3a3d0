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
from stages import merge

RunStage = Callable[..., Any]


def test_what_it_asks_for_and_makes() -> None:
    config = merge.MergeConfig()
    assert merge.resources(config).gpus_per_node == 0
    assert merge.outputs(config)["model"].kind == "hf_model"


def test_the_base_is_the_recorded_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no adapter"):
        merge.recorded_base(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="does not say which base"):
        merge.recorded_base(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "theirs"}')
    assert merge.recorded_base(tmp_path) == "theirs"
    (tmp_path / "base.json").write_text('{"base_model": "ours"}')
    assert merge.recorded_base(tmp_path) == "ours"


def test_check_refuses_a_base_that_is_not_there() -> None:
    with pytest.raises(HpcError, match="no model at"):
        merge.check(merge.MergeConfig(base_model="./none"))


@pytest.fixture(scope="session")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with large random weights, as peft saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def logits(folder: Path, adapter: Path | None = None) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.inference_mode():
        return model.eval()(torch.tensor([[0, 5, 70, 99, 1]])).logits


@pytest.mark.train
def test_the_merged_model_is_base_plus_adapter(run_stage: RunStage, tiny_model: Path, adapter: Path) -> None:
    result = run_stage("merge", {"adapter": adapter}, dtype="float32")
    assert result.code == 0
    together, apart = logits(result.out("model")), logits(tiny_model, adapter)
    assert float((together - apart).abs().max()) < 1e-4
    assert float((together - logits(tiny_model)).abs().max()) > 0.1
    assert result.metrics["largest_difference"] < 1e-4


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
