"""One process: steps, schedules, groups, averages, losses that are not finite, and what is logged."""

import json
import math
from pathlib import Path

import msgspec
import pytest
import torch
from curve_fit_stage import ROWS, CurveFit, CurveFitStage, train
from torch import nn

from worldvln_edge.config import ConfigError
from worldvln_edge.training.trainer.distributed import Ranks
from worldvln_edge.training.trainer.loading import LoadingError
from worldvln_edge.training.trainer.optimiser import OptimiserConfig
from worldvln_edge.training.trainer.stage import ParameterGroup, epoch_order
from worldvln_edge.training.trainer.trainer import Trainer, TrainerConfig, TrainingDivergedError


def _rows(folder: Path, column: str = "loss") -> list[dict]:
    lines = (folder / "loss_curve.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if column in row]


def _run(stage, folder: Path, *, optimiser=None, **trainer):
    return Trainer(
        stage,
        msgspec.convert({"learning_rate": 0.01, "steps": 12} | (optimiser or {}), OptimiserConfig),
        msgspec.convert({"log_every": 1, "tensorboard": False} | trainer, TrainerConfig),
        folder,
        {},
        seed=5,
        show_progress=False,
    ).run()


def _by_hand(steps: int) -> CurveFit:
    """The run of `curve_fit_stage.train` without dropout, as a plain loop over whole steps."""
    stage = CurveFitStage(dropout=0.0)
    network = stage.network
    decaying = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": decaying, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.97))
    done = 0
    while done < steps:
        order = epoch_order(0, done // 5, ROWS)
        for first in range(0, ROWS, 6):
            batch = stage.load(done // 5, order[first : first + 6])
            error = (network(batch["x"]) - batch["y"]).square()
            loss = error.sum() / batch["y"].numel() + 0.5 * error[batch["tail"]].sum() / batch["tail"].sum()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            progress = (done - 4) / (23 - 4)
            share = (done + 1) / 4 if done < 4 else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimiser.param_groups:
                group["lr"] = 0.01 * share
            optimiser.step()
            done += 1
            if done == steps:
                break
    return network


def test_a_run_equals_a_plain_loop_over_whole_steps(tmp_path: Path):
    result = train(tmp_path, dropout=0.0, micro_rows=2)
    wanted = _by_hand(23).state_dict()
    assert result.steps == 23
    for name, weight in result.weights.items():
        torch.testing.assert_close(weight, wanted[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("micro_rows", [1, 4, 6])
def test_the_size_of_micro_batches_does_not_change_the_losses(tmp_path: Path, micro_rows: int):
    train(tmp_path / "two", dropout=0.0, micro_rows=2)
    train(tmp_path / "other", dropout=0.0, micro_rows=micro_rows)
    one, other = (_rows(tmp_path / name) for name in ("two", "other"))
    for column in ("loss", "mse", "tail", "grad_norm"):
        assert [row[column] for row in one] == pytest.approx([row[column] for row in other], abs=1e-6)


def test_the_same_seed_twice_gives_the_same_weights(tmp_path: Path):
    one, two = (train(tmp_path / name).weights for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_workers_load_the_same_rows(tmp_path: Path):
    alone = train(tmp_path / "alone").weights
    helped = train(tmp_path / "helped", trainer={"workers": 2}).weights
    assert all(torch.equal(alone[name], helped[name]) for name in alone)


def test_losses_go_down_and_every_row_of_the_curve_is_there(tmp_path: Path):
    train(tmp_path, optimiser={"steps": 200}, trainer={"log_every": 7, "validate_every": 50})
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows] == [*range(7, 200, 7), 200]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert {"stage", "epoch", "seconds", "lr", "skipped", "rows_per_s", "mse", "tail", "grad_norm"} <= rows[0].keys()
    assert [row["step"] for row in _rows(tmp_path, "held_out_error")] == [50, 100, 150, 200]
    assert (tmp_path / "loss_curve.png").stat().st_size > 1000


def test_a_run_of_epochs_shows_every_row_once_an_epoch(tmp_path: Path):
    seen = []

    class Recording(CurveFitStage):
        def load(self, epoch, rows):
            seen.extend((epoch, row) for row in rows)
            return super().load(epoch, rows)

    result = _run(Recording(), tmp_path, optimiser={"steps": None, "epochs": 2})
    assert result.steps == 10
    assert sorted(seen) == [(epoch, row) for epoch in range(2) for row in range(ROWS)]


def test_rates_warm_up_and_decay():
    config = OptimiserConfig(learning_rate=2.0, steps=100, warmup_steps=10, schedule="cosine")
    assert [config.rate(step, 100) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert config.rate(55, 100) == pytest.approx(2.0 * (0.05 + 0.95 / 2))
    assert config.rate(100, 100) == config.rate(500, 100) == pytest.approx(0.1)
    constant = OptimiserConfig(learning_rate=2.0, epochs=3, warmup_steps=2)
    assert [constant.rate(step, 30) for step in (0, 1, 2, 29)] == [1.0, 2.0, 2.0, 2.0]
    assert constant.total_steps(7) == 21


def test_clipping_follows_the_published_decay():
    config = OptimiserConfig(learning_rate=1.0, steps=100, clip_norm=5.0, clip_decay=True)
    assert config.clip(0, 100) == pytest.approx(5.0 * 1.2)
    assert config.clip(50, 100) == pytest.approx(5.0 * (0.3**10 + 0.2))
    assert OptimiserConfig(learning_rate=1.0, steps=1, clip_norm=5.0).clip(50, 100) == 5.0


class FreezingStage(CurveFitStage):
    """The first layer is frozen in epoch 0 and slow afterwards."""

    def parameter_groups(self):
        return [ParameterGroup(parameters=list(self.network.first.parameters()), rate=0.0)]

    def epoch_started(self, epoch):
        self.network.first.requires_grad_(epoch > 0)
        self.coefficients = {"mse": 1.0 if epoch == 0 else 0.0}


def test_groups_have_rates_of_their_own_and_frozen_parameters_no_state(tmp_path: Path):
    stage = FreezingStage()
    before = {name: tensor.clone() for name, tensor in stage.network.state_dict().items()}
    _run(stage, tmp_path, optimiser={"steps": 12})
    rows = _rows(tmp_path)
    assert all(row["loss"] > 0 for row in rows if row["epoch"] == 0)
    assert all(row["loss"] == 0 for row in rows if row["epoch"] > 0)
    after = stage.network.state_dict()
    assert torch.equal(after["first.weight"], before["first.weight"])
    assert not torch.equal(after["second.weight"], before["second.weight"])
    first = json.loads((tmp_path / "checkpoints" / "step-00000012" / "progress.json").read_bytes())["optimised"]
    assert first == ["first.weight", "first.bias", "second.weight", "second.bias"]
    short = FreezingStage()
    _run(short, tmp_path / "short", optimiser={"steps": 4})
    short_file = tmp_path / "short" / "checkpoints" / "step-00000004" / "progress.json"
    assert json.loads(short_file.read_bytes())["optimised"] == ["second.weight", "second.bias"]


def test_only_matrices_decay(tmp_path: Path):
    class Still(CurveFitStage):
        def totals(self, batch):
            return {name: total * 0 for name, total in super().totals(batch).items()}

    stage = Still()
    before = {name: tensor.clone() for name, tensor in stage.network.state_dict().items()}
    _run(stage, tmp_path, optimiser={"weight_decay": 0.5})
    after = stage.network.state_dict()
    assert (after["first.weight"].abs() < before["first.weight"].abs()).all()
    assert torch.equal(after["first.bias"], before["first.bias"])
    assert torch.equal(after["unused"], before["unused"])  # no gradient: nothing of it moves


class NaNStage(CurveFitStage):
    def __init__(self, bad_steps: range):
        super().__init__(dropout=0.0)
        self.bad_steps, self.count = bad_steps, 0
        self.weights_before: list[torch.Tensor] = []

    def totals(self, batch):
        step = self.count // 3
        self.count += 1
        self.weights_before.append(self.network.first.weight.detach().clone())
        totals = super().totals(batch)
        return {**totals, "mse": totals["mse"] * float("nan")} if step in self.bad_steps else totals


def test_steps_without_a_finite_loss_are_left_out_and_counted(tmp_path: Path):
    stage = NaNStage(range(2, 4))
    result = _run(stage, tmp_path, optimiser={"steps": 8, "ema_decay": 0.5})
    assert (result.steps, result.skipped_steps) == (8, 2)
    assert all(torch.isfinite(tensor).all() for tensor in result.weights.values())
    first_of_step = stage.weights_before[::3]
    assert torch.equal(first_of_step[2], first_of_step[4])
    assert not torch.equal(first_of_step[1], first_of_step[2])
    assert "NaN" not in (tmp_path / "loss_curve.jsonl").read_text()
    assert [row["skipped"] for row in _rows(tmp_path)] == [0, 0, 2, 2, 2, 2]


def test_losses_that_stay_nan_stop_the_run_and_name_the_rows(tmp_path: Path):
    message = (
        r"sft: 3 steps in a row without a finite loss, last step 8 \(epoch 1\): loss, mse, grad_norm not finite, first "
        r"in the micro-batch of rows \[\d+, \d+\]. Lower the learning rate"
    )
    with pytest.raises(TrainingDivergedError, match=message):
        _run(NaNStage(range(5, 99)), tmp_path, max_bad_steps=3)


def test_rows_of_a_nan_are_named_as_the_stage_names_them(tmp_path: Path):
    class Named(NaNStage):
        def row_name(self, row):
            return f"flights.jsonl:{row}"

    message = r"rows \[(\d+), (\d+), \d+, \d+, \d+\] \(flights.jsonl:\1; flights.jsonl:\2; [^;]+; [^;]+; ...\). Lower"
    stage = Named(range(99))
    stage.step_rows = stage.micro_rows = 5
    with pytest.raises(TrainingDivergedError, match=message):
        _run(stage, tmp_path, max_bad_steps=1)


@pytest.mark.gpu
def test_terms_may_lie_on_the_cpu_and_on_the_gpu(tmp_path: Path):
    """What a stage counts without a network is on the CPU."""

    class Mixed(CurveFitStage):
        def load(self, epoch, rows):
            return {name: tensor.cuda() for name, tensor in super().load(epoch, rows).items()}

        def weights(self, batch):
            return {**super().weights(batch), "rows": 1.0}

        def totals(self, batch):
            return {**super().totals(batch), "rows": torch.tensor(2.0)}

        def validate(self):
            return {}

    stage = Mixed()
    stage.network.cuda()
    config = OptimiserConfig(learning_rate=0.01, steps=3)
    trainer = TrainerConfig(log_every=1, tensorboard=False)
    ranks = Ranks(device=torch.device("cuda"))
    Trainer(stage, config, trainer, tmp_path, {}, seed=5, ranks=ranks, show_progress=False).run()
    assert [row["rows"] for row in _rows(tmp_path)] == [2.0, 2.0, 2.0]


def test_averaged_weights_follow_the_optimiser_steps(tmp_path: Path):
    class Recording(CurveFitStage):
        seen: list[torch.Tensor]

        def totals(self, batch):
            self.seen.append(self.network.second.bias.detach().clone())
            return super().totals(batch)

        def validate(self):
            return {"bias": float(self.network.second.bias[0])}

    stage = Recording(micro_rows=6)
    stage.seen = []
    result = _run(stage, tmp_path, optimiser={"steps": 4, "ema_decay": 0.75})
    average = stage.seen[0]
    for weights in [*stage.seen[1:], stage.network.second.bias.detach()]:
        average = 0.75 * average + 0.25 * weights
    torch.testing.assert_close(result.weights["second.bias"], average)
    assert result.metrics["bias"] == pytest.approx(float(average[0]))


def test_bf16_runs_networks_in_bf16_and_keeps_weights_in_fp32(tmp_path: Path):
    plain = train(tmp_path / "fp32").weights
    mixed = train(tmp_path / "bf16", trainer={"precision": "bf16"}).weights
    assert mixed["first.weight"].dtype == torch.float32
    difference = max(float((plain[name] - mixed[name]).abs().max()) for name in plain)
    assert 1e-6 < difference < 0.02


def test_the_best_step_is_kept_and_exported(tmp_path: Path):
    class GetsWorse(CurveFitStage):
        best_metric = "error"

        def validate(self):
            worse = getattr(self, "validations", 0)
            self.validations = worse + 1
            return {"error": [3.0, 1.0, 2.0, 4.0, float("nan")][worse]}

    stage = GetsWorse()
    result = _run(stage, tmp_path, validate_every=3, save_every=3, keep_last=1)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000012"]
    again = _run(GetsWorse(), tmp_path / "six", optimiser={"steps": 6}, validate_every=3)
    assert all(torch.equal(result.weights[name], again.weights[name]) for name in result.weights)


def test_the_last_step_is_exported_where_the_best_is_not_kept(tmp_path: Path):
    class HasBest(CurveFitStage):
        best_metric = "error"

        def validate(self):
            return {"error": float(len(list(tmp_path.glob("best/checkpoints/step-*"))))}

    last = _run(HasBest(), tmp_path / "last", keep_best=False, validate_every=3, save_every=3)
    best = _run(HasBest(), tmp_path / "best", validate_every=3, save_every=3)
    assert not torch.equal(last.weights["first.weight"], best.weights["first.weight"])
    plain = _run(CurveFitStage(), tmp_path / "plain")
    assert torch.equal(last.weights["first.weight"], plain.weights["first.weight"])
    # Also where an earlier start of the run kept one.
    again = _run(HasBest(), tmp_path / "best", keep_best=False, validate_every=3, save_every=3)
    assert torch.equal(again.weights["first.weight"], plain.weights["first.weight"])


class UnreadableRow(CurveFitStage):
    def load(self, epoch, rows):
        if 3 in rows:
            raise LoadingError("flights-0.npz: flight 3: the video is cut off")
        return super().load(epoch, rows)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_read_is_named_in_one_line(tmp_path: Path, workers: int):
    with pytest.raises(LoadingError, match=r"^flights-0.npz: flight 3: the video is cut off$"):
        _run(UnreadableRow(), tmp_path, workers=workers)


def test_an_epoch_without_rows_is_refused(tmp_path: Path):
    stage = CurveFitStage()
    stage.plan = lambda epoch: []
    with pytest.raises(LoadingError, match="sft: epoch 0 has no rows to train on"):
        _run(stage, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 1, "epochs": 1}, "give either steps or epochs"),
        ({}, "give either steps or epochs"),
        ({"steps": 0}, "optimiser.steps must be >= 1, found 0"),
        ({"steps": 1, "learning_rate": math.nan}, "optimiser.learning_rate must be finite and > 0"),
        ({"steps": 1, "ema_decay": 1.0}, r"optimiser.ema_decay must be in \[0, 1\), found 1.0"),
        ({"steps": 1, "final_share": 2.0}, r"optimiser.final_share must be in \[0, 1\]"),
        ({"steps": 1, "weight_decay": -1.0}, "optimiser.weight_decay must be >= 0"),
    ],
)
def test_impossible_optimisers_are_refused(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        OptimiserConfig(**({"learning_rate": 1.0} | values))


def test_impossible_trainers_are_refused():
    with pytest.raises(ConfigError, match=r"trainer\.keep_last must be >= 1, found 0"):
        TrainerConfig(keep_last=0)
