"""The engine: requests join and leave between two tokens, and every pass makes a token for each that runs."""

import json
import os
import queue
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from choice import Choice
from rows import Rows, threads
from text import Streamer, first
from tokenizers import Tokenizer

_LAST = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_PIECE, _WHOLE = 64, 512
"""Tokens of prompts that are read between two tokens of the answers that run; and where none runs."""
_LOOK_S = 0.1
_TEXT = "text_output"
_FIRST_S = 0.002
"""What a first token takes to the client. The graph has a thread on each core, and where the kernel lets it keep them
for its slices it takes four times as long. See docs/adr/0026."""


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
        self.budget = int(parameters["max_tokens_in_cache"]) or self.places * self.limit
        self.interval = int(parameters["stream_interval_ms"]) / 1000
        self.exclude = parameters["exclude_input_in_output"] == "true"
        skip = parameters["skip_special_tokens"] == "true"
        tokenizer = Tokenizer.from_file(str(Path(parameters["tokenizer_dir"]) / "tokenizer.json"))
        self.decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=skip)
        self.rows = Rows(folder, self.places, self.limit, threads())
        self.decoupled = config["model_transaction_policy"]["decoupled"]
        self.waiting = queue.Queue()
        self.head = None
        """The first of those that wait: its prompt is known already."""
        self.known = {}
        """Requests that have an id and have not ended."""
        self.taken = set()
        """All that have not ended."""
        self.sending = queue.SimpleQueue()
        self.ending = threading.Event()
        self.threads = [threading.Thread(target=task, daemon=True) for task in (self._work, self._watch, self._send)]
        for thread in self.threads:
            thread.start()

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
                other.over = True
            asked.send(pb_utils.InferenceResponse([]), _LAST)
            return
        if asked.id:
            self.known[asked.id] = asked
        self.taken.add(asked)
        self.waiting.put(asked)
        if self.ending.is_set():
            self._refuse()

    def finalize(self):
        """Whoever has no answer yet gets an error: one that is left waiting would hold the server's end up."""
        self.ending.set()
        self.waiting.put(None)
        *work, sender = self.threads
        for thread in work:
            thread.join(10)
        self.sending.put(None)
        sender.join(10)

    def _watch(self):
        """Whether their clients still wait: to ask the server takes longer than to make a token."""
        while not self.ending.wait(_LOOK_S):
            for asked in list(self.taken):
                asked.look()

    def _send(self):
        """What is ready, while the next token is made."""
        while (entry := self.sending.get()) is not None:
            asked, make, flags = entry
            try:
                asked.send(make(), flags)
            except Exception as error:  # its client or the server has gone
                print(f"an answer could not be sent: {error}", flush=True)

    def _work(self):
        """A part of the prompts, then a token for each running request, round after round."""
        running, prompt = [], None
        try:
            while not self.ending.is_set():
                room = _PIECE if running else _WHOLE
                while room > 0 and len(running) < self.places:
                    prompt = prompt or self._next(running)
                    if prompt is None:
                        break
                    for job in running:
                        job.flush()
                    room -= self._read(prompt, running, room)
                    prompt = None if prompt.ended or prompt.tokens else prompt
                if running:
                    self._step(running)
        except Exception:  # of the loop itself: without it the process is of no use, and must not look alive
            traceback.print_exc()
            self.ending.set()
            self._refuse()
            self.sending.put(None)
            self.threads[-1].join(10)
            os._exit(1)
        self._refuse()

    def _refuse(self):
        for asked in list(self.taken):
            self._fail(asked, RuntimeError("the engine has ended"))

    def _next(self, running):
        """The next request whose tokens have room in the cache; None where it must wait. Waits where nothing runs."""
        while self.head is None:
            if running and self.waiting.empty():
                return None
            asked = self.waiting.get()
            if asked is None:
                return None
            try:
                self.head = _Job(self, asked)
            except Exception as error:
                self._fail(asked, error)
        job = self.head
        if not job.asked.over and job.most + sum(other.most for other in running) > self.budget:
            return None
        self.head = None
        return job

    def _read(self, job, running, room):
        """A part of a prompt; with its last part the request is one of those that run. How many tokens it had."""
        try:
            used = job.read(len(running), room)
        except Exception as error:
            self._fail(job.asked, error)
            job.ended, used = True, 0
        if job.ended:
            if job.row is not None:
                self.rows.free(job.row)
        elif job.tokens:
            running.append(job)
            if job.stream and len(running) == 1:
                time.sleep(_FIRST_S)
        return used

    def _step(self, running):
        """A token for each; those that have ended leave, and the last row moves to their place."""
        for job in running:
            if job.asked.over:
                job.end("cancelled")
        self._leave(running)
        if not running:
            return
        try:
            logits = self.rows.step([job.tokens[-1] for job in running], [job.length for job in running])
            likeliest = logits.argmax(axis=-1).tolist()
        except Exception as error:
            for job in running:
                self._fail(job.asked, error)
                job.ended = True
        for row, job in enumerate(running):
            if not job.ended:
                job.length += 1
                try:
                    job.take(logits[row], likeliest[row])
                except Exception as error:
                    self._fail(job.asked, error)
                    job.ended = True
        self._leave(running)

    def _leave(self, running):
        for row in range(len(running) - 1, -1, -1):
            if not running[row].ended:
                continue
            last = running.pop()
            if row < len(running):
                self.rows.move(len(running), row, last.length)
                running[row] = last
            else:
                self.rows.free(row)

    def respond(self, asked, make, flags=0):
        """Send what `make` returns, in its turn."""
        if flags:
            self.taken.discard(asked)
            if self.known.get(asked.id) is asked:
                del self.known[asked.id]
        self.sending.put((asked, make, flags))

    def _fail(self, asked, error):
        words = str(error)
        self.respond(asked, lambda: pb_utils.InferenceResponse(error=pb_utils.TritonError(words)), _LAST)


