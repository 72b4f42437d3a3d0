"""LoRA adapters for TensorRT-LLM's backend: their tasks, and the arrays for a cache that does not have them."""

import json
import re
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

_LOST = re.compile(r"LoRA task \d+ not found in cache")


class Adapters:
    def __init__(self, known, engine):
        self.tasks = json.loads(known) if known else {}
        self.folder = Path(engine) / "adapters"

    def task(self, name):
        """The number alone: enough where the engine has seen the adapter and still has it."""
        if name not in self.tasks:
            known = ", ".join(self.tasks) or "none"
            raise ValueError(f"there is no adapter {name!r} in this engine: there are {known}")
        return [pb_utils.Tensor("lora_task_id", np.array([[self.tasks[name]]], np.uint64))]

    def arrays(self, name):
        folder = self.folder / str(self.tasks[name])
        names = ("lora_weights", "lora_config")
        return [pb_utils.Tensor(name, np.load(folder / f"model.{name}.npy")) for name in names]

    def is_lost(self, message):
        """Whether the engine asks for the arrays."""
        return _LOST.search(message) is not None
