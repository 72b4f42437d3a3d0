"""plain_server.py MODEL: transformers behind HTTP as it is often written; prints its port.

One model, one lock: calls of `generate` at the same time would share the cores, and be slower together.
POST {"prompt": TEXT, "tokens": N} -> {"text": TEXT, "tokens": N}
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            inputs = tokenizer(asked["prompt"], return_tensors="pt")
            with lock, torch.inference_mode():
                count = asked["tokens"]
                made = model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
            new = made[0, inputs["input_ids"].shape[1] :]
            body = json.dumps({"text": tokenizer.decode(new), "tokens": len(new)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
