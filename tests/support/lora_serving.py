"""Adapters of a TensorRT engine by name, through the real Triton, our models and the door: lora_serving.py FOLDER.

A STUB answers in the place of TensorRT-LLM's backend. It takes what that takes (a task; arrays in its shapes and type),
has room for one adapter, and asks for the arrays in the backend's own words. Prints what clients were told, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any

STUB = '''
"""A STUB of TensorRT-LLM's backend, see tests/support/lora_serving.py."""
import json
import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

class TritonPythonModel:
    def initialize(self, args):
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        self.tokenizer = Tokenizer.from_file(parameters["gpt_model_path"] + "/tokenizer.json")
        self.kept = {}

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                ids = self.tokenizer.encode(self.said(request)).ids
                tensors = [
                    pb_utils.Tensor("output_ids", np.array([[ids]], np.int32)),
                    pb_utils.Tensor("sequence_length", np.array([[len(ids)]], np.int32)),
                ]
                response = pb_utils.InferenceResponse(tensors)
            except Exception as error:
                response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
            sender.send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def said(self, request):
        given = {t.name(): t.as_numpy() for t in request.inputs() if t.name().startswith("lora_")}
        if not given:
            return "alone"
        task = given["lora_task_id"]
        assert task.dtype == np.uint64 and task.size == 1, task
        task = int(task.flat[0])
        if "lora_weights" not in given:
            if task not in self.kept:
                raise ValueError(f"LoRA task {task} not found in cache. Please send LoRA weights with request")
            return f"task {task}, kept, {self.kept[task]}"
        weights, config = given["lora_weights"], given["lora_config"]
        assert weights.ndim == config.ndim == 3 and weights.shape[:2] == config.shape[:2], (weights, config)
        assert weights.shape[0] == 1 and config.shape[2] == 3, (weights.shape, config.shape)
        assert weights.dtype == np.float16 and config.dtype == np.int32, (weights.dtype, config.dtype)
        self.kept = {task: f"{config.tolist()} {weights.sum():g}"}
        return f"task {task}, sent, {self.kept[task]}"
'''


def main(folder: Path) -> None:
    import numpy as np
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from hpc.core import passport
    from hpc.core.assets import TEMPLATES
    from hpc.inside import lorarrays, loras, serving
    from hpc.inside.translating import Served
    from stages import serve

    engine = folder / "engine"
    engine.mkdir(parents=True)
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(engine / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (engine / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    told: dict[str, Any] = {}
    for task, (name, place) in enumerate(
        {"stars": ("1", "self_attn", "q_proj"), "law": ("0", "mlp", "up_proj")}.items(), 1
    ):
        pair = (np.full((8, 2), task, np.float32), np.full((2, 4), task, np.float32))
        weights, config = lorarrays.arrays(loras.Adapter(name, {place: pair}), "float16")
        where = engine / lorarrays.FOLDER / str(task)
        where.mkdir(parents=True)
        np.save(where / lorarrays.WEIGHTS, weights)
        np.save(where / lorarrays.CONFIG, config)
        told[name] = {"task": task, "rank": 2, "digest": "", "bytes": 48}
    passport.write(engine, passport.Passport(
        engine="tensorrt_llm", model="m", architecture="LlamaForCausalLM", image="i", dtype="float16",
        max_batch_size=4, max_input_len=64, max_seq_len=64, max_lora_rank=2, adapters=told,
    ))  # fmt: skip
    settings = serve.ServeConfig(engine="tensorrt_llm", max_batch_size=4, name="tiny")
    repository = folder / "repository"
    serve.make_repository(settings, engine, repository)
    config_file = repository / "tensorrt_llm" / "config.pbtxt"
    text = config_file.read_text()
    assert 'backend: "tensorrtllm"' in text
    config_file.write_text(text.replace('backend: "tensorrtllm"', 'backend: "python"'))
    (repository / "tensorrt_llm" / "1" / "model.py").write_text(STUB)
    served = Served(name="tiny", target="tensorrt_llm_bls", max_tokens=64, adapters=serve._adapters(settings, engine))
    ports = {name: free_port() for name in ("http", "grpc", "metrics")}
    (folder / "own").mkdir()
    asked = serving.Settings(
        repository=str(repository), stage=str(folder), own=str(folder / "own"), shm=f"hpclora{os.getpid()}_",
        page=str(TEMPLATES / "chat.html"), tokenizer=str(engine), served=asdict(served), stop_model="tensorrt_llm",
        bind="127.0.0.1", ports=ports, ready_s=60, drain_s=1, end_s=10,
    )  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(asdict(asked)))
    argv = [sys.executable, "-m", "hpc.inside.serving", str(folder / "settings.json")]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(argv, env={**os.environ, serving.TOKEN: "t"}, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{ports['http']}"
    try:
        found = ask_all(url, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    print(json.dumps({**found, "code": process.returncode}))


def ask_all(url: str, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while ask(url + "/health")[0] != 200:
        assert process.poll() is None, "it has ended: see its log"
        assert time.monotonic() < deadline, "it does not start: see its log"
        time.sleep(0.1)

    def chat(model: str) -> Any:
        words = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
        code, said = ask(url + "/v1/chat/completions", words)
        return said["choices"][0]["message"]["content"] if code == 200 else [code, said["error"]["message"]]

    models = [model["id"] for model in ask(url + "/v1/models")[1]["data"]]
    names = ("tiny", "stars", "stars", "law", "stars", "none")
    generate = url + "/v2/models/tensorrt_llm_bls/generate"
    wrong = ask(generate, {"text_input": "x", "lora_name": "none"})
    empty = ask(generate, {"text_input": "x", "lora_name": ""})
    return {"models": models, "said": [chat(name) for name in names], "wrong": wrong[1]["error"],
            "empty": empty[1]["text_output"]}  # fmt: skip


def ask(url: str, words: dict[str, Any] | None = None) -> tuple[int, Any]:
    headers = {"Authorization": "Bearer t"}
    request = urllib.request.Request(url, None if words is None else json.dumps(words).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            body, code = answer.read(), answer.status
    except urllib.error.HTTPError as failed:
        body, code = failed.read(), failed.code
    except OSError:
        return 0, None
    try:
        return code, json.loads(body)
    except ValueError:
        return code, body.decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
