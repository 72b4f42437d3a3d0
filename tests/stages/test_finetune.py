"""finetune: real trl on a tiny model - resume, divergence, 4 bit, the labels, and what is refused before the queue."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc.core import presets
from hpc.core.errors import STOPPED, HpcError, UsageError
from hpc.inside import adapters
from stages import finetune

RunStage = Callable[..., Any]

SMALL: dict[str, Any] = {
    "lora_r": 4,
    "lora_alpha": 8,
    "target_modules": ("all-linear",),
    "learning_rate": 1e-2,
    "batch_size": 4,
    "max_length": 64,
    "max_steps": 8,
    "save_steps": 3,
    "gradient_checkpointing": False,
}


def inputs(model: Path, dataset: Path) -> dict[str, Path]:
    return {"base_model": model, "dataset": dataset}


def test_what_it_asks_for_and_makes() -> None:
    lora, full = finetune.FinetuneConfig(), finetune.FinetuneConfig(method="full")
    assert finetune.resources(lora).gpus_per_node == 1
    assert finetune.resources(full).mem_gb > finetune.resources(lora).mem_gb
    assert {name: a.kind for name, a in finetune.outputs(lora).items()} == {"adapter": "lora_adapter"}
    assert {name: a.kind for name, a in finetune.outputs(full).items()} == {"model": "hf_model"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be more than 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": 0.0}, "no step to do"),
        ({"max_steps": 0}, "no step to do"),
        ({"max_length": 1}, "max_length"),
        ({"lora_dropout": 1.0}, "between 0 and 1"),
        ({"base_model": "/no/such/model"}, "no model at /no/such/model"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
        ({"method": "qlora", "sharding": "fsdp"}, "4 bit can't be divided"),
    ],
)
def test_check_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HpcError, match=message):
        finetune.check(finetune.FinetuneConfig(**options))


def test_check_passes_a_hub_name_and_the_defaults() -> None:
    finetune.check(finetune.FinetuneConfig(base_model="organisation/name"))


@pytest.mark.generations
@pytest.mark.train
def test_an_adapter_is_made_and_the_held_out_loss_falls(run_stage: RunStage, tiny_model: Path, dataset: Path) -> None:
    result = run_stage("finetune", inputs(tiny_model, dataset), **SMALL)
    assert result.code == 0
    metrics, adapter = result.metrics, result.out("adapter")
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"] - 0.2
    assert (metrics["steps"], metrics["train_rows"], metrics["eval_rows"], metrics["train_cut"]) == (8, 24, 4, 0)
    assert len(metrics["losses"]) == 8
    assert json.loads((adapter / "base.json").read_text())["base_model"] == str(tiny_model)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)
    assert (adapter / "tokenizer.json").is_file()
    assert not list(adapter.glob("*.bin"))
    umask = os.umask(0)
    os.umask(umask)
    assert (adapter / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644 & ~umask
    told = [event for event in result.events if event.get("message") == "training"]
    assert told
    assert all({"loss", "learning_rate"} <= set(event) for event in told)


@pytest.mark.generations
@pytest.mark.train
def test_a_resumed_run_ends_with_the_losses_of_an_uninterrupted_one(
    run_stage: RunStage,
    tiny_model: Path,
    dataset: Path,
    stop_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run_stage("finetune", inputs(tiny_model, dataset), folder="whole", **SMALL)
    with monkeypatch.context():
        stop_after(4)
        stopped = run_stage("finetune", inputs(tiny_model, dataset), folder="cut", **SMALL)
    assert stopped.code == STOPPED
    assert not stopped.out("adapter").exists()
    assert (stopped.folder / "checkpoints" / "checkpoint-5" / "trainer_state.json").is_file()
    (stopped.folder / "checkpoints" / "checkpoint-7").mkdir()  # one that a kill left half written
    monkeypatch.undo()
    resumed = run_stage("finetune", inputs(tiny_model, dataset), folder="cut", **SMALL)
    assert resumed.metrics["resumed_from"] == "checkpoint-5"
    assert resumed.metrics["losses"] == pytest.approx(whole.metrics["losses"], rel=1e-5)
    for name in ("eval_loss_before", "eval_loss_after"):
        assert resumed.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-5)


@pytest.mark.generations
@pytest.mark.train
def test_a_stop_at_the_last_step_loses_nothing(
    run_stage: RunStage,
    tiny_model: Path,
    dataset: Path,
    stop_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_after(8)  # the second of six steps of an epoch
    stopped = run_stage("finetune", inputs(tiny_model, dataset), **SMALL)
    assert stopped.code == STOPPED
    monkeypatch.undo()
    result = run_stage("finetune", inputs(tiny_model, dataset), **SMALL)
    assert (result.code, result.metrics["resumed_from"]) == (0, "checkpoint-8")
    state = json.loads((result.folder / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
    losses = [round(entry["loss"], 5) for entry in state["log_history"]]
    assert (result.metrics["steps"], result.metrics["losses"]) == (8, losses)
    saved = [
        folder / "adapter_model.safetensors"
        for folder in (result.out("adapter"), result.folder / "checkpoints" / "checkpoint-8")
    ]
    assert saved[0].read_bytes() == saved[1].read_bytes()


@pytest.mark.generations
@pytest.mark.train
def test_a_stop_while_the_held_out_loss_is_measured_loses_no_step(
    run_stage: RunStage,
    tiny_model: Path,
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hpc.inside import curves

    write = curves.Curves.write

    def stop(self: Any, step: int, found: dict[str, float]) -> None:  # as it is told of the step before it measures
        write(self, step, found)
        if step == 4:
            os.kill(os.getpid(), signal.SIGUSR2)

    config = {**SMALL, "save_steps": 50, "eval_steps": 4.0}
    monkeypatch.setattr(curves.Curves, "write", stop)
    stopped = run_stage("finetune", inputs(tiny_model, dataset), **config)
    monkeypatch.undo()
    log = [json.loads(line) for line in (stopped.folder / "training" / "log.jsonl").open()]
    assert (stopped.code, [entry["step"] for entry in log if "eval_loss" in entry]) == (STOPPED, [])
    result = run_stage("finetune", inputs(tiny_model, dataset), **config)
    assert (result.metrics["resumed_from"], result.metrics["steps"]) == ("checkpoint-4", 8)


@pytest.mark.train
@pytest.mark.parametrize(
    "when",
    [
        {"logging_steps": 1},
        {"logging_steps": 100},
        {"logging_steps": 100, "save_steps": 0, "max_steps": 9},  # saved at the end of an epoch
        {"max_steps": 1},  # the loss was read before the only step was made
    ],
    ids=str,
)
def test_a_loss_of_nan_stops(run_stage: RunStage, tiny_model: Path, dataset: Path, when: dict[str, int]) -> None:
    config = {**SMALL, "learning_rate": 1e30, **when}
    result = run_stage("finetune", inputs(tiny_model, dataset), **config)
    assert result.code == 1
    if config["save_steps"] == 0:
        assert not list((result.folder / "checkpoints").glob("checkpoint-*"))
    assert "diverged" in result.error["cause"]
    assert "learning_rate" in result.error["hint"]
    assert not result.out("adapter").exists()


@pytest.mark.generations
@pytest.mark.train
@pytest.mark.parametrize("method", ["qlora", "full"])
def test_other_methods_train_too(run_stage: RunStage, tiny_model: Path, dataset: Path, method: str) -> None:
    from transformers import AutoModelForCausalLM

    result = run_stage("finetune", inputs(tiny_model, dataset), **{**SMALL, "method": method})
    assert result.code == 0
    assert result.metrics["eval_loss_after"] < result.metrics["eval_loss_before"]
    if method == "full":
        model = AutoModelForCausalLM.from_pretrained(result.out("model"))
        assert model.config.use_cache
        assert result.metrics["trainable_parameters"] == model.num_parameters()


@pytest.mark.train
def test_measuring_the_loss_first_does_not_change_a_4_bit_training(
    run_stage: RunStage, tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    shutil.copy(dataset / "train.jsonl", tmp_path)
    (tmp_path / "eval.jsonl").touch()
    config = {**SMALL, "method": "qlora", "lora_dropout": 0.0}
    both, bare = (
        run_stage("finetune", inputs(tiny_model, data), folder=data.name, **config, **more)
        for data, more in ((dataset, {}), (tmp_path, {"eval_steps": 0.2}))
    )
    assert bare.code == 0, bare.error
    with_eval, without = both.metrics, bare.metrics
    assert "eval_loss_before" not in without
    remark = json.loads((bare.folder / "attempt-1" / "remark.json").read_text())["remark"]
    assert remark.startswith("there is no held-out row to measure the loss on: set prepare.eval_rows")
    assert with_eval["losses"] == pytest.approx(without["losses"], rel=1e-5)


@pytest.mark.train
def test_the_answers_alone_are_learnt(tiny_model: Path) -> None:
    from hpc.inside import conversations, models

    tokenizer = models.tokenizer(tiny_model)
    turns = [("user", "Q"), ("assistant", "One."), ("user", "R"), ("assistant", "Two.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    row = conversations.encode(messages, tokenizer)
    learnt = [i for i, label in enumerate(row["labels"]) if label >= 0]
    assert tokenizer.decode([row["labels"][i] for i in learnt]) == "One.<|im_end|>\nTwo.<|im_end|>\n"
    everything = conversations.encode(messages, tokenizer, completion_only=False)
    assert everything["labels"] == everything["input_ids"] == row["input_ids"]


@pytest.mark.generations
@pytest.mark.train
def test_packed_conversations_do_not_see_each_other(run_stage: RunStage, tiny_model: Path, dataset: Path) -> None:
    config = {**SMALL, "packing": True, "batch_size": 2, "max_length": 96, "eval_steps": 4.0, "keep_checkpoints": 1}
    result = run_stage("finetune", inputs(tiny_model, dataset), **config)
    assert result.code == 0
    assert result.metrics["packing_difference"] < 1e-4
    assert result.metrics["packed_rows"] < result.metrics["train_rows"] == 24
    assert result.metrics["eval_loss_after"] < result.metrics["eval_loss_before"] - 0.2
    assert [p.name for p in sorted((result.folder / "checkpoints").glob("checkpoint-*"))] == ["checkpoint-8"]
    log = [json.loads(line) for line in (result.folder / "training" / "log.jsonl").open()]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 9))
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [4, 8]


@pytest.mark.train
def test_a_model_that_would_mix_packed_conversations_is_refused(tiny_model: Path) -> None:
    from hpc.inside import models, packing

    model = models.load(tiny_model, "float32")
    rows = [{"input_ids": list(range(10, 40))}, {"input_ids": list(range(50, 70))}]
    assert packing.prove(model, rows, flat=False) < 1e-4
    forward = model.forward
    model.forward = lambda **inputs: forward(**{k: v for k, v in inputs.items() if k != "position_ids"})
    with pytest.raises(HpcError, match="would see each other"):
        packing.prove(model, rows, flat=False)


@pytest.mark.train
def test_a_preset_runs(run_stage: RunStage, tiny_model: Path, dataset: Path) -> None:
    """The lab's own settings, but for the precision, which a CPU has not, and the number of steps."""
    config = {**presets.FINETUNE["lab-a100"], "dtype": "auto", "max_steps": 2, "max_length": 64, "logging_steps": 1}
    result = run_stage("finetune", inputs(tiny_model, dataset), **config)
    assert (result.code, result.metrics["method"], result.metrics["steps"]) == (0, "qlora", 2)


