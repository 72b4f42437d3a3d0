"""What the stage finetune does, by hand: bare_trl.py MODEL DATASET CONFIG.json OUTPUT. Writes result.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(model_folder: str, dataset: str, config_file: str, output: str) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    config = json.loads(Path(config_file).read_text())["config"]
    with open(Path(dataset) / "train.jsonl", encoding="utf-8") as file:
        talks = [json.loads(line)["messages"] for line in file]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    set_seed(config["seed"])
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": talk[:-1], "completion": talk[-1:]} for talk in talks]),
        peft_config=LoraConfig(
            r=config["lora_r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config["lora_dropout"],
            target_modules=config["target_modules"][0],
            task_type="CAUSAL_LM",
        ),
        args=SFTConfig(
            output_dir=f"{output}/checkpoints",
            learning_rate=config["learning_rate"],
            lr_scheduler_type=config["lr_scheduler"],
            warmup_steps=config["warmup_ratio"],
            max_steps=config["max_steps"],
            per_device_train_batch_size=config["batch_size"],
            gradient_accumulation_steps=config["grad_accum"],
            gradient_checkpointing=config["gradient_checkpointing"],
            max_length=config["max_length"],
            optim=config["optim"],
            weight_decay=config["weight_decay"],
            max_grad_norm=config["max_grad_norm"],
            seed=config["seed"],
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_steps=config["save_steps"],
            save_total_limit=2,
            logging_steps=config["logging_steps"],
            disable_tqdm=True,
            report_to="none",
        ),
    )
    result = trainer.train()
    trainer.save_model(f"{output}/adapter")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    Path(output, "result.json").write_text(json.dumps({"seconds": result.metrics["train_runtime"], "losses": losses}))


if __name__ == "__main__":
    main(*sys.argv[1:])
