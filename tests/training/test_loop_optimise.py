"""The optimisation loop: schedule, log, and what happens to losses that are not finite."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from worldvln_edge.training.stages.loop import OptimiserConfig, TrainingDivergedError, optimise, step_generator

CONFIG = OptimiserConfig(learning_rate=0.1, steps=60, warmup_steps=10, log_every=25, weight_decay=0.0)


def _losses(parameter: nn.Parameter, bad_steps: tuple[int, ...] = ()):
    def losses_of_step(step: int):
        scale = float("nan") if step in bad_steps else 1.0
        return {"loss": (parameter - 3).square().sum() * scale, "distance": (parameter.detach() - 3).abs().sum()}

    return losses_of_step


def test_rate_warms_up_and_decays_to_its_final_share():
    config = OptimiserConfig(learning_rate=2.0, steps=100, warmup_steps=10, final_share=0.05)
    assert [config.rate(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert config.rate(10) == pytest.approx(2.0)
    assert config.rate(55) == pytest.approx(2.0 * (0.05 + 0.95 / 2))
    assert config.rate(100) == config.rate(500) == pytest.approx(0.1)


def test_loss_goes_down_and_its_averages_are_logged(tmp_path: Path):
    parameter = nn.Parameter(torch.zeros(2))
    optimise("fit", [parameter], CONFIG, _losses(parameter), tmp_path / "curve")
    rows = [json.loads(line) for line in (tmp_path / "curve").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [25, 50, 60]
    assert {"stage", "step", "seconds", "lr", "loss", "distance"} == rows[0].keys()
    assert rows[0]["stage"] == "fit"
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"]


def test_steps_without_a_finite_loss_are_left_out(tmp_path: Path):
    parameter = nn.Parameter(torch.zeros(2))
    bad = tuple(range(5, 12))
    losses, before = _losses(parameter, bad), []

    def losses_of_step(step: int):
        before.append(parameter.detach().clone())
        return losses(step)

    optimise("fit", [parameter], CONFIG, losses_of_step, tmp_path / "curve")
    assert len(before) == CONFIG.steps
    assert not torch.equal(before[5], before[4])
    assert all(torch.equal(before[step + 1], before[5]) for step in bad)
    assert not torch.equal(before[13], before[5])
    assert "NaN" not in (tmp_path / "curve").read_text(encoding="utf-8")


def test_losses_that_stay_nan_stop_the_run(tmp_path: Path):
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(TrainingDivergedError, match="fit: 20 steps in a row without a finite loss, last step 29"):
        optimise("fit", [parameter], CONFIG, _losses(parameter, tuple(range(10, 60))), tmp_path / "curve")
    assert torch.isfinite(parameter).all()


def test_frozen_parameters_do_not_move_and_only_matrices_decay(tmp_path: Path):
    matrix, vector, frozen = (nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,), (2, 2)))
    frozen.requires_grad_(False)
    config = OptimiserConfig(learning_rate=0.1, steps=5, warmup_steps=1, weight_decay=0.5)
    zero = matrix.sum() * 0  # no gradient: only decay moves anything
    optimise(
        "decay",
        [matrix, vector, frozen],
        config,
        lambda step: {"loss": (matrix.sum() + vector.sum()) * 0 + zero.detach()},
        tmp_path / "curve",
    )
    assert (matrix < 1).all()
    assert torch.equal(vector, torch.ones(2))
    assert torch.equal(frozen, torch.ones(2, 2))


def test_draws_depend_on_seed_and_step_only():
    def draw(seed: int, step: int) -> float:
        return float(torch.rand(1, generator=step_generator(seed, step)))

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(seed, step) for seed in range(4) for step in range(4)}) == 16
