"""Bundles of small hand-written graphs for engine tests: the operators of the real ones, built in a second.

No torch: what is tested is what happens to an ONNX file, not how it is traced.
"""

from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from worldvln_edge.bundle import SCHEMA, TOKENIZER_FILE, Bundle, Manifest, file_entry, write_manifest
from worldvln_edge.presets import nano
from worldvln_edge.runtime.worldvln.graphs import ACTION_ADAPTER, GUIDANCE_ROWS, LATENT_EMBED

WEIGHTS = "weights.bin"
BLOCK = "cached_block"
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


class GraphWriter:
    """Nodes and random weights of one graph."""

    def __init__(self, precision: str, seed: int = 0):
        self.kind = TYPES[precision]
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def node(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"node_{name}", **attributes))
        return name

    def weight(self, *shape: int) -> str:
        name = f"weight_{len(self.weights)}"
        values = (self._random.random(shape, np.float32) - 0.5) / np.float32(np.sqrt(shape[0]))
        dtype = helper.tensor_dtype_to_np_dtype(self.kind)
        self.weights.append(numpy_helper.from_array(values.astype(dtype), name))
        return name

    def shape(self, *sizes: int) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(sizes, np.int64), name))
        return name

    def rename(self, tensor: str, name: str) -> None:
        for node in self.nodes:
            node.input[:] = [name if old == tensor else old for old in node.input]
            node.output[:] = [name if old == tensor else old for old in node.output]

    def model(self, inputs: dict[str, tuple], outputs: dict[str, tuple], opset: int = 24) -> onnx.ModelProto:
        """Inputs and outputs: name -> shape, or (element type, shape)."""

        def values(tensors: dict[str, tuple]) -> list[onnx.ValueInfoProto]:
            typed = {
                name: spec if len(spec) == 2 and isinstance(spec[1], tuple) else (self.kind, spec)
                for name, spec in tensors.items()
            }
            return [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in typed.items()]

        graph = helper.make_graph(self.nodes, "graph", values(inputs), values(outputs), self.weights)
        # onnx writes its newest IR version, which ONNX Runtime may not read yet.
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def matmul_model(precision: str, rows: tuple[int | str, ...], width: int, out: int, names: tuple[str, str]):
    writer = GraphWriter(precision)
    writer.rename(writer.node("MatMul", names[0], writer.weight(width, out)), names[1])
    return writer.model({names[0]: (*rows, width)}, {names[1]: (*rows, out)})


def block_model(
    precision: str,
    *,
    width: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    capacity: int,
    batch: int | str = GUIDANCE_ROWS,
) -> onnx.ModelProto:
    """One transformer block over a KV cache, as the exporter writes it: RMSNorm, q k v, norms of heads, TensorScatter,
    Attention with its valid length, gated feed-forward. Tokens and guidance rows vary.
    """
    writer, size = GraphWriter(precision), width // heads
    node, weight = writer.node, writer.weight

    def split(x: str, count: int) -> str:
        return node("Transpose", node("Reshape", x, writer.shape(0, -1, count, size)), perm=[0, 2, 1, 3])

    h = node("RMSNormalization", "embeds", weight(width), axis=-1, epsilon=1e-6)
    key = split(node("MatMul", h, weight(width, kv_heads * size)), kv_heads)
    key = node("RMSNormalization", key, weight(size), axis=-1, epsilon=1e-6)
    value = split(node("MatMul", h, weight(width, kv_heads * size)), kv_heads)
    query = split(node("MatMul", h, weight(width, width)), heads)
    query = node("RMSNormalization", query, weight(size), axis=-1, epsilon=1e-6)
    key = node("TensorScatter", "past_key_0", key, "write_index", axis=2, mode="linear")
    value = node("TensorScatter", "past_value_0", value, "write_index", axis=2, mode="linear")
    seen = node("Attention", query, key, value, "", "", "", "kv_length", scale=size**-0.5)
    merged = node("Reshape", node("Transpose", seen, perm=[0, 2, 1, 3]), writer.shape(0, -1, width))
    x = node("Add", "embeds", node("MatMul", merged, weight(width, width)))
    h = node("RMSNormalization", x, weight(width), axis=-1, epsilon=1e-6)
    gate = node("MatMul", h, weight(width, intermediate))
    gate = node("Mul", gate, node("Sigmoid", gate))
    wide = node("Mul", gate, node("MatMul", h, weight(width, intermediate)))
    x = node("Add", x, node("MatMul", wide, weight(intermediate, width)))
    for old, new in ((key, "present_key_0"), (value, "present_value_0"), (x, "hidden")):
        writer.rename(old, new)
    cache, index = (batch, kv_heads, capacity, size), (TensorProto.INT64, (batch,))
    return writer.model(
        {
            "embeds": (batch, "tokens", width),
            "write_index": index,
            "kv_length": index,
            "past_key_0": cache,
            "past_value_0": cache,
        },
        {"hidden": (batch, "tokens", width), "present_key_0": cache, "present_value_0": cache},
    )


def write_bundle(folder: Path, models: dict[str, onnx.ModelProto], precision: str = "fp16") -> Path:
    """A bundle folder of these graphs for the configuration `nano`; weights are external, as exported."""
    folder.mkdir(parents=True, exist_ok=True)
    graphs = {}
    with (folder / WEIGHTS).open("wb") as stream:
        for name, model in models.items():
            for tensor in model.graph.initializer:
                if len(tensor.raw_data) < 1024:
                    continue
                offset = stream.tell()
                stream.write(tensor.raw_data)
                external_data_helper.set_external_data(tensor, WEIGHTS, offset=offset, length=len(tensor.raw_data))
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
            onnx.save_model(model, folder / f"{name}.onnx")
            graphs[name] = {
                "file": f"{name}.onnx",
                "opset": model.opset_import[0].version,
                "precision": precision,
                "inputs": _specs(model.graph.input),
                "outputs": _specs(model.graph.output),
            }
    (folder / TOKENIZER_FILE).write_text("{}")
    files = [WEIGHTS, TOKENIZER_FILE, *(graph["file"] for graph in graphs.values())]
    manifest = {
        "schema": SCHEMA,
        "created_by": "test",
        "checkpoint_sha256": "0" * 64,
        "precision": precision,
        "compute": precision,
        "kv_flavour": "inplace",
        "model": msgspec.to_builtins(nano()),
        "guidance_rows": 2,
        "kv_capacity": 177,
        "latent_head_stats": None,
        "rgb_head_stats": None,
        "graphs": graphs,
        "files": {name: msgspec.to_builtins(file_entry(folder / name)) for name in files},
    }
    write_manifest(folder, msgspec.convert(manifest, Manifest))
    Bundle.open(folder)
    return folder


def _specs(values) -> list[dict]:
    return [
        {
            "name": value.name,
            "dtype": str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
            "shape": [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        }
        for value in values
    ]


def embed_bundle(folder: Path, precision: str = "fp16") -> Path:
    """`latent_embed` with open tokens and `action_adapter`, here one matrix, with fixed shapes."""
    return write_bundle(
        folder,
        {
            LATENT_EMBED: matmul_model(precision, (GUIDANCE_ROWS, "tokens"), 64, 192, ("latents", "embeds")),
            ACTION_ADAPTER: matmul_model(precision, (16, 16), 64, 96, ("features", "tokens")),
        },
        precision,
    )
