"""Export: a checkpoint to a bundle, in the memory of one tensor.

Graphs are traced from shapes alone; then the weights stream from the checkpoint into the bundle's weight file, cast and
quantised on the way. A run that was stopped goes on behind the last complete tensor.
Source: runtime/worldvln/graphs.py (names, inputs and outputs of every graph).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from worldvln_edge import __version__
from worldvln_edge.atomic import resumable_directory
from worldvln_edge.bundle import (
    MANIFEST_FILE,
    SCHEMA,
    TOKENIZER_FILE,
    CastLoss,
    FileEntry,
    GraphEntry,
    Manifest,
    TensorSpec,
    file_entry,
    write_manifest,
)
from worldvln_edge.export.calibration import Calibration
from worldvln_edge.export.graph_sources import guidance_rows, kv_capacity
from worldvln_edge.export.graph_tracer import GraphTracer
from worldvln_edge.export.planned_tensor import CastOverflowError, CastReports
from worldvln_edge.export.precision import Precision, PrecisionError
from worldvln_edge.export.progress import Note, Progress
from worldvln_edge.export.quantise import quantise_graph
from worldvln_edge.export.tracing import ExportError, TracedGraph
from worldvln_edge.export.weight_file import JOURNAL_FILE, WEIGHTS_FILE, WeightFile
from worldvln_edge.export.world_model_graphs import KVFlavour
from worldvln_edge.exporter_identity import exporter_identity
from worldvln_edge.models.checkpoint_source import CheckpointChangedError, CheckpointSource

WEIGHTS_PROPERTY = "worldvln.weights"
"""Metadata of a graph file: JSON, initializer -> `PlannedTensor.identity`, for `verify`."""


def export_bundle(
    source: CheckpointSource,
    out: Path,
    *,
    precision: Precision | None = None,
    kv: KVFlavour = "inplace",
    calibration: Calibration | None = None,
    tracer: GraphTracer | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Manifest:
    """Write a bundle, whole or not at all.

    Args:
        source: the checkpoint.
        out: bundle folder; an existing one is replaced. What a stopped export left beside it is taken up again.
        precision: default fp32.
        kv: flavour of the KV cache, see `world_model_graphs`.
        calibration: ranges of activations, for the precisions that need them.
        tracer: pass the same one to several exports of a model, and they share the tracing.
        progress: what is being done, in bytes.
        note: told when an unfinished export cannot be taken up.

    Raises:
        CheckpointError, ConfigError: unusable checkpoint, or one that changed while it was read.
        PrecisionError: a calibration is needed, or is of another model.
        ExportError: a graph that does not export, weights that do not fit the precision, or not enough disk.
        FolderInUseError: `out` holds something else.
    """
    precision = precision or Precision(name="fp32")
    if precision.needs_calibration and calibration is None:
        raise PrecisionError(
            f"precision {precision.name} needs the ranges of activations; make them with `worldvln-edge calibrate` and "
            "pass the file with --calibration" + (", or choose --int4-method rtn" if precision.name == "int4" else "")
        )
    reports = CastReports()
    with resumable_directory(out, MANIFEST_FILE) as folder:
        fingerprint = source.fingerprint(progress and (lambda done, total: progress("checkpoint hash", done, total)))
        if calibration is not None and precision.needs_calibration:
            calibration.check_model(source.config, fingerprint)
        try:
            entries = export_graphs(
                source,
                folder,
                run=fingerprint,
                precision=precision,
                kv=kv,
                calibration=calibration,
                reports=reports,
                tracer=tracer,
                progress=progress,
                note=note,
            )
            shutil.copyfile(source.tokenizer_file, folder / TOKENIZER_FILE)
            source.check_unchanged()
        except CastOverflowError as error:
            shutil.rmtree(folder)  # no later run could go on from here
            raise ExportError(f"{error}; {_wider(precision)}") from error
        except CheckpointChangedError:
            shutil.rmtree(folder)  # tensors of two checkpoints
            raise
        if progress is not None:
            progress("hashes", 1, 1)
        files: dict[str, FileEntry] = {
            name: file_entry(folder / name)
            for name in sorted([WEIGHTS_FILE, TOKENIZER_FILE, *(entry.file for entry in entries.values())])
        }
        manifest = Manifest(
            schema=SCHEMA,
            created_by=f"worldvln-edge {__version__}",
            checkpoint_sha256=fingerprint,
            precision=precision.name,
            compute=precision.compute,
            kv_flavour=kv,
            calibration=calibration.description if calibration and precision.needs_calibration else None,
            cast_losses=tuple(
                CastLoss(tensor=r.key, dtype=r.dtype, flushed=r.flushed, largest=r.largest)
                for r in reports.losses.values()
            ),
            model=source.config,
            guidance_rows=guidance_rows(source.config),
            kv_capacity=kv_capacity(source.config),
            latent_head_stats=source.stats.latent_head if source.stats else None,
            rgb_head_stats=source.stats.rgb_head if source.stats else None,
            graphs=entries,
            files=files,
        )
        write_manifest(folder, manifest)
        (folder / JOURNAL_FILE).unlink()
    return manifest


def export_graphs(
    source: CheckpointSource,
    folder: Path,
    *,
    run: str,
    precision: Precision,
    kv: KVFlavour,
    calibration: Calibration | None,
    reports: CastReports,
    tracer: GraphTracer | None = None,
    names: Collection[str] | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> dict[str, GraphEntry]:
    """Write graph files and their weight file.

    Args:
        source: the checkpoint.
        folder: takes the files; what a stopped run of the same work left there is taken up.
        run: names the checkpoint, for that.
        precision, kv, calibration, tracer: see `export_bundle`.
        reports: takes what casts lose.
        names: of the graphs; None writes all.
        progress, note: see `export_bundle`.

    Returns:
        What the manifest says of every graph.

    Raises:
        CastOverflowError: a tensor does not fit its dtype; it is the first one.
        Others: see `export_bundle`.
    """
    rgb_head = "rgb_head" not in source.missing_parts
    traced = list(
        (tracer or GraphTracer()).graphs(
            source.config, precision, kv, reports, rgb_head=rgb_head, names=names, progress=progress
        )
    )
    for graph in traced:
        quantise_graph(graph, precision, calibration, reports)
    weights = WeightFile(tensor for graph in traced for tensor in graph.weights.values())
    identity = {
        "checkpoint": run,
        "precision": repr(precision),
        "KV flavour": kv,
        "calibration": calibration.sha256 if calibration and precision.needs_calibration else "",
        "exporter (its code or its packages)": exporter_identity(),
        "choice of graphs": " ".join(graph.name for graph in traced),
    }
    weights.write(folder, source.tensor, reports, run=identity, progress=progress, note=note)
    return {graph.name: _save(graph, folder, weights, precision) for graph in traced}


def _wider(precision: Precision) -> str:
    """What to do about a tensor that float16 cannot hold."""
    if precision.quantises:
        return "nothing was exported; compute in a wider dtype: --compute bf16 or --compute fp32"
    return "nothing was exported; choose --precision bf16 or --precision fp32"


def _save(traced: TracedGraph, folder: Path, weights: WeightFile, precision: Precision) -> GraphEntry:
    """Write the graph file, its tensors pointing into the weight file, and check it."""
    for name, tensor in traced.weights.items():
        value = traced.model.graph.initializers[name]
        value.const_value = ir.ExternalTensor(
            location=WEIGHTS_FILE,
            offset=weights.places[tensor.identity],
            length=tensor.size_bytes,
            dtype=tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=name,
            base_dir=folder,
        )
    origins = {name: tensor.identity for name, tensor in traced.weights.items()}
    traced.model.metadata_props[WEIGHTS_PROPERTY] = json.dumps(origins, separators=(",", ":"))
    model = ir.to_proto(traced.model)
    file = f"{traced.name}.onnx"
    onnx.save_model(model, folder / file)
    try:
        onnx.checker.check_model(str(folder / file))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"graph {traced.name} is not valid ONNX: {error}") from error
    return GraphEntry(
        file=file,
        opset=next(entry.version for entry in model.opset_import if entry.domain == ""),
        precision=precision.name if any(map(precision.quantised, _keys(traced))) else precision.compute,
        inputs=tensor_specs(model.graph.input),
        outputs=tensor_specs(model.graph.output),
    )


def _keys(traced: TracedGraph) -> Iterator[str]:
    return (tensor.key for tensor in traced.weights.values() if tensor.key is not None)


def tensor_specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of graph inputs or outputs."""
    specs = []
    for value in values:
        kind = value.type.tensor_type
        shape = tuple(d.dim_param if d.dim_param else int(d.dim_value) for d in kind.shape.dim)
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        specs.append(TensorSpec(name=value.name, dtype=dtype, shape=shape))
    return tuple(specs)
