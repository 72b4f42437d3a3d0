"""Tokens -> text, of each sequence."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        self.tokenizer = Tokenizer.from_file(str(Path(parameters["tokenizer_dir"]) / "tokenizer.json"))
        self.skip = parameters["skip_special_tokens"] == "true"

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        tokens, lengths = _tensor(request, "TOKENS_BATCH"), _tensor(request, "SEQUENCE_LENGTH")
        rows = tokens.reshape(lengths.size, tokens.shape[-1])
        texts = [
            self.tokenizer.decode(row[:length].tolist(), skip_special_tokens=self.skip).encode()
            for row, length in zip(rows, lengths.reshape(-1), strict=True)
        ]
        shape = lengths.shape if lengths.ndim > 1 else (1, len(texts))
        output = np.array(texts, dtype=object).reshape(shape)
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", output)])


def _tensor(request, name):
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()
