"""A stage small enough to check by hand: a two-layer network with dropout fits recorded arrays.

Also a program, so that tests can kill it and `torchrun` can start it: see `main`.
"""

import json
import sys
import time
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from worldvln_edge.training.trainer.distributed import started_ranks
from worldvln_edge.training.trainer.optimiser import OptimiserConfig
from worldvln_edge.training.trainer.stage import epoch_order, row_generator, split_steps
from worldvln_edge.training.trainer.trainer import Trainer, TrainerConfig

ROWS, FEATURES = 26, 6


class CurveFit(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.first = nn.Linear(FEATURES, 16)
        self.second = nn.Linear(16, 2)
        self.unused = nn.Parameter(torch.ones(3, 3))
        self.dropout = dropout

    def forward(self, x_BF):
        return self.second(F.dropout(torch.tanh(self.first(x_BF)), self.dropout, self.training))


class CurveFitStage:
    """Every row has 1 to 3 points; term `tail` exists for every third row only."""

    name = "sft"

    def __init__(
        self, *, seed: int = 0, step_rows: int = 6, micro_rows: int = 2, dropout: float = 0.3, pause_s: float = 0.0
    ):
        generator = torch.Generator().manual_seed(99)
        self.x = torch.randn(ROWS, 3, FEATURES, generator=generator)
        self.y = torch.stack([self.x.sum(-1).sin(), self.x[..., 0]], -1)
        torch.manual_seed(seed)
        self.network = CurveFit(dropout)
        self.coefficients = {"mse": 1.0, "tail": 0.5}
        self.pause_s = pause_s  # of every micro-batch, so that a run lasts
        self.seed, self.step_rows, self.micro_rows = seed, step_rows, micro_rows

    def plan(self, epoch):
        return split_steps(epoch_order(self.seed, epoch, ROWS), step_rows=self.step_rows, micro_rows=self.micro_rows)

    def load(self, epoch, rows):
        time.sleep(self.pause_s)
        points, targets, tails = [], [], []
        for row in rows:
            used = row % 3 + 1
            noise = torch.randn(used, FEATURES, generator=row_generator(self.seed, epoch, row))
            points.append(self.x[row, :used] + 0.05 * noise)
            targets.append(self.y[row, :used])
            tails += [row % 3 == 2] * used
        return {"x": torch.cat(points), "y": torch.cat(targets), "tail": torch.tensor(tails)}

    def weights(self, batch):
        weights = {"mse": float(batch["y"].numel())}
        return weights | {"tail": float(batch["tail"].sum())} if batch["tail"].any() else weights

    def totals(self, batch):
        error = (self.network(batch["x"]) - batch["y"]).square()
        totals = {"mse": error.sum()}
        return totals | {"tail": error[batch["tail"]].sum()} if batch["tail"].any() else totals

    def validate(self):
        return {"error": float((self.network(self.x[:, 0]) - self.y[:, 0]).square().mean())}


class ShardedCurveFitStage(CurveFitStage):
    def shard_units(self):
        return [self.network.first, self.network.second]


class ThawingCurveFitStage(ShardedCurveFitStage):
    def epoch_started(self, epoch):
        self.network.first.requires_grad_(epoch > 0)


def train(
    folder: Path, *, sharded: bool = False, thaws: bool = False, optimiser=None, trainer=None, ranks=None, **stage
):
    """One run; `optimiser` and `trainer` are overrides."""
    kind = ThawingCurveFitStage if thaws else ShardedCurveFitStage if sharded else CurveFitStage
    fitting = kind(**stage)
    if sharded and ranks is not None and not ranks.is_first:
        fitting.network.to("meta")
    rates = {"learning_rate": 0.01, "steps": 23, "schedule": "cosine", "warmup_steps": 4, "weight_decay": 0.01}
    watching = {"log_every": 1, "validate_every": 10, "save_every": 4, "tensorboard": False}
    return Trainer(
        fitting,
        msgspec.convert(rates | (optimiser or {}), OptimiserConfig),
        msgspec.convert(watching | (trainer or {}), TrainerConfig),
        folder,
        {"data": "recorded"},
        seed=5,
        ranks=ranks,
        show_progress=False,
    ).run()


def main(folder: str, options: str) -> None:
    """Train and write `weights.safetensors` into the run's folder; an error of ours is one line on stderr."""
    torch.set_num_threads(1)
    try:
        with started_ranks("cpu") as ranks:
            result = train(Path(folder), ranks=ranks, **json.loads(options))
            if ranks.is_first:
                save_file(dict(result.weights), Path(folder, "weights.safetensors"))
    except (ValueError, RuntimeError) as error:
        if not type(error).__module__.startswith("worldvln_edge"):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
