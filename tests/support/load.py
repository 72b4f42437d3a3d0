"""Many requests at once: load.py URL TOKEN_FILE REQUESTS CONCURRENCY TOKENS; prints how each ended, as JSON.

A program of its own: it runs on a machine of the test cluster. Each request streams from Triton's API.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit


def ask(host: str, token: str, tokens: int, number: int) -> str:
    """whole, refused (nothing was promised: 503, or no connection), or what went wrong."""
    words = {"text_input": f"number {number}", "max_tokens": tokens, "min_tokens": tokens, "stream": True}
    connection = http.client.HTTPConnection(host, timeout=120)
    begun = False
    try:
        connection.request(
            "POST", "/v2/models/ensemble/generate_stream", json.dumps(words), {"Authorization": f"Bearer {token}"}
        )
        answer = connection.getresponse()
        begun = True
        body = answer.read().decode()
    except OSError as error:
        return f"cut: {error}" if begun else "refused"
    except http.client.HTTPException as error:
        return f"cut: {error!r}" if begun else "refused"
    finally:
        connection.close()
    if answer.status == 503:
        return "refused"
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: ")]
    if answer.status != 200 or not events or "error" in events[-1]:
        return f"{answer.status}: {body[-200:]}"
    count = sum(event["sequence_length"] for event in events)
    return "whole" if events[-1]["finish_reason"] == "length" and count == tokens else f"short: {count}"


def main(url: str, token_file: str, requests: str, concurrency: str, tokens: str) -> None:
    host, token = urlsplit(url).netloc, Path(token_file).read_text().strip()
    left, ends, lock = list(range(int(requests))), Counter[str](), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not left or ends["refused"]:
                    return
                number = left.pop()
            end = ask(host, token, int(tokens), number)
            with lock:
                ends[end] += 1
                if sum(ends.values()) == 1:
                    print("begun", flush=True)

    began = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(int(concurrency))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"ends": ends, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main(*sys.argv[1:])
