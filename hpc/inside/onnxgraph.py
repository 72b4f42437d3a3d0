"""What the engine for the CPU needs of the graph that onnxruntime-genai's builder makes."""

from __future__ import annotations

import re
from pathlib import Path

from hpc.core.errors import HpcError

_KNOWN = re.compile(r"input_ids|attention_mask|position_ids|past_key_values\.\d+\.(key|value)")


def refuse(model: Path) -> None:
    """HpcError for a graph whose rows cannot share a pass, each at its own length."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    constants = {entry.name for entry in graph.initializer}
    others = [i.name for i in graph.input if i.name not in constants and not _KNOWN.fullmatch(i.name)]
    kinds = {i.type.tensor_type.elem_type for i in graph.input if i.name.startswith("past_key_values.")}
    wrong = ""
    if others:
        wrong = f"the input {others[0]}"
    elif any(node.op_type == "If" for node in graph.node):
        wrong = "parts that depend on the length of all requests together (LongRoPE)"
    elif not any(node.op_type == "GroupQueryAttention" for node in graph.node):
        wrong = "an attention that does not count each request's length for itself"
    elif kinds != {onnx.TensorProto.FLOAT}:
        wrong = "a KV cache of another type than float32"
    if wrong:
        raise HpcError(
            f"the engine for the CPU cannot serve this model: its graph has {wrong}",
            hint="serve it on GPUs: build.engine = 'tensorrt_llm' or 'llmapi'",
        )
