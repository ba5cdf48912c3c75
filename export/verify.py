"""Parity of a bundle with its checkpoint: contents, structure, every weight, every stage, whole flights.

| row               | compared                                                                             |
|-------------------|--------------------------------------------------------------------------------------|
| contents          | configuration, cache, tokenizer, label statistics with those of the checkpoint        |
| structure         | graphs with the rules of ONNX and with the manifest                                   |
| weights           | every stored tensor with its checkpoint tensor (`weight_parity`)                      |
| text_encoder ...  | nine stages on the same input (`stage_parity`)                                        |
| flight            | free flights on the same frames and seeds (`flight_parity`)                           |

Precisions that ONNX Runtime's CPU provider does not run (bf16, fp8) end behind `weights`: "built, not run".
Source: spec/world_model.md 6, 9.6; bounds: `parity_bounds`, docs/precision.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from worldvln_edge.bundle import Bundle, ParityResult, write_manifest
from worldvln_edge.export.bundle_contents import check_structure, compare_contents
from worldvln_edge.export.calibrate import Flight
from worldvln_edge.export.closed_loop import ClosedLoop
from worldvln_edge.export.flight_parity import FlightParity
from worldvln_edge.export.parity_bounds import ParityRow, VerifyError, bounds_for, runs_on_cpu
from worldvln_edge.export.parity_flights import PACKAGED_FRAMES, choose_flights, packaged_flights
from worldvln_edge.export.stage_parity import StageParity
from worldvln_edge.export.torch_flight import fly_in_torch
from worldvln_edge.export.weight_parity import compare_weights
from worldvln_edge.models.checkpoint_source import CheckpointSource, load_source
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime import graphs
from worldvln_edge.runtime.engine import OnnxEngine
from worldvln_edge.runtime.tokenizer import PromptTokenizer
from worldvln_edge.runtime.worldvln_policy import load_policy

__all__ = ["ParityReport", "VerifyError", "record_parity", "verify_bundle"]

_NOT_RUN = "built, not run"

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """What `verify_bundle` found."""

    rows: list[ParityRow]
    engine: str
    """What ran the graphs; empty where nothing did."""
    flights: int
    seed: int
    frames: str

    @property
    def result(self) -> str:
        """`passed`, `failed` or `built, not run`."""
        if any(row.failures for row in self.rows):
            return "failed"
        return "passed" if self.engine else _NOT_RUN


def verify_bundle(
    bundle_folder: Path,
    source: CheckpointSource,
    *,
    flights: Sequence[Flight] | None = None,
    frames_from: str = PACKAGED_FRAMES,
    count: int = 8,
    seed: int = 0,
    run: bool = True,
    progress: Progress | None = None,
) -> ParityReport:
    """Compare a bundle with the checkpoint it was made from.

    Flying needs the memory of the whole model in float32; without it, that of one tensor.

    Args:
        bundle_folder, source: the two sides.
        flights: frames (uint8 [F, H, W, 3], any size) and instructions; None takes those of the package.
        frames_from: where `flights` come from, for the manifest.
        count: whole flights to compare, each with a seed of its own.
        seed: of the first flight.
        run: False compares contents, structure and weights only.
        progress: called with what is done before it is.

    Returns:
        The table; a row with `failures` is out of bounds. Nothing is flown with another configuration.

    Raises:
        VerifyError: the bundle was made from another checkpoint.
        FlightsError: too few frames.
        BundleError, CheckpointError, EngineError: either side is unusable.
    """
    say = progress or (lambda what: None)
    bundle = Bundle.open(bundle_folder)
    manifest = bundle.manifest
    say("checkpoint's sha256")
    found, made_from = source.fingerprint(), manifest.checkpoint_sha256
    if found != made_from:
        raise VerifyError(
            f"{bundle_folder} was made from a checkpoint with sha256 {made_from[:12]}, this one has {found[:12]}; name "
            "the checkpoint it was made from, or export again"
        )
    flown = choose_flights(packaged_flights() if flights is None else flights, count, source.config.horizon)
    say("contents, structure, weights")
    contents, can_fly = compare_contents(bundle, source)
    structure = check_structure(bundle)
    rows = [contents, structure, compare_weights(bundle, source)]
    if not (run and can_fly and not structure.failures and runs_on_cpu(manifest.precision, manifest.compute)):
        return ParityReport(rows=rows, engine="", flights=0, seed=seed, frames="")
    rows += _fly(bundle, source, flown, seed, say)
    runner = OnnxEngine(bundle.graph_path(graphs.LATENT_EMBED)).runner
    return ParityReport(rows=rows, engine=runner, flights=len(flown), seed=seed, frames=frames_from)


def _fly(bundle: Bundle, source: CheckpointSource, flights: list[Flight], seed: int, say: Progress) -> list[ParityRow]:
    bounds = bounds_for(bundle.manifest.precision, bundle.manifest.compute)
    say("PyTorch model")
    checkpoint = load_source(source)
    policy = load_policy(bundle.folder)
    tokenizer = PromptTokenizer.load(source.tokenizer_file, source.config.world_model.text_max_tokens)
    stages = StageParity(bundle, checkpoint, policy)
    free = FlightParity(policy, flips_at_ties_only=bundle.manifest.precision == "fp32")
    for index, (frames, instruction) in enumerate(flights):
        prefix = f"flight {index + 1} of {len(flights)}"
        say(f"{prefix}: PyTorch")
        video = list(frames)
        ids = tokenizer.encode(tagged_prompt(instruction, source.config.horizon))[None]
        segments = fly_in_torch(checkpoint, ids, video, seed=seed + index)
        stages.add(instruction, ids, video, segments, lambda stage, prefix=prefix: say(f"{prefix}: {stage}"))
        say(f"{prefix}: free draws")
        free.add(instruction, video, seed + index, segments)
    return [*stages.rows(bounds), free.row(bounds["flight"])]


def record_parity(bundle_folder: Path, report: ParityReport, closed_loop: ClosedLoop | None = None) -> None:
    """Write the result into the manifest, in one rename; `closed_loop` as a stage of its own.

    Raises:
        BundleError: the bundle is gone or broken.
    """
    manifest = Bundle.open_manifest(bundle_folder)
    result = ParityResult(
        result=report.result,
        engine=report.engine,
        flights=report.flights,
        seed=report.seed,
        frames=report.frames,
        failures=tuple(f"{row.stage}: {reason}" for row in report.rows for reason in row.failures),
    )
    parity = {row.stage: row.measures() for row in report.rows}
    if closed_loop is not None:
        parity["closed_loop"] = closed_loop.measures()
    elif "closed_loop" in manifest.parity:
        parity["closed_loop"] = manifest.parity["closed_loop"]
    write_manifest(bundle_folder, msgspec.structs.replace(manifest, parity=parity, parity_result=result))
