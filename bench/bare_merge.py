"""bare_merge.py make FOLDER: a random model of 1.1 B parameters in shards, and an adapter; bare_merge.py merge FOLDER
OUTPUT: what PEFT does with them.
"""

from __future__ import annotations

import sys
from pathlib import Path


def make(folder: Path) -> None:
    """The shape of TinyLlama."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support import tiny

    tokenizer = tiny.model(folder / "tiny")
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **shape, num_key_value_heads=4, dtype="bfloat16"))
    model.save_pretrained(folder / "base", max_shard_size="500MB")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tokenizer / file).rename(folder / "base" / file)
    torch.set_default_dtype(torch.float32)
    both = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in both.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    both.save_pretrained(folder / "adapter")


def merge(folder: Path, output: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload()
    merged.save_pretrained(output, max_shard_size="500MB")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(output)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        merge(Path(sys.argv[2]), Path(sys.argv[3]))
