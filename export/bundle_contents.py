"""What of a bundle can be compared without running it: its files against the checkpoint, its graphs against ONNX.

Source: runtime/worldvln/graphs.py (names, inputs and outputs of every graph); ONNX checker and shape inference.
"""

from __future__ import annotations

import hashlib

import onnx
from onnx import shape_inference

from worldvln_edge.bundle import TOKENIZER_FILE, Bundle, GraphEntry
from worldvln_edge.export.exporter import tensor_specs
from worldvln_edge.export.graph_sources import guidance_rows, kv_capacity
from worldvln_edge.export.parity_bounds import ParityRow
from worldvln_edge.models.checkpoint_source import CheckpointSource
from worldvln_edge.runtime.worldvln import graphs


def compare_contents(bundle: Bundle, source: CheckpointSource) -> tuple[ParityRow, bool]:
    """Everything that is not a weight.

    Returns:
        (the row `contents`, may the bundle be flown: configuration and cache are those of the checkpoint).
    """
    manifest, config = bundle.manifest, source.config
    row = ParityRow("contents")
    if manifest.model != config:
        row.failures.append("the model configuration is not the checkpoint's")
    for name, found, expected in (
        ("guidance_rows", manifest.guidance_rows, guidance_rows(config)),
        ("kv_capacity", manifest.kv_capacity, kv_capacity(config)),
    ):
        if found != expected:
            row.failures.append(f"{name} is {found}, the checkpoint gives {expected}")
    has_rgb_head = graphs.RGB_HEAD in manifest.graphs
    if has_rgb_head == ("rgb_head" in source.missing_parts):
        row.failures.append(f"{'one' if has_rgb_head else 'no'} RGB head in the bundle, unlike the checkpoint")
    can_fly = not row.failures
    tokenizer = hashlib.sha256(source.tokenizer_file.read_bytes()).hexdigest()
    if hashlib.sha256(bundle.file_path(TOKENIZER_FILE).read_bytes()).hexdigest() != tokenizer:
        row.failures.append(f"{TOKENIZER_FILE} is not the checkpoint's")
    for head in ("latent_head", "rgb_head"):
        if getattr(manifest, f"{head}_stats") != (getattr(source.stats, head) if source.stats else None):
            row.failures.append(f"label statistics of {head} are not the checkpoint's")
    return row, can_fly


def check_structure(bundle: Bundle) -> ParityRow:
    """The row `structure`: every graph is valid ONNX, its shapes infer, and it has the interface of the manifest."""
    row = ParityRow("structure", {"graphs": float(len(bundle.manifest.graphs))})
    for name, entry in bundle.manifest.graphs.items():
        reason = _fault(bundle, name, entry)
        if reason:
            row.failures.append(f"graph {name}: {reason}")
    return row


def _fault(bundle: Bundle, name: str, entry: GraphEntry) -> str | None:
    path = bundle.graph_path(name)
    try:
        onnx.checker.check_model(str(path))  # by path: the checker then finds the weight file, of any size
        model = onnx.load(path, load_external_data=False)
        inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        return f"not valid ONNX ({str(error).strip().splitlines()[0]})"
    opset = next((one.version for one in model.opset_import if one.domain == ""), 0)
    if opset != entry.opset:
        return f"opset {opset}, the manifest says {entry.opset}"
    for kind, values, specs in (
        ("inputs", inferred.graph.input, entry.inputs),
        ("outputs", inferred.graph.output, entry.outputs),
    ):
        if tensor_specs(values) != specs:
            return f"its {kind} are not those of the manifest"
    return None
