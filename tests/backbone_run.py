"""A run of the backbone's stage under the trainer, also as a program that `torchrun` can start: see `main`."""

import json
import sys
from pathlib import Path

import msgspec
import torch
from backbone_stages import CONFIG, MixedFlights, make_stage
from safetensors.torch import save_file
from small_models import random_model

from worldvln_edge.training.stages.backbone_stage import BackboneConfig
from worldvln_edge.training.trainer.distributed import Ranks, started_ranks
from worldvln_edge.training.trainer.optimiser import OptimiserConfig
from worldvln_edge.training.trainer.trainer import Trainer, TrainerConfig, TrainingResult


def train(folder: Path, settings: dict, ranks: Ranks | None = None) -> TrainingResult:
    """Four steps on six flights; `settings` are those of `BackboneConfig`.

    Only the first of several processes has a world model with values, as in a run of the command.
    """
    flights, model = MixedFlights(), random_model(CONFIG)
    if ranks is not None and not ranks.is_first:
        model.world_model.to("meta")
    return Trainer(
        make_stage(msgspec.convert(settings, BackboneConfig), flights, model, held_out=flights),
        OptimiserConfig(learning_rate=2e-3, steps=4),
        TrainerConfig(log_every=1, validate_every=0, tensorboard=False),
        folder,
        {"settings": settings},
        seed=0,
        ranks=ranks,
        show_progress=False,
    ).run()


def main(folder: str, settings: str) -> None:
    """Train once for every name in `settings`, and write weights and metrics into the run's folder of that name."""
    torch.set_num_threads(1)
    with started_ranks("cpu") as ranks:
        for name, values in json.loads(settings).items():
            run = Path(folder, name)
            result = train(run, values, ranks)
            if ranks.is_first:
                save_file(dict(result.weights), run / "weights.safetensors")
                (run / "metrics.json").write_text(json.dumps(dict(result.metrics)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
