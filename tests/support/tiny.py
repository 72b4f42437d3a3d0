"""A tiny chat model and a tiny data set, for tests that really train: tiny.py MODEL DATASET makes both folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("brick", "beam", "roof", "floor", "permit", "shed", "wall", "door")


def model(folder: Path) -> Path:
    """A random Llama of two small layers, and a byte-level tokenizer with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>"]
    letters = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[:1]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(letters), **shape, eos_token_id=1, bos_token_id=0, max_position_embeddings=256)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def dataset(folder: Path) -> Path:
    """24 short conversations to train on and 4 held out."""
    folder.mkdir(exist_ok=True)
    for name, count, seed in (("train", 24, 0), ("eval", 4, 3)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for i in range(count):
                word = WORDS[(i + seed) % len(WORDS)]
                turns = (
                    {"role": "user", "content": f"{word}\u2028{i}?"},
                    {"role": "assistant", "content": f"A {word}."},
                )
                file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return folder


if __name__ == "__main__":
    model(Path(sys.argv[1]))
    dataset(Path(sys.argv[2]))
