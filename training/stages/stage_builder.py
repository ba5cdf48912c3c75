"""A stage of the recipe, built from a model: networks on their device, caches filled.

Ranks share the work of filling caches, and meet when it is done.
Source: spec/training.md 0 (stages), 1.4 (caches).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from worldvln_edge.models.worldvln import WorldVLN
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.stages.action_stage import ActionStage, ActionStageConfig
from worldvln_edge.training.stages.adapter import AdapterStage, AdapterStageConfig
from worldvln_edge.training.stages.backbone_stage import BackboneConfig, BackboneStage
from worldvln_edge.training.stages.decoder_features import DecoderFeatures
from worldvln_edge.training.stages.flight_latents import cache_latents
from worldvln_edge.training.stages.flight_prediction import WorldModelPredictor
from worldvln_edge.training.stages.flight_subset import FlightSubset, first_flights
from worldvln_edge.training.stages.rgb_stage import RgbStage
from worldvln_edge.training.stages.row_plan import held_out_rows
from worldvln_edge.training.stages.shuffled_flights import ShuffledFlights
from worldvln_edge.training.stages.stage_tables import ChainConfig
from worldvln_edge.training.stages.training_start import Start
from worldvln_edge.training.stages.vae import MotionReadouts
from worldvln_edge.training.stages.vae_stage import VaeEncoderStage, VaeStage
from worldvln_edge.training.stages.vae_windows import measure_targets
from worldvln_edge.training.trainer.distributed import Ranks
from worldvln_edge.training.trainer.recipe import Recipe
from worldvln_edge.training.trainer.stage import Stage


class StageBuilder:
    """Builds stages on one set of flights.

    Args:
        start: preset or checkpoint.
        recipe: configs of the stages.
        tokenizer: of prompts.
        flights: training rows.
        held_out: rows of validation, or None.
        work: folder of the caches.
        seed: of order and draws.
        ranks: the processes.
        show_progress: bars on stderr.
    """

    def __init__(
        self,
        start: Start,
        recipe: Recipe,
        tokenizer: PromptTokenizer,
        flights: FlightSource,
        held_out: FlightSource | None,
        work: Path,
        *,
        seed: int,
        ranks: Ranks,
        show_progress: bool,
    ):
        self._start, self._recipe, self._tokenizer, self._work = start, recipe, tokenizer, work
        self._flights, self._held_out, self._seed = flights, held_out, seed
        self._ranks, self._show_progress = ranks, show_progress
        self._config = start.config
        self._chain: ChainConfig = recipe.tables["chain"]

    def build(self, name: str, model: WorldVLN, readouts: Mapping[str, Tensor] | None = None) -> Stage:
        """A stage of the recipe, with its networks on the ranks' device and its caches filled.

        Args:
            name: of the stage.
            model: trained in place. Networks that the stage runs are on the CPU; of a network that is sharded over
                processes, those of the first one.
            readouts: for `vae`: what the warm start of its encoder has learnt to read, if there was one.
        """
        if name == "vae":
            return self._vae(model, readouts)
        builders: Mapping[str, Callable[[WorldVLN], Stage]] = {
            "vae_encoder": self._vae_encoder,
            "rgb_head": self._rgb_head,
            "adapter": self._adapter,
            "sft": self._sft,
            "action": self._action,
        }
        return builders[name](model)

    def _vae_encoder(self, model: WorldVLN) -> Stage:
        targets = measure_targets(self._flights, self._config)
        readouts = MotionReadouts(self._config, int(targets.moving.sum())).to(self._ranks.device)
        vae = model.vae.to(self._ranks.device)
        config = self._recipe.stage("vae_encoder").config
        return VaeEncoderStage(vae, readouts, self._config, self._flights, targets, config, seed=self._seed)

    def _vae(self, model: WorldVLN, trained_readouts: Mapping[str, Tensor] | None) -> Stage:
        targets = measure_targets(self._flights, self._config)
        readouts = MotionReadouts(self._config, int(targets.moving.sum()))
        if trained_readouts is not None:
            readouts.load_state_dict(trained_readouts)
        return VaeStage(
            model.vae.to(self._ranks.device),
            readouts.to(self._ranks.device),
            self._config,
            self._flights,
            targets,
            self._recipe.stage("vae").config,
            seed=self._seed,
            held_out=self._held_out,
        )

    def _rgb_head(self, model: WorldVLN) -> Stage:
        return RgbStage(
            model.rgb_head.to(self._ranks.device),
            self._config,
            self._flights,
            self._recipe.stage("rgb_head").config,
            seed=self._seed,
            stats=self._start.head_stats().rgb_head if "rgb_head" in self._start.parts() else None,
            held_out=self._held_out,
        )

    def _adapter(self, model: WorldVLN) -> Stage:
        config: AdapterStageConfig = self._recipe.stage("adapter").config
        for part in (model.vae, model.rgb_head, model.latent_head):
            part.to(self._ranks.device)
        validated = self._validated(config.held_out_rows, shortest=1, stage="adapter")
        return AdapterStage(
            model.latent_head.adapter,
            model.rgb_head.tsformer.patch_embed,
            self._config.action_decoder,
            self._features(self._action_flights(), model),
            config,
            temporal_stride=self._config.video_vae.temporal_stride,
            seed=self._seed,
            held_out=None if validated is None else self._features(validated, model),
        )

    def _sft(self, model: WorldVLN) -> Stage:
        device = self._ranks.device
        config: BackboneConfig = self._recipe.stage("sft").config
        validated = self._validated(config.held_out_rows, shortest=1, stage="sft")
        latents = [
            None
            if flights is None
            else cache_latents(
                model.vae.to(device),
                flights,
                self._work / "latents",
                self._ranks,
                temporal_stride=self._config.video_vae.temporal_stride,
                batch=self._chain.batch,
                show_progress=self._show_progress,
            )
            for flights in (self._flights, validated)
        ]
        assert latents[0] is not None
        model.vae.to("cpu")
        model.text_encoder.to(device)
        if self._ranks.count == 1:  # sharding moves it piece by piece; whole, it may not fit there
            model.world_model.to(device)
        return BackboneStage(
            config,
            self._config,
            model.world_model,
            model.text_encoder,
            self._tokenizer,
            latents[0],
            latents[1],
            seed=self._seed,
        )

    def _action(self, model: WorldVLN) -> Stage:
        config: ActionStageConfig = self._recipe.stage("action").config
        predicts = config.predicted_share > 0
        device = self._ranks.device
        for part in (model.vae, model.latent_head, *([model.world_model, model.text_encoder] if predicts else [])):
            part.to(device)
        shortest = self._config.action_decoder.latent_head.window
        validated = self._validated(config.held_out_rows, shortest=shortest, stage="action")
        return ActionStage(
            model.latent_head,
            self._config,
            self._features(self._action_flights(), model, predicts=predicts),
            config,
            seed=self._seed,
            stats=self._start.head_stats().latent_head if self._start.source is not None else None,
            vae=model.vae if config.vae_rate else None,
            held_out=None if validated is None else self._features(validated, model, predicts=predicts),
            shuffled=None if validated is None else self._features(ShuffledFlights(validated), model),
        )

    def _action_flights(self) -> FlightSource:
        return first_flights(self._flights, self._chain.action_flights)

    def _validated(self, most: int, *, shortest: int, stage: str) -> FlightSource | None:
        """The held-out flights that a stage looks at: nothing is computed for the others."""
        rows = held_out_rows(self._held_out, most, shortest=shortest, stage=stage)
        return FlightSubset(self._held_out, rows) if self._held_out is not None and rows else None

    def _features(self, flights: FlightSource, model: WorldVLN, *, predicts: bool = False) -> DecoderFeatures:
        """Decoder features (or codes) of flights; ranks share the work."""
        predictor = None
        if predicts:
            model.world_model.eval()
            model.text_encoder.eval()
            predictor = WorldModelPredictor(model.world_model, model.text_encoder, self._tokenizer, self._config)
        features = DecoderFeatures(
            self._work / "features",
            flights,
            model.vae,
            self._config,
            keep=self._chain.keep,
            predictor=predictor,
            seed=self._seed,
        )
        own = range(self._ranks.rank, len(flights), self._ranks.count)
        features.prepare(own, batch=self._chain.batch, show_progress=self._show_progress)
        self._ranks.wait()
        return features