@pytest.mark.train
def test_long_rows_are_cut_and_counted(run_stage: RunStage, tiny_model: Path, dataset: Path) -> None:
    result = run_stage("finetune", inputs(tiny_model, dataset), **{**SMALL, "max_length": 36, "max_steps": 1})
    assert result.metrics["train_cut"] == result.metrics["train_rows"] == 24


@pytest.mark.generations
@pytest.mark.train
def test_rows_beyond_learnt_positions_are_refused_and_beyond_others_said(
    run_stage: RunStage, tiny_model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    learnt = tmp_path / "gpt2"
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(learnt)
    GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=32, n_embd=32, n_layer=1, n_head=2)).save_pretrained(learnt)
    config = {**SMALL, "max_length": 512, "max_steps": 1}
    result = run_stage("finetune", inputs(learnt, dataset), folder="learnt", **config)
    assert (result.code, "32 positions" in result.error["cause"]) == (2, True), result.error
    assert "finetune.max_length = 32" in result.error["hint"]
    rotary = shutil.copytree(tiny_model, tmp_path / "rotary")
    found = json.loads((rotary / "config.json").read_text())
    (rotary / "config.json").write_text(json.dumps({**found, "max_position_embeddings": 32}))
    assert run_stage("finetune", inputs(rotary, dataset), folder="rotary", **config).code == 0
    assert "more than the 32 that this model was made for" in capsys.readouterr().out
    plain = found.pop("rope_parameters", None) or {"rope_theta": found.pop("rope_theta")}
    turning = {**plain, "rope_type": "linear", "type": "linear", "factor": 16.0}
    names = ("rope_parameters", "rope_scaling")  # of one generation of transformers each
    stretched = {**found, "max_position_embeddings": 32, **dict.fromkeys(names, turning)}
    (rotary / "config.json").write_text(json.dumps(stretched))
    assert run_stage("finetune", inputs(rotary, dataset), folder="stretched", **config).code == 0
    assert "this model was made for" not in capsys.readouterr().out


