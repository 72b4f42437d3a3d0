"""The engine onnxruntime-genai: requests join and leave between two tokens, each at its own length."""

import json
import queue
import threading
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import triton_python_backend_utils as pb_utils
from text import Streamer, first
from tokenizers import Tokenizer

_LAST = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        parameters = {k: v["string_value"] for k, v in config["parameters"].items()}
        folder = Path(parameters["gpt_model_path"])
        settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        ends = settings["eos_token_id"]
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.vocabulary = settings["vocab_size"]
        limit = int(parameters["max_seq_len"])
        self.limit = min(limit, settings["context_length"]) if limit else settings["context_length"]
        self.places = max(1, int(parameters["max_batch_size"]))
        self.exclude = parameters["exclude_input_in_output"] == "true"
        skip = parameters["skip_special_tokens"] == "true"
        tokenizer = Tokenizer.from_file(str(Path(parameters["tokenizer_dir"]) / "tokenizer.json"))
        self.decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=skip)
        self.model = og.Model(str(folder))
        self.decoupled = config["model_transaction_policy"]["decoupled"]
        self.waiting = queue.Queue()
        self.known = {}
        """Requests that have an id and have not ended."""
        self.loop = threading.Thread(target=self._work, daemon=True)
        self.loop.start()

    def execute(self, requests):
        if self.decoupled:
            for request in requests:
                sender = request.get_response_sender()
                self._take(_Asked(request, sender.send, sender.is_cancelled))
            return None
        answers = [_Answer() for _ in requests]
        for request, answer in zip(requests, answers, strict=True):
            self._take(_Asked(request, answer.send, request.is_cancelled))
        return [answer.get() for answer in answers]

    def _take(self, asked):
        """Put it into the queue. One that says `stop` ends the one with its id, as it does with TensorRT-LLM."""
        if _value(asked.request, "stop", False):
            other = self.known.get(asked.id)
            if other is not None:
                other.stopped = True
            asked.send(pb_utils.InferenceResponse([]), _LAST)
            return
        if asked.id:
            self.known[asked.id] = asked
        self.waiting.put(asked)

    def finalize(self):
        self.waiting.put(None)
        self.loop.join(10)

    def _work(self):
        """One token for each running request, round after round."""
        running = []
        while True:
            while len(running) < self.places and (not running or not self.waiting.empty()):
                new = self.waiting.get()
                if new is None:
                    return
                running += self._begun(new)
            running = [job for job in running if self._step(job)]

    def _begun(self, asked):
        try:
            return [_Job(self, asked)]
        except Exception as error:
            self._fail(asked, error)
            return []

    def _step(self, job):
        """True while there is more to come."""
        try:
            more = job.step()
        except Exception as error:
            self._fail(job.asked, error)
            return False
        if not more:
            self.known.pop(job.asked.id, None)
        return more

    def _fail(self, asked, error):
        self.known.pop(asked.id, None)
        asked.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))), _LAST)


class _Asked:
    """One request as it came."""

    def __init__(self, request, send, cancelled):
        self.request, self.send = request, send
        self.id = request.request_id()
        self.stopped = False
        self._cancelled = cancelled

    def over(self):
        """Nobody wants the answer any more."""
        return self.stopped or self._cancelled()


