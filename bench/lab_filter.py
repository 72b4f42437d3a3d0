"""The lab's own loop, on every N-th row: langdetect on the whole record, and the text cut at `###`. Not seeded there.

python lab_filter.py ROWS.jsonl N OFFSET     prints {"ms", "rows", "kept": {row: whether it is kept}}
"""

from __future__ import annotations

import json
import sys
import time

from langdetect import LangDetectException, detect

path, every, offset = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with open(path, encoding="utf-8") as file:
    rows = {number: line for number, line in enumerate(file) if number % every == offset}
detect("the profiles are loaded once")
begin = time.perf_counter()
kept = {}
for number, line in rows.items():
    row = json.loads(line)
    try:
        kept[number] = detect(str(row)) == "en"
    except LangDetectException:
        kept[number] = False
    if kept[number]:
        parts = [part.strip() for part in row["text"].split("###")][1:]
        texts = [part.partition(":")[2].strip() for part in parts]
        "".join(f"<s>[INST] {asked} [/INST] {said} </s>" for asked, said in zip(texts[::2], texts[1::2]))  # noqa: B905
ms = (time.perf_counter() - begin) * 1000
print(json.dumps({"ms": ms, "rows": len(rows), "kept": kept}))