@pytest.mark.generations
@pytest.mark.train
def test_a_model_without_a_default_of_peft_is_trained_in_all_linear_layers(
    run_stage: RunStage, tiny_model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM

    fused = tmp_path / "phi3"
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(fused)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    Phi3ForCausalLM(Phi3Config(vocab_size=258, pad_token_id=0, **sizes)).save_pretrained(fused)
    config = {**SMALL, "max_steps": 2, "target_modules": ()}
    result = run_stage("finetune", inputs(fused, dataset), **config)
    assert result.code == 0, result.error
    assert "peft has no default for phi3" in capsys.readouterr().out
    adapter = adapters.read(result.out("adapter"))
    changed = {name.split(".")[-2] for name in adapter.factors}
    assert changed == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    merged = run_stage("merge", {"adapter": result.out("adapter")}, dtype="float32")
    assert (merged.code, merged.metrics["merged_by"]) == (0, "hpc"), merged.error
    assert merged.metrics["largest_difference"] < 1e-4

    for named in ("q_proj", "v_proj"), ("self_attn",):  # of other models, and no layer at all
        result = run_stage("finetune", inputs(fused, dataset), folder="named", **{**config, "target_modules": named})
        assert (result.code, "are no layers of this model" in result.error["cause"]) == (2, True), result.error
        assert "down_proj, gate_up_proj, lm_head, o_proj, qkv_proj" in result.error["hint"]


@pytest.mark.generations
@pytest.mark.train
@pytest.mark.parametrize("named", [(), ("q_proj", "v_proj")])
def test_of_a_model_that_also_sees_the_language_model_alone_is_trained_and_merged(
    run_stage: RunStage, tiny_model: Path, dataset: Path, tmp_path: Path, named: tuple[str, ...]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

    from hpc.inside import models

    sees = tmp_path / "gemma3"
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(sees)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 262, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
    tokens = {"boi_token_index": 259, "eoi_token_index": 260, "image_token_index": 261, "mm_tokens_per_image": 4}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens))
    model.save_pretrained(sees)

    result = run_stage("finetune", inputs(sees, dataset), **{**SMALL, "max_steps": 2, "target_modules": named})
    assert result.code == 0, result.error
    changed = adapters.read(result.out("adapter")).factors
    assert len(changed) == (2 if len(named) == 2 else 7)
    assert all(name.startswith("model.language_model.layers.") for name in changed)
    merged = run_stage("merge", {"adapter": result.out("adapter")}, dtype="float32")
    assert (merged.code, merged.metrics["merged_by"]) == (0, "hpc"), merged.error
    base, whole = (models.load(folder, "float32").eval() for folder in (sees, merged.out("model")))
    both = PeftModel.from_pretrained(base, str(result.out("adapter"))).eval()
    ids = torch.tensor([[0, 5, 70, 99, 1]])
    with torch.inference_mode():
        apart, together = both(input_ids=ids).logits, whole(input_ids=ids).logits
        with both.disable_adapter():
            alone = both(input_ids=ids).logits
    assert float((together - apart).abs().max()) < 1e-4
    assert float((together - alone).abs().max()) > 1e-3


