"""Bundles broken on purpose, in ways that only a comparison with the checkpoint can find: their hashes are right."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx

from worldvln_edge.bundle import Bundle, file_entry


def rehash(bundle: Path, file: str) -> None:
    """Make the manifest agree with a changed file, so that only parity can find the change."""
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][file] = msgspec.to_builtins(file_entry(bundle / file))
    path.write_text(json.dumps(content))


def flip_bit(bundle: Path, graph: str, contains: str, *, byte: int = 0, mask: int = 0x10) -> None:
    """Change one bit of the largest tensor of a graph whose name contains a text."""
    path = bundle / Bundle.open_manifest(bundle).graphs[graph].file
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    tensor = max((t for t in tensors if t.external_data and contains in t.name), key=lambda t: np.prod(t.dims))
    place = {entry.key: entry.value for entry in tensor.external_data}
    with (bundle / "weights.bin").open("r+b") as stream:
        stream.seek(int(place["offset"]) + byte)
        value = stream.read(1)[0]
        stream.seek(int(place["offset"]) + byte)
        stream.write(bytes([value ^ mask]))
    rehash(bundle, "weights.bin")


def change_graph(bundle: Path, graph: str, change: Callable[[onnx.ModelProto], None]) -> None:
    file = Bundle.open_manifest(bundle).graphs[graph].file
    model = onnx.load(bundle / file, load_external_data=False)
    change(model)
    onnx.save_model(model, bundle / file)
    rehash(bundle, file)


def copy_one_block_scale(bundle: Path) -> None:
    """Give the first block (int4) or the first row (int8) of one linear the scale of the one that is most unlike it."""
    path = bundle / Bundle.open_manifest(bundle).graphs["world_model_step"].file
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    tensor = next(t for t in tensors if t.external_data and t.name.endswith("down_proj.weight.transposed.scales"))
    place = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key in ("offset", "length")}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    weights = np.memmap(bundle / "weights.bin", np.uint8, "r+")
    scales = weights[place["offset"] : place["offset"] + place["length"]].view(dtype).reshape(tensor.dims)
    blocks = scales[:, 0] if scales.ndim == 2 else scales
    blocks[0] = blocks[np.argmax(np.abs(np.log(blocks.astype(np.float32) / np.float32(blocks[0]))))]
    weights.flush()
    rehash(bundle, "weights.bin")
