"""The finetuning lab's own training by hand: lab_recipe.py MODEL DATASET OUTPUT. Writes result.json.

Its settings for a 20 GB slice: a base in 4 bit, one conversation a step, grouped by length, not packed, the loss on the
whole text, an adapter on q_proj and v_proj. Only float16 is float32 here, which a CPU calculates faster.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(model_folder: str, dataset: str, output: str) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
    from trl import SFTConfig, SFTTrainer

    from hpc.inside import conversations, heldout

    with open(Path(dataset) / "train.jsonl", encoding="utf-8") as file:
        talks = [json.loads(line)["messages"] for line in file]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=False,
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    for layer in model.modules():  # else measuring the loss would repack the weights
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    set_seed(0)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"messages": talk} for talk in talks]),
        peft_config=LoraConfig(r=64, lora_alpha=16, lora_dropout=0.1, bias="none", task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=f"{output}/checkpoints",
            num_train_epochs=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing=False,
            optim="paged_adamw_32bit",
            save_steps=25,
            logging_steps=25,
            learning_rate=2e-4,
            weight_decay=0.001,
            bf16=False,
            fp16=False,
            max_grad_norm=0.3,
            warmup_steps=0.03,
            train_sampling_strategy="group_by_length",
            lr_scheduler_type="constant",
            max_length=512,
            packing=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
        ),
    )
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    seconds = trainer.train().metrics["train_runtime"]
    rows, _ = conversations.rows(conversations.read(Path(dataset), "eval"), tokenizer, 512, completion_only=True)
    loss, _ = heldout.loss(trainer.model, rows, conversations.Padded(0), batch_size=4)
    Path(output, "result.json").write_text(json.dumps({"seconds": seconds, "tokens": tokens, "eval_loss": loss}))


if __name__ == "__main__":
    main(*sys.argv[1:])