class _Job:
    """One running request."""

    def __init__(self, engine, asked):
        self.engine, self.asked = engine, asked
        request = asked.request
        self.prompt = _tensor(request, "input_ids").reshape(-1).tolist()
        self.stream = bool(_value(request, "streaming", False))
        if self.stream and not engine.decoupled:
            raise ValueError("this model does not stream: its decoupled_mode is off")
        wanted = int(_value(request, "request_output_len", 16))
        room = engine.limit - len(self.prompt)
        if room < 1:
            raise ValueError(f"the prompt has {len(self.prompt)} tokens; this engine takes {engine.limit - 1} at most")
        if wanted < 1:
            raise ValueError(f"max_tokens is {wanted}: it must be 1 or more")
        self.count = min(wanted, room)
        self.ends = engine.ends | {int(_value(request, "end_id", -1))}
        self.stops = [word.decode() for word in _all(request, "stop_words") if word]
        self.sequences = [] if self.stops else _word_list(_tensor(request, "stop_words_list"))
        self.bad = _word_list(_tensor(request, "bad_words_list"))
        self.least = int(_value(request, "min_tokens", 0))
        self.generator = _generator(engine, request, len(self.prompt) + self.count)
        self.generator.append_tokens(self.prompt)
        self.streamer = Streamer(engine.decode, self.stops) if self.stream or self.stops else None
        self.tokens, self.new = [], []
        if self.stream and not engine.exclude:
            self._respond(self.prompt, [], 0, -1, "")

    def step(self):
        """One more token; True while there is more to come."""
        if self.asked.over():
            return self._end("cancelled")
        self._forbid()
        self.generator.generate_next_token()
        token = int(self.generator.get_next_tokens()[0])
        if token in self.ends:
            return self._end("stop")
        self.tokens.append(token)
        self.new.append(token)
        full = len(self.tokens) >= self.count
        text = self.streamer.push([token], last=full) if self.streamer else ""
        if self.streamer and self.streamer.stopped:
            return self._end("stop")
        if any(self.tokens[-len(s) :] == s for s in self.sequences):
            return self._end("stop")
        if full:
            return self._end("length")
        if self.stream and text:
            self._piece("")
        return True

    def _end(self, reason):
        if not self.stream:
            text = self.engine.decode(self.tokens) if self.stops else ""
            place = first(text, self.stops)
            if self.engine.exclude:
                self._respond(self.tokens, [], 0, place, reason)
            else:
                shift = len(self.engine.decode(self.prompt)) if place >= 0 else 0
                self._respond(self.prompt + self.tokens, [], 0, place + shift if place >= 0 else -1, reason)
        else:
            if reason in ("stop", "cancelled") and not self.streamer.stopped:
                self.streamer.push([], last=True)
            self._piece(reason)
        return False

    def _piece(self, reason):
        before = self.streamer.window[: len(self.streamer.window) - len(self.new)]
        self._respond(self.new, before, self.streamer.begin, self.streamer.end, reason)
        self.new = []

    def _respond(self, tokens, before, begin, end, reason):
        number = np.int32
        tensors = [
            pb_utils.Tensor("output_ids", np.array([[tokens]], number).reshape(1, 1, len(tokens))),
            pb_utils.Tensor("sequence_length", np.array([[len(tokens)]], number)),
            pb_utils.Tensor("context_ids", np.array([before], number).reshape(1, len(before))),
            pb_utils.Tensor("text_begin", np.array([[begin]], number)),
            pb_utils.Tensor("text_end", np.array([[end]], number)),
            pb_utils.Tensor("prompt_length", np.array([[len(self.prompt)]], number)),
            pb_utils.Tensor("finish_reason", np.array([[reason.encode()]], dtype=object)),
        ]
        self.asked.send(pb_utils.InferenceResponse(tensors), _LAST if reason else 0)

    def _forbid(self):
        """Take the forbidden words' last tokens out of the choice, and the end where it is too early."""
        out = {word[-1] for word in self.bad if self.tokens[len(self.tokens) - len(word) + 1 :] == word[:-1]}
        out |= self.ends if len(self.tokens) < self.least else set()
        out = [token for token in out if 0 <= token < self.engine.vocabulary]
        if out:
            logits = self.generator.get_logits()
            logits[..., out] = np.finfo(np.float32).min
            self.generator.set_logits(logits)


class _Answer:
    """Where the only response of a request that does not stream arrives."""

    def __init__(self):
        self._queue = queue.Queue()

    def send(self, response, flags=0):
        self._queue.put(response)

    def get(self):
        return self._queue.get()


def _generator(engine, request, length):
    """The sampling that the request asks for; greedy where it asks for none."""
    options = {"max_length": length}
    temperature = float(_value(request, "temperature", 1.0))
    top_k, top_p = int(_value(request, "runtime_top_k", 0)), float(_value(request, "runtime_top_p", 0.0))
    if temperature < 0 or not 0 <= top_p <= 1 or top_k < 0:
        raise ValueError("temperature and top_k must not be negative, and top_p is from 0 to 1")
    sample = top_k > 1 or (top_k == 0 and top_p > 0)
    options["do_sample"] = sample and temperature > 0
    if options["do_sample"]:
        options.update(temperature=temperature, top_k=top_k, top_p=top_p or 1.0)
        seed = _value(request, "random_seed", None)
        if seed is not None:
            options["random_seed"] = int(seed) % (1 << 31)
    else:
        options["top_k"] = 1
    options["repetition_penalty"] = float(_value(request, "repetition_penalty", 1.0))
    parameters = og.GeneratorParams(engine.model)
    parameters.set_search_options(**options)
    return og.Generator(engine.model, parameters)


def _word_list(tensor):
    """The words' tokens out of the engine's word list: all tokens, and where each word ends."""
    if tensor is None:
        return []
    tokens, ends = tensor.reshape(2, -1).tolist()
    ends = [end for end in ends if end > 0]
    return [tokens[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _tensor(request, name):
    found = pb_utils.get_input_tensor_by_name(request, name)
    return None if found is None else found.as_numpy()


def _all(request, name):
    found = _tensor(request, name)
    return [] if found is None else list(found.flat)


def _value(request, name, default):
    found = _all(request, name)
    return found[0] if found else default
