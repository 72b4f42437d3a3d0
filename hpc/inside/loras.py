"""LoRA adapters into an engine's graph: all of them side by side, and an input that opens one of them for each row.

Beside every matrix that an adapter changes lie the A of all adapters in one matrix, and their B in another: a row
whose input `lora_open` is 1 in one adapter's part and 0 elsewhere is answered by that adapter, a row of zeros by the
model alone. So rows with different adapters share a pass. onnxruntime-genai's own builder takes one adapter, which is
then always on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.core import rundir
from hpc.core.errors import UsageError, VerificationFailed

FILE = "adapters.json"
_DATA = "adapters.data"
WEIGHT = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
MODULE = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<part>self_attn|mlp)\.(?P<name>\w+)")
_NODE = re.compile(r"/model/layers\.(?P<layer>\d+)/(?P<part>attn|mlp)/(?P<name>\w+)/MatMul(?:_Q\d)?")
_PAGE = 4096


def named(entries: tuple[str, ...]) -> dict[str, str]:
    """The adapters' folders by their names; UsageError where an entry is not name=folder.

    >>> named(("stars=adapters/stars",))
    {'stars': 'adapters/stars'}
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, _, folder = entry.partition("=")
        if not folder or not re.fullmatch(r"[\w.-]+", name):
            raise UsageError(
                f"build.lora: {entry!r} is not name=folder", hint='for example: lora = ["stars=adapters/stars"]'
            )
        if name in found:
            raise UsageError(f"build.lora names {name} twice")
        found[name] = folder
    return found


def inspect(name: str, folder: Path) -> Mapping[str, Any]:
    """An adapter's settings; UsageError for one that an engine cannot switch."""
    settings = rundir.read_json(folder / "adapter_config.json")
    if settings is None or not (folder / "adapter_model.safetensors").is_file():
        raise UsageError(
            f"{folder} holds no LoRA adapter", hint="it needs adapter_config.json and adapter_model.safetensors"
        )
    wrong = [
        word
        for word, bad in (
            (f"peft_type {settings.get('peft_type')}", settings.get("peft_type", "LORA") != "LORA"),
            ("DoRA", bool(settings.get("use_dora"))),
            ("biases", settings.get("bias", "none") != "none"),
            ("modules_to_save", bool(settings.get("modules_to_save"))),
            ("fan_in_fan_out", bool(settings.get("fan_in_fan_out"))),
        )
        if bad
    ]
    if wrong:
        raise UsageError(
            f"the adapter {name} has {wrong[0]}, which cannot be switched at run time",
            hint="merge it into its model and build that: hpc submit merge",
        )
    return settings


@dataclass(frozen=True)
class Adapter:
    """One adapter's matrices by module, the scale already in B."""

    name: str
    pairs: Mapping[tuple[str, str, str], tuple[Any, Any]]
    """(layer, attn or mlp, matrix) -> A of [in, rank], B of [rank, out]."""

    @property
    def rank(self) -> int:
        return max(int(a.shape[1]) for a, _ in self.pairs.values())


