"""The same questions one after the other and all at once: at_once.py URL TOKEN_FILE; prints both answers, as JSON.

A program of its own: it runs on a machine of the test cluster. stdin: a list of requests to Triton's ensemble.
"""

from __future__ import annotations

import http.client
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


def main(url: str, token_file: str) -> None:
    token = Path(token_file).read_text().strip()

    def ask(words: dict[str, Any]) -> list[Any]:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
        way = "generate_stream" if words.get("stream") else "generate"
        headers = {"Authorization": f"Bearer {token}"}
        connection.request("POST", f"/v2/models/ensemble/{way}", json.dumps(words), headers)
        body = connection.getresponse().read().decode()
        connection.close()
        lines = [line.removeprefix("data: ") for line in body.splitlines() if line.strip()]
        found = [json.loads(line) for line in lines]
        return ["".join(part["text_output"] for part in found), found[-1]["finish_reason"]]

    asked = json.load(sys.stdin)
    alone = [ask(words) for words in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(ask, asked))
    print(json.dumps({"alone": alone, "together": together}))


if __name__ == "__main__":
    main(*sys.argv[1:])
