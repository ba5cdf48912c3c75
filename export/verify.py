"""Parity of a bundle with its checkpoint: contents, structure, every weight, every stage, whole flights.

| row               | compared                                                                             |
|-------------------|--------------------------------------------------------------------------------------|
| contents          | configuration, cache, tokenizer, label statistics with those of the checkpoint        |
| structure         | graphs with the rules of ONNX and with the manifest                                   |
| weights           | every stored tensor with its checkpoint tensor (`weight_parity`)                      |
| input_scales      | scales that round activations with the calibration (`input_scales`)                   |
| text_encoder ...  | nine stages on the same input, with PyTorch that holds the stored weights             |
| flight            | free flights on the same frames and seeds, with the same PyTorch                      |
| precision_cost    | the bundle with the checkpoint in float32                                             |

The rows down to `flight` say whether the graphs are the right ones: what weights and inputs lose by rounding is in the
PyTorch model as well (`stored_model`), so bounds are multiples of the noise of arithmetic (`compute_noise`), however
coarse the number format is. The last row says what the number format costs, in the engine's own way of computing.

Precisions that ONNX Runtime's CPU provider does not run (bf16, fp8) end behind `input_scales`: "built, not run".
Source: spec/world_model.md 6, 9.6; bounds: `parity_bounds`, docs/precision.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from worldvln_edge.bundle import Bundle, ParityResult, write_manifest
from worldvln_edge.export.bundle_contents import check_structure, compare_contents
from worldvln_edge.export.calibrate import Flight, collect
from worldvln_edge.export.calibration import Calibration, CalibrationError
from worldvln_edge.export.closed_loop import ClosedLoop
from worldvln_edge.export.compute_noise import NoisyModel
from worldvln_edge.export.flight_parity import FlightParity, fly_freely
from worldvln_edge.export.input_scales import check_calibration, compare_input_scales, input_scales
from worldvln_edge.export.parity_bounds import (
    ParityRow,
    VerifyError,
    bounds_from_noise,
    cost_bounds,
    runs_on_cpu,
)
from worldvln_edge.export.parity_flights import PACKAGED_FRAMES, choose_flights, packaged_flights
from worldvln_edge.export.precision import CALIBRATED, Precision
from worldvln_edge.export.precision_cost import STAGE as PRECISION_COST
from worldvln_edge.export.precision_cost import PrecisionCost, without_features
from worldvln_edge.export.progress import Note
from worldvln_edge.export.stage_noise import StageNoise
from worldvln_edge.export.stage_parity import StageParity
from worldvln_edge.export.stored_model import hold_stored_weights, round_inputs
from worldvln_edge.export.stored_weights import StoredWeightError
from worldvln_edge.export.torch_flight import TorchSegment, fly_in_torch
from worldvln_edge.export.weight_parity import compare_weights
from worldvln_edge.models.checkpoint_source import CheckpointSource, load_source
from worldvln_edge.models.worldvln import Checkpoint
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime.engines.engine import Engine, OnnxEngine
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy

__all__ = ["ParityReport", "VerifyError", "record_parity", "verify_bundle"]

_NOT_RUN = "built, not run"
_INT4_WITHOUT_ROUNDING = {"session.qdq_matmulnbits_accuracy_level": "1"}
_RANGE_FLIGHTS = 2  # on which ranges are measured where no calibration is given


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
    calibration: Calibration | None = None,
    progress: Note | None = None,
) -> ParityReport:
    """Compare a bundle with the checkpoint it was made from.

    Flying needs the memory of the whole model in float32, and half as much again for a bundle that computes in fp16;
    without it, that of one tensor.

    Args:
        bundle_folder, source: the two sides.
        flights: frames (uint8 [F, H, W, 3], any size) and instructions; None takes those of the package.
        frames_from: where `flights` come from, for the manifest.
        count: whole flights to compare, each with a seed of its own.
        seed: of the first flight.
        run: False compares contents, structure, weights and scales of inputs only.
        calibration: that the bundle was made with. Without it scales of inputs are held against the flights.
        progress: called with what is done before it is.

    Returns:
        The table; a row with `failures` is out of bounds. Nothing is flown with another configuration.

    Raises:
        VerifyError: the bundle was made from another checkpoint, or with another calibration.
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
    if calibration is not None:
        check_calibration(bundle, calibration)
    flown = choose_flights(packaged_flights() if flights is None else flights, count, source.config.horizon)
    say("contents, structure, weights")
    contents, can_fly = compare_contents(bundle, source)
    structure = check_structure(bundle)
    rows = [contents, structure, compare_weights(bundle, source)]
    measured = None
    if run and calibration is None and manifest.precision in CALIBRATED:
        say("ranges of activations")
        measured = _ranges(source, flown[:_RANGE_FLIGHTS], say)
    rows.append(compare_input_scales(bundle, calibration, measured))
    if run and can_fly and not structure.failures and runs_on_cpu(manifest.precision, manifest.compute):
        comparison = _Flights(bundle, source, flown, seed, say)
        try:
            rows += comparison.run()
        except StoredWeightError as error:
            rows[2].failures.append(f"not flown: {error}")
        else:
            runner = OnnxEngine(bundle.graph_path(graphs.LATENT_EMBED)).runner
            return ParityReport(rows=rows, engine=runner, flights=len(flown), seed=seed, frames=frames_from)
    return ParityReport(rows=rows, engine="", flights=0, seed=seed, frames="")


