"""The whole way from text to text: every character whole, stop words by their text, for any engine."""

import json
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import numpy as np
import triton_python_backend_utils as pb_utils
from adapters import Adapters
from text import Streamer

_ENGINE_INPUTS = {
    "min_tokens": "min_tokens",
    "top_k": "runtime_top_k",
    "top_p": "runtime_top_p",
    "temperature": "temperature",
    "repetition_penalty": "repetition_penalty",
    "random_seed": "random_seed",
    "lora_name": "lora_name",
}
_OTHER_NAMES = {"min_tokens": "min_length", "random_seed": "seed"}
"""TensorRT-LLM's for the same, by its release: it does not look at names that it does not know."""
_PROMPT_INPUTS = {
    "text_input": "QUERY",
    "bad_words": "BAD_WORDS_DICT",
    "stop_words": "STOP_WORDS_DICT",
    "max_tokens": "REQUEST_OUTPUT_LEN",
    "add_special_tokens": "ADD_SPECIAL_TOKENS",
}
_PROMPT_OUTPUTS = {
    "INPUT_ID": "input_ids",
    "REQUEST_INPUT_LEN": "input_lengths",
    "REQUEST_OUTPUT_LEN": "request_output_len",
    "BAD_WORDS_IDS": "bad_words_list",
    "STOP_WORDS_IDS": "stop_words_list",
    "OUT_END_ID": "end_id",
    "OUT_PAD_ID": "pad_id",
}
_LAST = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        parameters = {k: v["string_value"] for k, v in config["parameters"].items()}
        self.engine = parameters["tensorrt_llm_model_name"]
        self.texts = parameters["stop_words_as"] == "text"
        # our own engine knows its adapters by name; TensorRT-LLM's backend knows tasks, and takes arrays
        self.adapters = None if self.texts else Adapters(parameters["adapters"], parameters["engine_dir"])
        self.longest = int(parameters["max_seq_len"])
        self.exclude = parameters["exclude_input_in_output"] == "true"
        self.asked = []
        """The ids of the requests that the engine works on."""
        self.decoupled = config["model_transaction_policy"]["decoupled"]
        self.pool = ThreadPoolExecutor(max(1, int(parameters["max_batch_size"])))

    def execute(self, requests):
        if self.decoupled:
            for request in requests:
                self.pool.submit(self._stream, request, request.get_response_sender())
            return None
        return list(self.pool.map(self._whole, requests))

    def finalize(self):
        self.pool.shutdown()

    def _stream(self, request, sender):
        try:
            for response, last in self._responses(request, sender.is_cancelled):
                sender.send(response, _LAST if last else 0)
        except Exception as error:
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))), _LAST)

    def _whole(self, request):
        try:
            if _flag(request, "stream"):
                raise ValueError("this model does not stream: its decoupled_mode is off")
            (answer,) = self._responses(request, request.is_cancelled)
            return answer[0]
        except Exception as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))

    def _responses(self, request, cancelled):
        """(response, it is the last) one after the other."""
        stream = _flag(request, "stream")
        prompt = self._call("preprocessing", _renamed(request, _PROMPT_INPUTS), list(_PROMPT_OUTPUTS))
        inputs = [pb_utils.Tensor(_PROMPT_OUTPUTS[t.name()], t.as_numpy()) for t in prompt.output_tensors()]
        inputs += _renamed(request, _ENGINE_INPUTS)
        stops = _words(request, "stop_words")
        # a stop word may come in other tokens than TensorRT-LLM looks for: its pieces are heard (which lack the prompt)
        heard = stream or bool(stops and self.decoupled and self.exclude and not self.texts)
        inputs.append(pb_utils.Tensor("streaming", np.array([[heard]])))
        if not self.texts:
            inputs += _renamed(request, _OTHER_NAMES)
        if self.texts and stops:
            inputs.append(pb_utils.Tensor("stop_words", np.array([stops], dtype=object)))
        known = {tensor.name(): tensor.as_numpy() for tensor in inputs}
        limit, asked = int(known["request_output_len"].flat[0]), int(known["input_lengths"].flat[0])
        if self.longest:
            limit = min(limit, self.longest - asked)  # as the engine has it, in silence
        if not self.texts and "min_tokens" in known and known["min_tokens"].flat[0] >= limit:
            inputs = [tensor for tensor in inputs if tensor.name() != "stop_words_list"]  # which end it all the same
        streamer, count, text, reason = Streamer(self._decode, stops), 0, "", ""
        sent, whole = 0, []
        answers = self._answered(inputs, request.request_id() or uuid4().hex)
        for tokens, said in answers:
            if cancelled():
                reason = "cancelled"
                break
            count += len(tokens)
            if not heard:
                whole += tokens
            elif tokens:
                text += streamer.push(tokens)
            reason = said or reason
            if streamer.stopped:
                break
            if stream and text:
                yield _response(text, count - sent, asked, ""), False
                text, sent = "", count
        if not streamer.stopped and (whole or streamer.window):
            text += streamer.push(whole, last=True)
        reason = "stop" if streamer.stopped else reason or ("length" if count >= limit else "stop")
        yield _response(text, count - sent, asked, reason), True
        answers.close()  # now that the client has its answer

    def _answered(self, inputs, number):
        """The same, with the adapter that the request names: whole where the engine's cache has lost it."""
        name = next((t.as_numpy().flat[0].decode() for t in inputs if t.name() == "lora_name"), "")
        if self.adapters is not None:
            inputs = [tensor for tensor in inputs if tensor.name() != "lora_name"]
        if self.adapters is None or not name:
            yield from self._tokens(inputs, number)
            return
        began = False
        try:
            for found in self._tokens(inputs + self.adapters.task(name), number):
                began = True
                yield found
        except RuntimeError as error:
            if began or not self.adapters.is_lost(str(error)):
                raise
            yield from self._tokens(inputs + self.adapters.task(name) + self.adapters.arrays(name), number)

    def _tokens(self, inputs, number):
        """(new tokens, why it ended) of each of the engine's responses. Closed before the last, it stops the engine."""
        outputs = ["output_ids", "sequence_length", *(["finish_reason"] if self.texts else [])]
        asked = pb_utils.InferenceRequest(
            request_id=number, model_name=self.engine, requested_output_names=outputs, inputs=inputs
        )
        answers = asked.exec(decoupled=True) if self.decoupled else [asked.exec()]
        self.asked.append(number)
        try:
            for answer in answers:
                if answer.has_error():
                    raise RuntimeError(answer.error().message())
                found = {tensor.name(): tensor.as_numpy() for tensor in answer.output_tensors()}
                if found:
                    length = int(found["sequence_length"].flat[0])
                    reason = found["finish_reason"].flat[0].decode() if "finish_reason" in found else ""
                    yield found["output_ids"].reshape(-1)[:length].tolist(), reason
        except GeneratorExit:
            if self.decoupled and self.asked.count(number) == 1:  # else it might end the other with this id
                self._stop(number)
            for _ in answers:  # Triton forgets only what was read to its end
                pass
            raise
        finally:
            self.asked.remove(number)

    def _stop(self, number):
        """Tell the engine that nobody waits for the rest."""
        needed = ("input_ids", "input_lengths", "request_output_len")
        inputs = [pb_utils.Tensor(name, np.array([[1]], np.int32)) for name in needed]
        inputs.append(pb_utils.Tensor("stop", np.array([[True]])))
        asked = pb_utils.InferenceRequest(
            request_id=number, model_name=self.engine, requested_output_names=["output_ids"], inputs=inputs
        )
        for _ in asked.exec(decoupled=True):
            pass

    def _decode(self, tokens):
        inputs = [
            pb_utils.Tensor("TOKENS_BATCH", np.array([[tokens]], np.int32)),
            pb_utils.Tensor("SEQUENCE_LENGTH", np.array([[len(tokens)]], np.int32)),
        ]
        (output,) = self._call("postprocessing", inputs, ["OUTPUT"]).output_tensors()
        return output.as_numpy().flat[0].decode()

    def _call(self, model, inputs, outputs):
        answer = pb_utils.InferenceRequest(model_name=model, requested_output_names=outputs, inputs=inputs).exec()
        if answer.has_error():
            raise RuntimeError(answer.error().message())
        return answer


def _response(text, count, asked, reason):
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor("text_output", np.array([[text.encode()]], dtype=object)),
            pb_utils.Tensor("sequence_length", np.array([[count]], np.int32)),
            pb_utils.Tensor("prompt_length", np.array([[asked]], np.int32)),
            pb_utils.Tensor("finish_reason", np.array([[reason.encode()]], dtype=object)),
        ]
    )


def _renamed(request, names):
    found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in names}
    return [pb_utils.Tensor(names[name], tensor.as_numpy()) for name, tensor in found.items() if tensor is not None]


def _words(request, name):
    found = pb_utils.get_input_tensor_by_name(request, name)
    return [] if found is None else [word.decode() for word in found.as_numpy().flat if word]


def _flag(request, name):
    found = pb_utils.get_input_tensor_by_name(request, name)
    return found is not None and bool(found.as_numpy().flat[0])
