"""A labelled data set in many languages, made of the small dialogues in a package; and a tokenizer trained on them.

python corpus.py FOLDER ROWS...     writes rows-ROWS.jsonl (guanaco's form), labels-ROWS.txt and model/
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CORPUS = "chatterbot-corpus==1.3.3"
LANGUAGES = {
    "english": "en", "dutch": "nl", "french": "fr", "german": "de", "italian": "it", "portuguese": "pt",
    "spanish": "es", "swedish": "sv", "russian": "ru", "ukrainian": "uk", "turkish": "tr", "indonesian": "id",
    "korean": "ko", "japanese": "ja", "chinese": "zh", "persian": "fa", "bengali": "bn", "hindi": "hi", "hebrew": "he",
}  # fmt: skip
"""Folder of the package -> language."""
ENGLISH = 0.5
CHARS = 900
"""Mean length of a row; Guanaco's have 2,000, Alpaca's 500."""
AGAIN, NEARLY = 0.03, 0.05
"""Shares of rows that repeat one of the last 500, exactly or with one word in fifty changed."""


def main() -> None:
    folder, sizes = Path(sys.argv[1]), [int(word) for word in sys.argv[2:]]
    lines = dialogues()
    for size in sizes:
        write(folder, lines, size)
    tokenizer(folder / "model", [line for found in lines.values() for line in found])


def dialogues() -> dict[str, list[str]]:
    """Language -> what is said in it. The labels are the folders': some hold lines in other languages."""
    import yaml

    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, CORPUS]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                parts = name.split("/")
                if name.endswith(".yml") and parts[-2] in LANGUAGES:
                    for turns in yaml.safe_load(archive.read(name)).get("conversations") or []:
                        said = [str(turn).strip() for turn in turns if turn]
                        found.setdefault(LANGUAGES[parts[-2]], []).extend(said)
    return found


def write(folder: Path, lines: dict[str, list[str]], size: int) -> None:
    draw = random.Random(size)
    others = sorted(set(lines) - {"en"})
    last: list[tuple[str, str]] = []
    with open(folder / f"rows-{size}.jsonl", "w") as rows, open(folder / f"labels-{size}.txt", "w") as labelled:
        for _ in range(size):
            kind = draw.random()
            if last and kind < AGAIN + NEARLY:
                text, language = draw.choice(last)
                text = text if kind < AGAIN else changed(text, draw)
            else:
                language = "en" if draw.random() < ENGLISH else draw.choice(others)
                text = conversation(lines[language], draw)
                last = [*last[-499:], (text, language)]
            rows.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            labelled.write(language + "\n")


def conversation(lines: list[str], draw: random.Random) -> str:
    turns, length = [], draw.expovariate(1 / CHARS) + 100
    while sum(map(len, turns)) < length or len(turns) % 2:
        turns.append(" ".join(draw.choice(lines) for _ in range(draw.randint(1, 8))))
    speakers = ("### Human: ", "### Assistant: ")
    return "".join(speakers[number % 2] + turn for number, turn in enumerate(turns))


def changed(text: str, draw: random.Random) -> str:
    words = text.split(" ")
    for _ in range(max(1, len(words) // 50)):
        at = draw.randrange(len(words))
        if "#" not in words[at] and ":" not in words[at]:
            words[at] = f"{draw.randrange(10**6)}"
    return " ".join(words)


def tokenizer(folder: Path, lines: list[str]) -> None:
    """A byte-level BPE of 32,000 tokens, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=32000, special_tokens=special, initial_alphabet=alphabet)
    )
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")


def labels(path: Path) -> list[str]:
    return path.read_text().split()


if __name__ == "__main__":
    main()