def _ranges(source: CheckpointSource, flights: list[Flight], say: Note) -> Calibration | None:
    """Ranges of activations on the flights; None where they show nothing that a camera could."""
    try:
        return collect(source, flights, frames_from="the flights")
    except CalibrationError as error:
        say(f"no ranges can be measured on these flights: {error}")
        return None


class _Flights:
    """Everything that is flown. The weights of one PyTorch model are first the checkpoint's, then the bundle's."""

    def __init__(self, bundle: Bundle, source: CheckpointSource, flights: list[Flight], seed: int, say: Note):
        self.bundle, self.source, self.flights, self.seed, self.say = bundle, source, flights, seed, say
        self.precision = Precision(name=bundle.manifest.precision, compute=bundle.manifest.compute)
        self.is_exact = self.precision.name == "fp32"
        say("PyTorch model")
        self.checkpoint: Checkpoint = load_source(source)
        tokenizer = PromptTokenizer.load(source.tokenizer_file, source.config.world_model.text_max_tokens)
        horizon = source.config.horizon
        self.ids = [tokenizer.encode(tagged_prompt(instruction, horizon))[None] for _, instruction in flights]

    def run(self) -> list[ParityRow]:
        """Rows from `text_encoder` on. Raises StoredWeightError for weights that no model can hold."""
        exact = [] if self.is_exact else [self._exact(index) for index in range(len(self.flights))]
        if not self.is_exact:
            hold_stored_weights(self.checkpoint.model, self.bundle)
        if self.precision.name == "int8":
            steps = {one.key: one.quantise for one in input_scales(self.bundle) if one.quantise > 0}
            round_inputs(self.checkpoint.model, steps)
        as_flown = load_policy(self.bundle.folder)
        policy = self._exact_policy(as_flown)
        stages = StageParity(self.bundle, self.checkpoint, policy)
        noise = StageNoise(self.checkpoint, NoisyModel(self.checkpoint.model, self.precision))
        free, cost = FlightParity(must_agree=self.is_exact), PrecisionCost(as_flown)
        for index, (frames, instruction) in enumerate(self.flights):
            prefix, video, ids = f"flight {index + 1} of {len(self.flights)}", list(frames), self.ids[index]
            self.say(f"{prefix}: PyTorch with the weights of the bundle")
            segments = fly_in_torch(self.checkpoint, ids, video, seed=self.seed + index)
            self.say(f"{prefix}: noise of the model")
            noise.add(ids, video, segments)
            stages.add(instruction, ids, video, segments, lambda stage, prefix=prefix: self.say(f"{prefix}: {stage}"))
            self.say(f"{prefix}: free draws")
            flown = fly_freely(policy, instruction, video, self.seed + index, len(segments))
            free.add(flown, segments, self.seed + index)
            if not self.is_exact:
                self.say(f"{prefix}: cost of the precision")
                if policy is not as_flown:
                    flown = fly_freely(as_flown, instruction, video, self.seed + index, len(segments))
                cost.add(instruction, flown, exact[index])
        bounds = bounds_from_noise(noise.values(), self.precision.compute)
        rows = [*stages.rows(bounds), free.row(bounds["flight"])]
        if self.is_exact:
            return [*rows, ParityRow(PRECISION_COST, note="fp32 keeps the checkpoint's weights")]
        return [*rows, cost.row(cost_bounds(self.precision.name))]

    def _exact_policy(self, as_flown: WorldVLNPolicy) -> WorldVLNPolicy:
        """ONNX Runtime's int4 product rounds its input to int8, which is in no graph; here it is told not to."""
        if self.precision.name != "int4":
            return as_flown
        world_model = (graphs.WORLD_MODEL_CONTEXT, graphs.WORLD_MODEL_STEP)
        engines: dict[str, Engine] = {
            name: OnnxEngine(self.bundle.graph_path(name), settings=_INT4_WITHOUT_ROUNDING) for name in world_model
        }
        return WorldVLNPolicy(as_flown.manifest, {**as_flown.engines, **engines}, as_flown.tokenizer)

    def _exact(self, index: int) -> list[TorchSegment]:
        self.say(f"flight {index + 1} of {len(self.flights)}: PyTorch")
        video = list(self.flights[index][0])
        segments = fly_in_torch(self.checkpoint, self.ids[index], video, seed=self.seed + index)
        return [without_features(segment) for segment in segments]


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
