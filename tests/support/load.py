"""Many requests at once: load.py WHERE TOKEN_FILE REQUESTS CONCURRENCY TOKENS [UNTIL]; prints how each ended, as JSON.

A program of its own: it runs on a machine of the test cluster. Each request streams from Triton's API. WHERE is an
address, and the first request that is refused ends it; or an endpoint.json, which is read before each request, and what
was refused is asked again. With UNTIL there are more requests until that file is there.
"""

from __future__ import annotations

import http.client
import json
import os
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


_PATIENCE_S = 90


def followed(where: Path, token_file: Path, tokens: int, number: int, retried: Counter[str]) -> str:
    """The same, asked again where the service is now, as long as it is refused."""
    until = time.monotonic() + _PATIENCE_S
    end = "refused"
    while end == "refused" and time.monotonic() < until:
        try:
            place = json.loads(where.read_text())
            host, token = f"{place['host']}:{place['ports']['http']}", token_file.read_text().strip()
            job = place.get("job_id", host)
        except OSError:  # nothing is announced at this moment
            time.sleep(0.2)
            continue
        end = ask(host, token, tokens, number)
        if end == "refused":
            retried["times"] += 1
            time.sleep(0.2)
        else:
            retried[job] += 1  # not the address: the same port may be drawn twice
    return end


def main(where: str, token_file: str, requests: str, concurrency: str, tokens: str, until: str = "") -> None:
    follows = where.endswith(".json")
    host, token = urlsplit(where).netloc, Path(token_file).read_text().strip()
    count, ends, retried, lock = 0, Counter[str](), Counter[str](), threading.Lock()

    def work() -> None:
        nonlocal count
        while True:
            time.sleep(float(os.environ.get("PAUSE", "0")))
            with lock:
                enough = count >= int(requests) and (not until or Path(until).exists())
                if enough or ends["refused"]:
                    return
                number = count = count + 1
            if follows:
                end = followed(Path(where), Path(token_file), int(tokens), number, retried)
            else:
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
    print(json.dumps({"ends": ends, "retried": retried, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main(*sys.argv[1:])