@pytest.mark.train
def test_a_compiled_training_learns_the_same_and_saves_plain_names(
    run_stage: RunStage, tiny_model: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, but by torch's own kernels: to have them compiled takes a minute."""
    from safetensors import safe_open

    from hpc.inside import recipe

    config = {**SMALL, "lora_dropout": 0.0, "max_steps": 3}
    plain = run_stage("finetune", inputs(tiny_model, dataset), folder="plain", **config)
    made = recipe.arguments
    monkeypatch.setattr(recipe, "arguments", lambda *a: {**made(*a), "torch_compile_backend": "eager"})
    result = run_stage("finetune", inputs(tiny_model, dataset), folder="compiled", **config, compile=True)
    assert result.metrics["losses"] == pytest.approx(plain.metrics["losses"], rel=1e-4)
    names = [set(safe_open(r.out("adapter") / "adapter_model.safetensors", "pt").keys()) for r in (plain, result)]
    assert names[0] == names[1]


@pytest.mark.train
def test_the_template_of_the_data_goes_with_the_adapter_and_what_it_loses_is_told(
    run_stage: RunStage, tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(dataset, tmp_path / "data")
    text = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    (data / "chat_template.jinja").write_text(text)
    turns = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant")]
    with open(data / "train.jsonl", "a") as file:
        file.write(json.dumps({"messages": turns}) + "\n")
    result = run_stage("finetune", inputs(tiny_model, data), **{**SMALL, "max_steps": 1})
    assert (result.metrics["train_template_loses"], result.metrics["eval_template_loses"]) == ({"system": 1}, {})
    remark = json.loads((result.folder / "attempt-1" / "remark.json").read_text())["remark"]
    assert remark.startswith("the chat template loses the system message of 1 rows: set finetune.chat_template")
    assert (result.out("adapter") / "chat_template.jinja").read_text() == text
    merged = run_stage("merge", {"adapter": result.out("adapter"), "base_model": tiny_model})
    assert (merged.out("model") / "chat_template.jinja").read_text() == text


@pytest.mark.extras
@pytest.mark.train
def test_trackers_are_told_and_call_nobody_without_a_key(
    run_stage: RunStage, tiny_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "CI" not in os.environ:
        pytest.importorskip("wandb", reason="RINGS=train runs it in .venvs/train-extras")
        pytest.importorskip("mlflow", reason="RINGS=train runs it in .venvs/train-extras")
    for name in ("WANDB_MODE", "WANDB_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")  # so that what the stage sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = {**SMALL, "max_steps": 2, "report_to": ("wandb", "mlflow")}
    result = run_stage("finetune", inputs(tiny_model, dataset), **config)
    assert result.code == 0, result.error

    import wandb
    from mlflow import MlflowClient

    wandb.finish()  # as the end of the process does
    (recorded,) = (result.folder / "training" / "wandb").glob("offline-run-*/run-*.wandb")
    said = recorded.read_bytes()
    assert b"learning_rate" in said
    assert b"train/loss" in said
    kept = MlflowClient(f"sqlite:///{result.folder / 'training' / 'mlflow.db'}")
    (run,) = kept.search_runs(["0"])
    losses = [point.value for point in kept.get_metric_history(run.info.run_id, "loss")]
    assert losses == pytest.approx(result.metrics["losses"], rel=1e-4)


@pytest.mark.train
def test_what_it_cannot_work_with(
    run_stage: RunStage, tiny_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_stage("finetune", inputs(tiny_model, tmp_path), **SMALL)
    assert "there is no" in result.error["cause"]
    result = run_stage("finetune", inputs(tiny_model, dataset), **{**SMALL, "dtype": "float16"})
    assert "float16 needs a GPU" in result.error["cause"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = run_stage("finetune", inputs(tiny_model, dataset), **{**SMALL, "compile": True})
    assert "needs a compiler" in result.error["cause"]
    result = run_stage("finetune", inputs(tiny_model, dataset), **{**SMALL, "report_to": ("comet_ml",)})
    assert "needs comet_ml, which is not in this image" in result.error["cause"]
    result = run_stage("finetune", inputs(tiny_model, dataset), **{**SMALL, "sharding": "zero2"})
    assert "needs deepspeed" in result.error["cause"]
    result = run_stage("finetune", inputs(tiny_model, dataset), **{**SMALL, "max_length": 8})
    assert result.code == UsageError.exit_code
    assert "no row of the data set has an answer within 8 tokens" in result.error["cause"]
