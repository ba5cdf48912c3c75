"""Whether a preset's world model can learn a few sequences by heart: fresh weights, no flips, no dropped text.

The sequences are latents of the checkpoint's own VAE; world model and text encoder begin at random. The run ends as
soon as the mean bit cross entropy of all tokens is below the limit. It is a run of the trainer in a folder of its own,
so one that was interrupted goes on.
Source: spec/training.md 8.4 (row `sft`, overfit).
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from worldvln_edge.config import ModelConfig
from worldvln_edge.models.worldvln import Checkpoint
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.stages.backbone_rows import LatentSet
from worldvln_edge.training.stages.backbone_stage import BackboneConfig, BackboneStage
from worldvln_edge.training.stages.flight_latents import encode_flights
from worldvln_edge.training.stages.stage_tables import STAGES, TABLES
from worldvln_edge.training.stages.training_start import Start
from worldvln_edge.training.trainer.loss_log import read_curve
from worldvln_edge.training.trainer.optimiser import OptimiserConfig
from worldvln_edge.training.trainer.recipe import packaged_layer, read_recipe
from worldvln_edge.training.trainer.run_folder import CURVE_FILE
from worldvln_edge.training.trainer.trainer import Trainer, TrainerConfig

_RATE_WITHOUT_RECIPE = 1e-3


class OverfitConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How hard it is tried."""

    rows: int = 8
    steps: int = 600
    bit_ce: float = 0.05
    """The run ends below it."""
    look_every: int = 25
    """Steps between two looks at the cross entropy."""


class OverfitReport(msgspec.Struct, frozen=True, kw_only=True):
    """How far it came."""

    rows: int
    steps: int
    bit_ce: float
    """Mean over all tokens of all sequences."""


class _LearntByHeartError(Exception):
    """Ends a run of the trainer early; no failure."""

    def __init__(self, bit_ce: float):
        super().__init__(f"bit cross entropy {bit_ce}")
        self.bit_ce = bit_ce


class _OverfitStage(BackboneStage):
    """Validates on its training rows, until they are known by heart."""

    limit = 0.0

    def validate(self) -> dict[str, float]:
        metrics = super().validate()
        if metrics["bit_ce"] < self.limit:
            raise _LearntByHeartError(metrics["bit_ce"])
        return metrics


def measure_overfit(
    loaded: Checkpoint,
    flights: FlightSource,
    folder: Path,
    config: OverfitConfig | None = None,
    *,
    seed: int = 0,
    show_progress: bool = True,
) -> OverfitReport:
    """Train on the first rows of `flights` and nothing else.

    Args:
        loaded: its preset, VAE and tokenizer are used.
        flights: whole flights of the preset's length.
        folder: of the run.
        config: how hard it is tried.
        seed: of initial weights and order.
        show_progress: a bar on stderr.

    Raises:
        WorkFolderError: `folder` is another run's.
        TrainingDivergedError, TrainingStoppedError, CheckpointWriteError: see `Trainer.run`.
    """
    config = config or OverfitConfig()
    model_config = loaded.config
    rows = min(config.rows, len(flights))
    held = LatentSet(
        encode_flights(loaded.model.vae, flights, range(rows)), [flights.instruction(row) for row in range(rows)]
    )
    fresh = Start(config=model_config).model(seed)
    stage = _OverfitStage(
        BackboneConfig(
            flip_strength=0.0,
            condition_drop=0.0,
            scale_reweight=0.0,  # the loss is the mean over tokens, as the cross entropy that is asked for
            step_rows=rows,
            micro_rows=rows,
            pad_multiple=8,
            held_out_rows=rows,
        ),
        model_config,
        fresh.world_model,
        fresh.text_encoder,
        PromptTokenizer.load(loaded.tokenizer_file, model_config.world_model.text_max_tokens),
        held,
        held,
        seed=seed,
    )
    stage.limit = config.bit_ce
    trainer = Trainer(
        stage,
        OptimiserConfig(learning_rate=_learning_rate(model_config), steps=config.steps, warmup_steps=20, clip_norm=5.0),
        TrainerConfig(
            log_every=config.look_every,
            validate_every=config.look_every,
            save_every=2 * config.look_every,
            keep_last=1,
            keep_best=False,
            tensorboard=False,
        ),
        folder,
        {"preset": model_config.name, "sequences": [flights.key(row) for row in range(rows)]},
        seed=seed,
        show_progress=show_progress,
    )
    try:
        result = trainer.run()
    except _LearntByHeartError as reached:
        steps = int(read_curve(folder / CURVE_FILE)[-1]["step"])  # losses are logged before every look
        return OverfitReport(rows=rows, steps=steps, bit_ce=round(reached.bit_ce, 6))
    return OverfitReport(rows=rows, steps=result.steps, bit_ce=round(result.metrics["bit_ce"], 6))


def _learning_rate(config: ModelConfig) -> float:
    """Of the preset's packaged recipe, where there is one."""
    layer = packaged_layer(config.name)
    if layer is None:
        return _RATE_WITHOUT_RECIPE
    recipe = read_recipe([layer], {name: stage.config for name, stage in STAGES.items()}, TABLES)
    return recipe.stage("sft").optimiser.learning_rate if "sft" in recipe.stages else _RATE_WITHOUT_RECIPE
