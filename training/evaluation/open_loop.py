"""Every stage of a checkpoint on recorded held-out flights, so that one sees which stage limits what is flown.

Nothing is flown: motions are read from frames, from latents, or from what the world model predicts, and are compared
with the recorded ones. The numbers of the stages come from their own validation; what is added here is the chain

    rgb head on real frames    no latents at all
    true latents               codes of the true frames
    teacher-forced scales      the next clip predicted, each scale from the true coarser scales
    predicted latents          the next clip predicted, each scale from the predicted coarser scales

over the segments of the flights, with true frames before each segment; and the closed loop is what `eval` flies.
Source: spec/training.md 4.7, 8.4, 8.6.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import torch
from tqdm import tqdm

from worldvln_edge.models.worldvln import Checkpoint, load_checkpoint
from worldvln_edge.runtime.bench.report_table import Part
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.data.simulator_flights import SimulatorFlights
from worldvln_edge.training.evaluation.acceptance import acceptance_lines
from worldvln_edge.training.evaluation.acceptance_tables import acceptance_table
from worldvln_edge.training.evaluation.open_loop_tables import Metrics, chain_parts
from worldvln_edge.training.sim.shards import SETTINGS_FILE
from worldvln_edge.training.stages.action_stage import ActionStage, ActionStageConfig
from worldvln_edge.training.stages.adapter import AdapterStage, AdapterStageConfig
from worldvln_edge.training.stages.backbone_rows import LatentSet
from worldvln_edge.training.stages.backbone_stage import BackboneConfig, BackboneStage
from worldvln_edge.training.stages.decoder_features import DecoderFeatures
from worldvln_edge.training.stages.flight_latents import encode_flights
from worldvln_edge.training.stages.flight_prediction import WorldModelPredictor
from worldvln_edge.training.stages.flight_subset import FlightSubset
from worldvln_edge.training.stages.rgb_stage import RgbStage, RgbStageConfig
from worldvln_edge.training.stages.shuffled_flights import ShuffledFlights
from worldvln_edge.training.stages.vae import MotionReadouts
from worldvln_edge.training.stages.vae_stage import VaeConfig, VaeStage, VaeWeights
from worldvln_edge.training.stages.vae_windows import measure_targets
from worldvln_edge.training.trainer.run_folder import RUN_FILE

_ROWS_TOGETHER = 8


class OpenLoopError(ValueError):
    """Flights that a checkpoint cannot be measured on. The message says what was found and what to give."""


class OpenLoopReport(msgspec.Struct, frozen=True, kw_only=True):
    """Metrics by the names that the stages give them; see `VaeStage`, `validate_backbone`, `MotionValidation`."""

    flights: int
    split: str
    """Of the flights; `train` measures memory, not skill."""
    seed: int
    is_adapter_distilled: bool
    """Whether the checkpoint's adapter learnt from the RGB head's patch embedding in a stage of its own."""
    vae: Metrics
    backbone: Metrics
    adapter: Metrics
    """Against the RGB head's patch embedding, which it learns from where it is distilled; where it was trained with
    the action head alone it need not be like it. Empty without an RGB head of the same tokens."""
    action: Metrics
    """Without prefix and `segment_`: true latents; `predicted_`: predicted latents."""
    teacher_forced: Metrics
    """`predicted_` of the same head, with the true coarser scales shown."""
    shuffled: Metrics
    """Control, without prefix: the latents of flights whose frames were put into a random order before the VAE. Frames
    say nothing of the recorded motion there, so NMSE below 1 is something else that the head goes by."""
    rgb_head: Metrics
    """Empty where the checkpoint has none."""

    def parts(self) -> list[Part]:
        """Sentences and tables."""
        return [
            f"Open loop on {self.flights} recorded flights of the split {self.split}:",
            acceptance_table(acceptance_lines(self)),
            *chain_parts(self.backbone, self.action, self.teacher_forced, self.rgb_head),
        ]


def measure_open_loop(
    checkpoint: Path, flights: Path, *, limit: int | None = None, seed: int = 0, show_progress: bool = True
) -> OpenLoopReport:
    """Measure all stages on the CPU.

    Args:
        checkpoint: folder that `worldvln-edge train` wrote.
        flights: shards of held-out flights (`worldvln-edge sim flights --split validation`).
        limit: use at most that many.
        seed: of the world model's draws.
        show_progress: a bar on stderr, one step a stage.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be read.
        FlightDataError: the shards cannot be read.
        OpenLoopError: flights of another length than the model's, or fewer than two.
    """
    loaded = load_checkpoint(checkpoint)
    source = SimulatorFlights(flights, loaded.config.image_hw)
    count = len(source) if limit is None else min(limit, len(source))
    lengths = {source.frame_count(row) for row in range(count)}
    if count < 2 or lengths != {loaded.config.horizon.num_frames}:
        raise OpenLoopError(
            f"{flights}: {count} flights of {sorted(lengths)} frames; {checkpoint} needs at least 2 flights of "
            f"{loaded.config.horizon.num_frames} frames"
        )
    networks = _Networks(loaded, FlightSubset(source, range(count)), seed)
    with tqdm(total=7, desc="open loop", unit="stage", disable=not show_progress) as bar:

        def stage(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
            bar.update()
            bar.set_postfix_str(f"{name} done")
            return {key: round(float(value), 6) for key, value in metrics.items() if math.isfinite(value)}

        return OpenLoopReport(
            flights=count,
            split=_split(flights),
            seed=seed,
            is_adapter_distilled=_has_stage(checkpoint, AdapterStage.name),
            vae=stage("vae", networks.vae()),
            backbone=stage("backbone", networks.backbone()),
            adapter=stage("adapter", networks.adapter()),
            action=stage("action", networks.action(networks.predictor(is_teacher_forced=False))),
            teacher_forced=stage("teacher-forced", networks.action(networks.predictor(is_teacher_forced=True))),
            shuffled=stage("shuffled", networks.action(None, ShuffledFlights(networks.flights))),
            rgb_head=stage("rgb head", networks.rgb_head()),
        )


class _Networks:
    """A checkpoint and held-out flights, for the stages' validation."""

    def __init__(self, loaded: Checkpoint, flights: FlightSource, seed: int):
        self._loaded, self.flights, self._count, self._seed = loaded, flights, len(flights), seed
        self._config, self._model = loaded.config, loaded.model.eval().requires_grad_(False)
        longest = loaded.config.world_model.text_max_tokens
        self._tokenizer = PromptTokenizer.load(loaded.tokenizer_file, longest)

    def vae(self) -> Mapping[str, float]:
        """Reconstruction of whole flights through their codes; the readouts are not asked."""
        only = VaeWeights(commitment=0.0, flow_codes=0.0, flow_features=0.0, motion_codes=0.0, motion_features=0.0)
        training = VaeConfig(window=self._config.horizon.num_frames, weights=only, held_out_rows=self._count)
        targets = measure_targets(self.flights, self._config)
        readouts = MotionReadouts(self._config, int(targets.moving.sum()))
        stage = VaeStage(
            self._model.vae,
            readouts,
            self._config,
            self.flights,
            targets,
            training,
            seed=self._seed,
            held_out=self.flights,
        )
        return stage.validate()

    def backbone(self) -> Mapping[str, float]:
        texts = [self.flights.instruction(row) for row in range(self._count)]
        parts = [
            range(first, min(first + _ROWS_TOGETHER, self._count)) for first in range(0, self._count, _ROWS_TOGETHER)
        ]
        latents = torch.cat([encode_flights(self._model.vae, self.flights, rows) for rows in parts])
        held_out = LatentSet(latents, texts)
        stage = BackboneStage(
            BackboneConfig(micro_rows=_ROWS_TOGETHER, held_out_rows=self._count),
            self._config,
            self._model.world_model,
            self._model.text_encoder,
            self._tokenizer,
            held_out,
            held_out,
            seed=self._seed,
        )
        stage.network.eval()
        return stage.validate()

    def predictor(self, *, is_teacher_forced: bool) -> WorldModelPredictor:
        return WorldModelPredictor(
            self._model.world_model,
            self._model.text_encoder,
            self._tokenizer,
            self._config,
            is_teacher_forced=is_teacher_forced,
        )

    def action(self, predictor: WorldModelPredictor | None, source: FlightSource | None = None) -> Mapping[str, float]:
        """The latent head on flights of `source`, None: the recorded ones."""
        with self._features(predictor, source or self.flights) as features:
            stage = ActionStage(
                self._model.latent_head,
                self._config,
                features,
                ActionStageConfig(held_out_rows=self._count),
                seed=self._seed,
                stats=self._loaded.stats.latent_head,
                held_out=features,
            )
            stage.network.eval()
            return stage.validate()

    def rgb_head(self) -> Mapping[str, float]:
        if "rgb_head" in self._loaded.missing_parts:
            return {}
        stage = RgbStage(
            self._model.rgb_head,
            self._config,
            self.flights,
            RgbStageConfig(flow=0.0, held_out_rows=self._count),
            seed=self._seed,
            stats=self._loaded.stats.rgb_head,
            held_out=self.flights,
        )
        stage.network.eval()
        return stage.validate()

    def adapter(self) -> Mapping[str, float]:
        heads = self._config.action_decoder
        student, rgb = heads.latent_head, heads.rgb_head
        has_teacher = "rgb_head" not in self._loaded.missing_parts
        if not has_teacher or (student.grid_hw, student.width) != (rgb.grid_hw, rgb.width):
            return {}
        with self._features(None, self.flights) as features:
            stage = AdapterStage(
                self._model.latent_head.adapter,
                self._model.rgb_head.tsformer.patch_embed,
                heads,
                features,
                AdapterStageConfig(held_out_rows=self._count),
                temporal_stride=self._config.video_vae.temporal_stride,
                seed=self._seed,
                held_out=features,
            )
            return stage.validate()

    @contextmanager
    def _features(self, predictor: WorldModelPredictor | None, source: FlightSource) -> Iterator[DecoderFeatures]:
        with TemporaryDirectory(prefix="worldvln-open-loop-") as folder:
            features = DecoderFeatures(
                Path(folder),
                source,
                self._model.vae,
                self._config,
                keep="codes",
                predictor=predictor,
                seed=self._seed,
            )
            features.prepare(batch=_ROWS_TOGETHER)
            yield features


def _has_stage(checkpoint: Path, stage: str) -> bool:
    """Whether the checkpoint was made by a run with that stage; what says nothing of its stages had none."""
    try:
        runs = json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(runs, dict) and stage in runs


def _split(flights: Path) -> str:
    """Of the run that made the shards; `unknown` where it does not say."""
    try:
        settings = json.loads((flights / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return "unknown"
    found = settings.get("split") if isinstance(settings, dict) else None
    return found if isinstance(found, str) else "unknown"