class _Asked:
    """One request as it came."""

    def __init__(self, request, send, cancelled):
        self.request = request
        self.id = request.request_id()
        self.over = False
        """Nobody wants the answer any more."""
        self._send, self._cancelled = send, cancelled
        self._open = threading.Lock()
        self._done = False

    def send(self, response, flags=0):
        with self._open:
            self._done = self._done or bool(flags)
            self._send(response, flags)

    def look(self):
        """Whether its client has left. Once it is answered, the server knows it no more, and breaks if it is asked."""
        with self._open:
            self.over = self.over or (not self._done and self._cancelled())


class _Job:
    """One request whose prompt is read, or which runs."""

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
        if any(not 0 <= token < engine.vocabulary for token in self.prompt):
            raise ValueError("the prompt has tokens that the model does not know")
        self.count = min(wanted, room)
        self.most = len(self.prompt) + self.count
        if self.most > engine.budget:
            raise ValueError(
                f"prompt and answer may have {self.most} tokens; the engine's cache has room for {engine.budget}"
            )
        self.adapter = _value(request, "lora_name", b"").decode()
        if self.adapter and self.adapter not in engine.rows.adapters:
            known = ", ".join(engine.rows.adapters) or "none"
            raise ValueError(f"there is no adapter {self.adapter!r} in this engine: there are {known}")
        self.ends = engine.ends | {int(_value(request, "end_id", -1))}
        self.stops = [word.decode() for word in _all(request, "stop_words") if word]
        self.sequences = [] if self.stops else _word_list(_tensor(request, "stop_words_list"))
        self.bad = _word_list(_tensor(request, "bad_words_list"))
        self.least = int(_value(request, "min_tokens", 0))
        seed = _value(request, "random_seed", None)
        self.choice = Choice(
            temperature=float(_value(request, "temperature", 1.0)),
            top_k=int(_value(request, "runtime_top_k", 0)),
            top_p=float(_value(request, "runtime_top_p", 0.0)),
            seed=None if seed is None else int(seed),
            penalty=float(_value(request, "repetition_penalty", 1.0)),
        )
        self.names = request.requested_output_names()
        self.asks_text = _TEXT in self.names
        self.streamer = Streamer(engine.decode, self.stops)
        self.heard, self.text = 0, ""
        """How many tokens the streamer has heard, and what of their text has not left."""
        self.told, self.sent = 0, 0.0
        """How many tokens have left, and when the last of them did."""
        self.length = 0
        """Tokens in the cache."""
        self.row = None
        self.tokens = []
        self.ended = False

    def read(self, row, room):
        """Put a part of the prompt into a row, `room` tokens at most; how many. With the last comes the first token."""
        if self.row is None:
            self.row = row
            self.engine.rows.choose(row, self.adapter)
            if self.stream and not self.engine.exclude:
                self._respond(self.prompt, self.engine.decode(self.prompt), "")
        if self.asked.over:
            self.end("cancelled")
            return 0
        part = self.prompt[self.length : self.length + room]
        logits = self.engine.rows.fill(self.row, part, self.length)
        self.length += len(part)
        if self.length == len(self.prompt):
            self.take(logits, int(logits.argmax()))
            if not self.ended and self.row != row:  # others have ended meanwhile
                self.engine.rows.move(self.row, row, self.length)
        return len(part)

    def take(self, logits, likeliest):
        """One more token, by the logits, of which that one is the likeliest."""
        forbidden = self._forbidden()
        kept = self.choice.keeps(likeliest, forbidden)
        token = likeliest if kept else self.choice.take(logits, [*self.prompt, *self.tokens], forbidden)
        if token in self.ends:
            return self.end("stop")
        self.tokens.append(token)
        full = len(self.tokens) >= self.count
        if self.stops:
            self._hear(full)
            if self.streamer.stopped:
                return self.end("stop")
        if any(self.tokens[-len(s) :] == s for s in self.sequences):
            return self.end("stop")
        if full:
            return self.end("length")
        if time.monotonic() - self.sent >= self.engine.interval:
            self.flush()
        return None

    def _hear(self, last=False):
        """Make text of the tokens that are new; where nothing looks for words in it, of several at once."""
        new, self.heard = self.tokens[self.heard :], len(self.tokens)
        if self.stops or self.asks_text:
            self.text += self.streamer.push(new)
            self.text += self.streamer.push([], last) if last and not self.streamer.stopped else ""

    def flush(self):
        """Send what is certain, of an answer that streams."""
        if not self.stream:
            return
        self._hear()
        if self.text or not self.asks_text:
            self._tell("")
            self.sent = time.monotonic()

    def _tell(self, reason):
        new, self.told = self.tokens[self.told :], len(self.tokens)
        text, self.text = self.text, ""
        self._respond(new, text, reason)

    def end(self, reason):
        self.ended = True
        if self.stream:
            self._hear(last=True)
            self._tell(reason)
            return
        before = [] if self.engine.exclude else self.prompt
        text = self.engine.decode(before + self.tokens) if self.asks_text else ""
        if self.streamer.stopped and self.asks_text:
            place = first(self.engine.decode(self.tokens), self.stops)
            text = text[: place + len(self.engine.decode(before))] if place >= 0 else text
        self._respond(before + self.tokens, text, reason)

    def _respond(self, tokens, text, reason):
        def make():
            number = np.int32
            found = {
                "output_ids": np.array([[tokens]], number).reshape(1, 1, len(tokens)),
                "sequence_length": np.array([[len(tokens)]], number),
                "prompt_length": np.array([[len(self.prompt)]], number),
                "finish_reason": np.array([[reason.encode()]], dtype=object),
                _TEXT: np.array([[text.encode()]], dtype=object),
            }
            return pb_utils.InferenceResponse([pb_utils.Tensor(name, found[name]) for name in self.names])

        self.engine.respond(self.asked, make, _LAST if reason else 0)

    def _forbidden(self):
        """The forbidden words' last tokens where the rest of them was said, and the end where it is too early."""
        out = {word[-1] for word in self.bad if self.tokens[len(self.tokens) - len(word) + 1 :] == word[:-1]}
        out |= self.ends if len(self.tokens) < self.least else set()
        return [token for token in out if 0 <= token < self.engine.vocabulary]


class _Answer:
    """Where the only response of a request that does not stream arrives."""

    def __init__(self):
        self._queue = queue.Queue()

    def send(self, response, flags=0):
        self._queue.put(response)

    def get(self):
        return self._queue.get()


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
