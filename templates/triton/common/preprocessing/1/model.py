"""Text -> tokens, with the model's own tokenizer."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        folder = Path(parameters["tokenizer_dir"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()  # training may have left both in the file
        self.tokenizer.no_padding()
        self.special = parameters["add_special_tokens"] == "true"
        self.max_tokens = int(parameters["default_max_tokens"])
        self.end, self.pad = _ends(folder, self.tokenizer)
        # TensorRT-LLM takes one end: the others are stop words to it. Our own engine knows them all
        self.further = _further(folder, self.end) if parameters["stop_words_as"] == "tokens" else []

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        query = _tensor(request, "QUERY")
        if query is None or query.size != 1:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("one text_input per request, please"))
        special = _tensor(request, "ADD_SPECIAL_TOKENS")
        special = self.special if special is None else bool(special.flat[0])
        tokens = self.tokenizer.encode(_text(query.flat[0]), add_special_tokens=special).ids
        if not tokens:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("text_input is empty"))
        asked = _tensor(request, "REQUEST_OUTPUT_LEN")
        length = self.max_tokens if asked is None else int(asked.flat[0])
        tensors = [
            pb_utils.Tensor("INPUT_ID", np.array([tokens], np.int32)),
            pb_utils.Tensor("REQUEST_INPUT_LEN", np.array([[len(tokens)]], np.int32)),
            pb_utils.Tensor("BAD_WORDS_IDS", self._words(_tensor(request, "BAD_WORDS_DICT"))),
            pb_utils.Tensor("STOP_WORDS_IDS", self._words(_tensor(request, "STOP_WORDS_DICT"), self.further)),
            pb_utils.Tensor("REQUEST_OUTPUT_LEN", np.array([[length]], np.int32)),
            pb_utils.Tensor("OUT_END_ID", np.array([[self.end]], np.int32)),
            pb_utils.Tensor("OUT_PAD_ID", np.array([[self.pad]], np.int32)),
        ]
        return pb_utils.InferenceResponse(tensors)

    def _words(self, words, further=()):
        """The engine's word lists: the tokens of all words after each other, and where each ends, filled up with -1."""
        tokens, ends = [], []
        texts = [] if words is None else map(_text, words.flat)
        known = [self.tokenizer.encode(word, add_special_tokens=False).ids for word in texts if word]
        for found in [*known, *([token] for token in further)]:
            if found:
                tokens += found
                ends.append(len(tokens))
        width = max(len(tokens), 1)
        rows = [row + [fill] * (width - len(row)) for row, fill in ((tokens, 0), (ends, -1))]
        return np.array([rows], np.int32)


def _ends(folder, tokenizer):
    """(end, pad) as the tokenizer's settings name them; -1 where they do not."""
    settings = _json(folder / "tokenizer_config.json")

    def number(name):
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        found = tokenizer.token_to_id(value) if value else None
        return -1 if found is None else found

    end, pad = number("eos_token"), number("pad_token")
    return end, end if pad < 0 else pad


def _further(folder, end):
    """The other tokens that end an answer, as the model's generation_config.json has them."""
    ends = _json(folder / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return [token for token in ends if token != end]


def _json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _tensor(request, name):
    found = pb_utils.get_input_tensor_by_name(request, name)
    return None if found is None else found.as_numpy()


def _text(value):
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
