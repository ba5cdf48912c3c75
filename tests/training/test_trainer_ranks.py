"""Several processes give what one gives: `torchrun` is really launched, with two processes and gloo."""

import json
import subprocess
from pathlib import Path

import curve_fit_stage
import pytest
import torch
from curve_fit_stage import ShardedCurveFitStage, train
from safetensors.torch import load_file
from torchrun_processes import torchrun

from worldvln_edge.training.trainer import distributed
from worldvln_edge.training.trainer.distributed import (
    DeviceError,
    Ranks,
    RanksError,
    check_share,
    find_device,
    share_out,
    started_ranks,
)
from worldvln_edge.training.trainer.stage import row_generator

# 26 rows in steps of 6 and micro-batches of 2: three micro-batches for two ranks, so one of them idles every time.
OPTIONS = {"optimiser": {"steps": 12, "ema_decay": 0.8}, "trainer": {"save_every": 5}}


def _torchrun(folder: Path, options: dict, processes: int = 2) -> subprocess.CompletedProcess:
    return torchrun(curve_fit_stage.__file__, folder, json.dumps(options), processes=processes)


def _losses(folder: Path) -> list[float]:
    lines = (folder / "loss_curve.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[list[float], dict]:
    folder = tmp_path_factory.mktemp("alone")
    weights = dict(train(folder, **OPTIONS).weights)
    return _losses(folder), weights


def _assert_as_alone(folder: Path, alone: tuple[list[float], dict]) -> None:
    assert _losses(folder) == pytest.approx(alone[0], abs=1e-5)
    weights = load_file(folder / "weights.safetensors")
    assert weights.keys() == alone[1].keys()
    for name, wanted in alone[1].items():
        torch.testing.assert_close(weights[name], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sharded", [False, True], ids=["copied", "sharded"])
def test_two_processes_give_the_losses_and_weights_of_one(tmp_path: Path, alone, sharded: bool):
    """Only the first process of a sharded network has weights to begin with; the others have shapes."""
    finished = _torchrun(tmp_path, OPTIONS | {"sharded": sharded})
    assert finished.returncode == 0, finished.stderr
    _assert_as_alone(tmp_path, alone)


@pytest.mark.parametrize("first", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, alone, first: int):
    """Six steps with `first` processes, as if killed, then the rest with the other number; networks are sharded."""
    options = OPTIONS | {"sharded": True, "trainer": {"save_every": 6, "keep_last": 3}}
    for processes in (first, 3 - first):
        if processes == 1:
            result = train(tmp_path, **options)
            curve_fit_stage.save_file(dict(result.weights), tmp_path / "weights.safetensors")
        else:
            finished = _torchrun(tmp_path, options)
            assert finished.returncode == 0, finished.stderr
        if processes == first:
            for file in (tmp_path / "checkpoints" / "step-00000012").iterdir():
                file.unlink()
            (tmp_path / "checkpoints" / "step-00000012").rmdir()
            (tmp_path / "weights.safetensors").unlink()
    _assert_as_alone(tmp_path, alone)


def test_too_many_processes_are_refused_on_every_rank(tmp_path: Path):
    finished = _torchrun(tmp_path, OPTIONS | {"micro_rows": 6})
    assert finished.returncode != 0
    assert "error: 2 processes share steps of at most 1 micro-batches; start at most 1 processes" in finished.stderr
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.slow
def test_a_sharded_network_that_would_thaw_is_refused(tmp_path: Path):
    finished = _torchrun(tmp_path, OPTIONS | {"thaws": True})
    assert finished.returncode != 0
    assert "error: sft: epoch 1 freezes or thaws parameters, which a network that is sharded over" in finished.stderr


def test_more_processes_than_gpus_are_refused(monkeypatch):
    """As torchrun starts the third of three processes on a machine with two GPUs."""
    monkeypatch.setattr(distributed, "find_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(RanksError, match="torchrun started 3 processes on this machine, which has 2 GPUs; give --nproc"),
        started_ranks("cuda"),
    ):
        pass


def test_micro_batches_are_shared_out_and_nobody_waits_in_vain():
    for count in range(1, 9):
        for ranks in range(1, 5):
            shares = [share_out(count, Ranks(rank=rank, count=ranks)) for rank in range(ranks)]
            assert len({len(share) for share in shares}) == 1
            assert sorted(index for share in shares for index, counts in share if counts) == list(range(count))


def test_idle_processes_are_refused():
    check_share(4, Ranks(count=4))
    with pytest.raises(RanksError, match="5 processes share steps of at most 4 micro-batches; start at most 4"):
        check_share(4, Ranks(count=5))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(DeviceError, match=r"no device 'cuda' for training here \(.+\); give --device cpu"):
        find_device("cuda")


def test_draws_of_a_row_depend_on_seed_epoch_and_row_only():
    def draw(*place: int) -> float:
        return float(torch.rand((), generator=row_generator(*place)))

    places = [(seed, epoch, row) for seed in range(3) for epoch in range(3) for row in range(3)]
    assert len({draw(*place) for place in places}) == len(places)
    assert draw(1, 2, 3) == draw(1, 2, 3)


def test_one_process_shards_nothing(tmp_path: Path):
    stage = ShardedCurveFitStage()
    assert stage.shard_units()
    result = train(tmp_path, sharded=True, optimiser={"steps": 2})
    assert all(type(weight) is torch.Tensor for weight in result.weights.values())
