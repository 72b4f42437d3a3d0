"""The engine's graph over the rows of one KV cache: a prompt into a row, and a token for all rows in one pass.

The graph that onnxruntime-genai's builder makes counts each row's keys by its attention mask, so rows of different
lengths share a pass, each from its own place: every weight is read once for all of them.
"""

import json
import mmap
import os

import numpy as np
import onnxruntime

_NO_RESERVE = 0x4000
_NO_HUGE_PAGES = 15
"""MADV_NOHUGEPAGE: one token would occupy 2 MiB in each of the cache's arrays."""
_PAGE = 64
"""Tokens to which a row is rounded up, so that it begins on a page of memory whatever the size of a head."""
_SPIN_US = 200
_WIDTH = 256
"""Steps in which the mask grows: what is bound to the graph stays the same in between."""


class Rows:
    def __init__(self, folder, count, longest, threads):
        settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        decoder = settings["decoder"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # threads that spin until there is work take the cores from the processes that bring and send the texts
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(folder / decoder["filename"]), options, providers=["CPUExecutionProvider"]
        )
        self.length = -(-longest // _PAGE) * _PAGE
        self.vocabulary = settings["vocab_size"]
        self._inputs = {entry.name for entry in self.session.get_inputs()}
        names = [
            (decoder["inputs"][f"past_{kind}_names"] % layer, decoder["outputs"][f"present_{kind}_names"] % layer)
            for layer in range(decoder["num_hidden_layers"])
            for kind in ("key", "value")
        ]
        shape = (count, decoder["num_key_value_heads"], self.length, decoder["head_size"])
        self._cache = [(*pair, _Array(shape)) for pair in names]
        adapters = folder / "adapters.json"
        known = json.loads(adapters.read_text(encoding="utf-8")) if adapters.is_file() else {"names": {}, "width": 0}
        self.adapters, width = known["names"], known["width"]
        """Name -> the part of the adapters' common width that is its own."""
        self._ids = np.zeros(count, np.int64)
        self._mask = np.zeros(count * self.length, np.int64)
        self._places = np.zeros(count, np.int64)
        self._open = np.zeros((count, 1, width), np.float32)
        self._logits = np.zeros((count, 1, self.vocabulary), np.float32)
        self._bound = (0, 0, None)

    def choose(self, row, adapter):
        """The adapter by which this row is answered; "": none."""
        self._open[row] = 0
        if adapter:
            first, last = self.adapters[adapter]
            self._open[row, :, first:last] = 1

    def fill(self, row, tokens, before):
        """Put tokens into a row that has `before` already; what comes after them, as logits."""
        end = before + len(tokens)
        ids, mask = np.array([tokens], np.int64), np.ones((1, end), np.int64)
        places = np.arange(before, end, dtype=np.int64)[None]
        binding = self._binding(row, 1, ids, mask, places)
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()[0, -1]

    def step(self, tokens, lengths):
        """One more token for each of the first rows, which have these lengths; what comes after it, row by row."""
        count, width = len(tokens), min(-(-(max(lengths) + 1) // _WIDTH) * _WIDTH, self.length)
        self._ids[:count], self._places[:count] = tokens, lengths
        mask = self._mask[: count * width].reshape(count, width)
        mask[...] = np.arange(width) <= self._places[:count, None]
        if self._bound[:2] != (count, width):
            binding = self._binding(0, count, self._ids[:count, None], mask, self._places[:count, None])
            self._bind(binding.bind_output, "logits", self._logits[:count])
            self._bound = (count, width, binding)
        self.session.run_with_iobinding(self._bound[2])
        return self._logits[:count, 0]

    def move(self, source, target, length):
        """A row's tokens to another row; the first is free then."""
        for _, _, array in self._cache:
            array.rows[target, :, :length] = array.rows[source, :, :length]
        self._open[target] = self._open[source]
        self.free(source)

    def free(self, row):
        """Give the row's memory back to the machine."""
        for _, _, array in self._cache:
            array.free(row)

    def _binding(self, row, count, ids, mask, places):
        binding = self.session.io_binding()
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        given["lora_open"] = self._open[row : row + count]
        for name in self._inputs & given.keys():
            self._bind(binding.bind_input, name, given[name])
        for past, present, array in self._cache:
            part = array.rows[row : row + count]
            self._bind(binding.bind_input, past, part)
            self._bind(binding.bind_output, present, part)
        binding.kept = given  # the graph reads them where they lie
        return binding

    def _bind(self, bind, name, array):
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class _Array:
    """Memory that is occupied where it is written, and given back row by row: the machine's pages are the cache's."""

    def __init__(self, shape):
        size = int(np.prod(shape, dtype=np.int64)) * 4
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._memory = mmap.mmap(-1, size, flags=flags)
        self._memory.madvise(_NO_HUGE_PAGES)
        self._size = size // shape[0]
        self.rows = np.frombuffer(self._memory, np.float32).reshape(shape)

    def free(self, row):
        self._memory.madvise(mmap.MADV_DONTNEED, row * self._size, self._size)


def threads():
    """The job's cores, by this process and by Slurm: server, door and tokenizers need too little to leave them one."""
    there = len(os.sched_getaffinity(0))
    said = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return max(1, min(there, int(said)) if said.isdigit() else there)
