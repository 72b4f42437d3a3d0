"""bare_genai.py ENGINE THREADS: the loop of onnxruntime-genai's own examples, and nothing else.

Reads {"prompt": TEXT, "tokens": N} line by line, answers {"first": seconds, "whole": seconds, "tokens": N}.
"""

from __future__ import annotations

import json
import sys
import time

import onnxruntime_genai as og


def main(engine: str, threads: int) -> None:
    config = og.Config(engine)
    session = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": session}}))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)
    stream = tokenizer.create_stream()
    for line in sys.stdin:
        asked = json.loads(line)
        begin = time.perf_counter()
        prompt = tokenizer.encode(asked["prompt"])
        parameters = og.GeneratorParams(model)
        longest = len(prompt) + asked["tokens"]
        parameters.set_search_options(max_length=longest, min_length=longest, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(prompt)
        first, count, text = 0.0, 0, ""
        while not generator.is_done():
            generator.generate_next_token()
            text += stream.decode(generator.get_next_tokens()[0])
            count += 1
            first = first or time.perf_counter() - begin
        print(json.dumps({"first": first, "whole": time.perf_counter() - begin, "tokens": count}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