def add(engine: Path, adapters: Mapping[str, str]) -> None:
    """Put the adapters into the engine's graph; VerificationFailed where one does not fit the model."""
    import numpy as np
    import onnx

    taken = [read(name, Path(folder)) for name, folder in adapters.items()]
    width = sum(adapter.rank for adapter in taken)
    model = onnx.load(engine / "model.onnx", load_external_data=False)
    graph = model.graph
    nodes = {(m["layer"], m["part"], m["name"]): n for n in graph.node if (m := _NODE.fullmatch(n.name))}
    begin, parts = 0, {}
    for adapter in taken:
        parts[adapter.name] = [begin, begin + adapter.rank]
        begin += adapter.rank
        for place in adapter.pairs:
            if place not in nodes:
                raise VerificationFailed(
                    f"the adapter {adapter.name} changes {place[2]} of layer {place[0]}, which the engine lacks",
                    hint="is it of another model? an adapter of its own shape can be merged: hpc submit merge",
                )
    changed = sorted({place for adapter in taken for place in adapter.pairs})
    graph.input.append(
        onnx.helper.make_tensor_value_info("lora_open", onnx.TensorProto.FLOAT, ["batch_size", 1, width])
    )
    after: dict[str, list[Any]] = {}
    with open(engine / _DATA, "wb") as data:
        for place in changed:
            node = nodes[place]
            sides = _sides(place, taken, parts, width)
            stem = node.name.rpartition("/")[0] + "/lora"
            names = [f"{stem}_A", f"{stem}_B"]
            for name, array in zip(names, sides, strict=True):
                graph.initializer.append(_outside(name, np.ascontiguousarray(array, np.float32), data))
            result = node.output[0]
            node.output[0] = f"{result}_alone"
            make = onnx.helper.make_node
            after[node.name] = [
                make("MatMul", [node.input[0], names[0]], [f"{stem}/a"], name=f"{stem}/A"),
                make("Mul", [f"{stem}/a", "lora_open"], [f"{stem}/open"], name=f"{stem}/Open"),
                make("MatMul", [f"{stem}/open", names[1]], [f"{stem}/b"], name=f"{stem}/B"),
                make("Add", [node.output[0], f"{stem}/b"], [result], name=f"{stem}/Add"),
            ]
    ordered = [entry for node in graph.node for entry in (node, *after.get(node.name, ()))]
    del graph.node[:]
    graph.node.extend(ordered)
    (engine / "model.onnx").write_bytes(model.SerializeToString())
    rundir.write_json(engine / FILE, {"names": parts, "width": width})


def read(name: str, folder: Path) -> Adapter:
    """An adapter's matrices; VerificationFailed where one is not of a layer of the model."""
    from safetensors.torch import load_file

    settings = inspect(name, folder)
    sides: dict[tuple[str, str, str], dict[str, Any]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        weight = WEIGHT.fullmatch(key)
        module = MODULE.fullmatch(weight["module"]) if weight else None
        if weight is None or module is None:
            raise VerificationFailed(
                f"the adapter {name} changes {key}, which cannot be switched at run time",
                hint="merge it into its model and build that: hpc submit merge",
            )
        place = (module["layer"], module["part"].removeprefix("self_"), module["name"])
        sides.setdefault(place, {})[weight["side"]] = (tensor.float().numpy(), weight["module"])
    pairs = {}
    for place, both in sides.items():
        (a, module_name), (b, _) = both["A"], both["B"]
        pairs[place] = (a.T, b.T * _scale(settings, module_name, a.shape[0]))
    return Adapter(name, pairs)


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """What peft multiplies an adapter's part with."""
    patterns: Mapping[str, float] = settings.get("alpha_pattern") or {}
    own = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))
    alpha = float(next(own, settings.get("lora_alpha", rank)))
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _sides(place: tuple[str, str, str], adapters: list[Adapter], parts: Mapping[str, list[int]], width: int) -> Any:
    """A and B of one matrix, each adapter in its own part."""
    import numpy as np

    some_a, some_b = next(adapter.pairs[place] for adapter in adapters if place in adapter.pairs)
    a, b = np.zeros((some_a.shape[0], width), np.float32), np.zeros((width, some_b.shape[1]), np.float32)
    for adapter in adapters:
        if place in adapter.pairs:
            mine_a, mine_b = adapter.pairs[place]
            if (mine_a.shape[0], mine_b.shape[1]) != (a.shape[0], b.shape[1]):
                raise VerificationFailed(f"the adapters change {place[2]} of layer {place[0]} in different shapes")
            begin = parts[adapter.name][0]
            a[:, begin : begin + mine_a.shape[1]] = mine_a
            b[begin : begin + mine_b.shape[0]] = mine_b
    return a, b


def _outside(name: str, array: Any, data: Any) -> Any:
    """An array of the graph whose numbers lie in a file beside it."""
    import onnx

    data.seek(-(-data.tell() // _PAGE) * _PAGE)
    begin = data.tell()
    data.write(array.tobytes())
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=array.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", _DATA), ("offset", begin), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def names(engine: Path) -> tuple[str, ...]:
    """The adapters that an engine has."""
    found = rundir.read_json(engine / FILE) or {}
    return tuple(found.get("names", ()))
