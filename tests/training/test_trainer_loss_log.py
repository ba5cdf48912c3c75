"""Where losses are written: JSON lines, TensorBoard, Weights & Biases, pictures."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from curve_fit_stage import train

from worldvln_edge.config import ConfigError
from worldvln_edge.training.trainer.curve_plot import plot_curve
from worldvln_edge.training.trainer.loss_log import LogWriteError, LossLog, read_curve
from worldvln_edge.training.trainer.step_meter import StepMeter


def test_tensorboard_gets_every_row(tmp_path: Path):
    from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401 - the package that wrote them
    from tensorboardX.proto.event_pb2 import Event

    train(tmp_path, optimiser={"steps": 6}, trainer={"tensorboard": True})
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, scalars, at = file.read_bytes(), {}, 0
    while at < len(content):  # a record: length, its checksum, the event, its checksum
        length = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + length])
        for value in event.summary.value:
            scalars.setdefault(value.tag, {})[event.step] = value.simple_value
        at += 16 + length
    rows = [row for row in read_curve(tmp_path / "loss_curve.jsonl") if "loss" in row]
    assert scalars["sft/loss"] == pytest.approx({row["step"]: row["loss"] for row in rows})
    assert scalars["run/lr"] == pytest.approx({row["step"]: row["lr"] for row in rows})
    assert list(scalars["sft/held_out_error"]) == [6]


def test_a_full_disk_is_told_with_what_to_do(tmp_path: Path):
    """`/dev/full` is a file on a full disk."""
    curve = tmp_path / "loss_curve.jsonl"
    log = LossLog(curve, None, None, stage="sft", run_id="", first_step=0)
    curve.symlink_to("/dev/full")
    message = r"loss_curve\.jsonl cannot be written \(No space left on device\); make room and give the same command"
    with pytest.raises(LogWriteError, match=message):
        log.write(1, {"loss": 1.0}, {})


def test_a_picture_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "loss_curve.jsonl").write_text('{"stage": "sft", "step": 1, "loss": 1.0}\n')
    (tmp_path / "loss_curve.png").mkdir()
    with pytest.raises(LogWriteError, match=r"loss_curve\.png cannot be written \(Is a directory\)"):
        plot_curve(tmp_path / "loss_curve.jsonl", tmp_path / "loss_curve.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss_curve.jsonl", "loss_curve.png"]


def test_wandb_is_imported_on_use_and_missed_with_the_command_that_brings_it(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb_project is set, and wandb is not installed; run: pip install"):
        train(tmp_path, optimiser={"steps": 1}, trainer={"wandb_project": "flights"})


def test_wandb_gets_every_row(tmp_path: Path, monkeypatch):
    """The service itself is the edge of the machine: its client is replaced."""
    sent: list[tuple[int, dict]] = []
    run = SimpleNamespace(log=lambda row, step: sent.append((step, row)), finish=lambda: sent.append((0, {})))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: run))
    train(tmp_path, optimiser={"steps": 3}, trainer={"wandb_project": "flights"})
    rows = read_curve(tmp_path / "loss_curve.jsonl")
    assert [step for step, _ in sent] == [row["step"] for row in rows] + [0]
    assert sent[0][1]["sft/loss"] == pytest.approx(rows[0]["loss"])


def test_numbers_that_are_not_finite_are_null(tmp_path: Path):
    log = LossLog(tmp_path / "curve", None, None, stage="sft", run_id="1", first_step=0)
    log.write(1, {"nmse": float("nan"), "mse": 1.0}, {})
    log.close()
    assert json.loads((tmp_path / "curve").read_text()) == {"stage": "sft", "step": 1, "nmse": None, "mse": 1.0}
    plot_curve(tmp_path / "curve", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 0


def test_an_empty_curve_gives_no_picture(tmp_path: Path):
    plot_curve(tmp_path / "none", tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_rates_are_those_since_the_last_call():
    meter = StepMeter("sft", done=0, total=10, peak_flops=1e12, show=False)
    meter.add(rows=4, tokens=100, flops=10**9)
    first = meter.rates()
    assert first["tokens_per_s"] == pytest.approx(25 * first["rows_per_s"], rel=1e-3)
    assert first["mfu"] == pytest.approx(first["rows_per_s"] * 2.5e8 / 1e12, rel=1e-3)
    assert meter.rates() == {"rows_per_s": 0.0}
    meter.add(rows=1, tokens=0, flops=0)
    assert meter.rates().keys() == {"rows_per_s"}
    meter.close()
