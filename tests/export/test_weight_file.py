"""The weight file: equal tensors once, an interrupted run goes on, a full disk is said before anything is written."""

import errno
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from worldvln_edge.export import weight_file
from worldvln_edge.export.planned_tensor import CastOverflowError, CastReports, PlannedTensor, checkpoint_tensor
from worldvln_edge.export.progress import Note
from worldvln_edge.export.tracing import ExportError
from worldvln_edge.export.weight_file import WEIGHTS_FILE, WeightFile

TENSORS = {f"t{i}": torch.randn(7 + i, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)}
TENSORS["tiny"] = torch.tensor([1e-9, 2.0, 60000.0])
RUN = {"checkpoint": "a", "exporter": "b"}


class Stopped(Exception):
    pass


class Reader:
    """Counts what is read; stops like a killed process after `limit` tensors."""

    def __init__(self, limit: int = 100):
        self.keys: list[str] = []
        self.limit = limit

    def __call__(self, key: str) -> torch.Tensor:
        if len(self.keys) == self.limit:
            raise Stopped
        self.keys.append(key)
        return TENSORS[key]


def _planned(reports: CastReports, dtype: torch.dtype = torch.float32) -> list[PlannedTensor]:
    return [checkpoint_tensor(key, tuple(tensor.shape), dtype, reports) for key, tensor in TENSORS.items()]


def _write(
    folder: Path,
    read: Reader,
    *,
    run: dict[str, str] = RUN,
    dtype: torch.dtype = torch.float32,
    note: Note | None = None,
) -> CastReports:
    folder.mkdir(exist_ok=True)
    reports = CastReports()
    WeightFile(_planned(reports, dtype)).write(folder, read, reports, run=run, note=note)
    return reports


def test_tensors_lie_at_their_places(tmp_path: Path):
    planned = _planned(CastReports())
    file = WeightFile([*planned, *planned])
    _write(tmp_path / "a", Reader())
    data = (tmp_path / "a" / WEIGHTS_FILE).read_bytes()
    assert len(data) == file.size_bytes
    for tensor in planned:
        start = file.places[tensor.identity]
        assert start % 64 == 0
        found = np.frombuffer(data[start : start + tensor.size_bytes], np.float32).reshape(tensor.shape)
        np.testing.assert_array_equal(found, TENSORS[str(tensor.key)].numpy())


def test_large_tensors_begin_on_a_page():
    reports = CastReports()
    sizes = {"small": (3,), "large": (64, 1024), "larger": (65, 1024)}
    planned = [checkpoint_tensor(key, shape, torch.float32, reports) for key, shape in sizes.items()]
    file = WeightFile(planned)
    assert [file.places[tensor.identity] % 4096 for tensor in planned] == [0, 0, 0]
    assert file.places[planned[1].identity] == 4096


def test_transposed_and_plain_are_two_tensors():
    reports = CastReports()
    plain = checkpoint_tensor("t0", (7, 5), torch.float16, reports)
    turned = checkpoint_tensor("t0", (7, 5), torch.float16, reports, transposed=True)
    assert plain.identity != turned.identity
    np.testing.assert_array_equal(plain.make(Reader()), turned.make(Reader()).T)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weight_file, "_SYNC_BYTES", 1)  # every tensor is a safe point
    _write(tmp_path / "whole", Reader())
    with pytest.raises(Stopped):
        _write(tmp_path / "cut", Reader(limit))
    again = Reader()
    _write(tmp_path / "cut", again)
    assert again.keys == list(TENSORS)[limit:]
    assert (tmp_path / "cut" / WEIGHTS_FILE).read_bytes() == (tmp_path / "whole" / WEIGHTS_FILE).read_bytes()
    third = Reader()
    _write(tmp_path / "cut", third)  # all tensors are there: nothing is read again
    assert third.keys == []


def test_half_a_tensor_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weight_file, "_SYNC_BYTES", 1)
    _write(tmp_path / "whole", Reader())
    with pytest.raises(Stopped):
        _write(tmp_path / "cut", Reader(2))
    with (tmp_path / "cut" / WEIGHTS_FILE).open("ab") as stream:
        stream.write(b"half of the next tensor, whose line was never written")
    _write(tmp_path / "cut", Reader())
    assert (tmp_path / "cut" / WEIGHTS_FILE).read_bytes() == (tmp_path / "whole" / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("changed", ["checkpoint", "exporter"])
def test_leftovers_of_another_run_are_not_taken_up_and_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
):
    monkeypatch.setattr(weight_file, "_SYNC_BYTES", 1)
    with pytest.raises(Stopped):
        _write(tmp_path / "cut", Reader(3), run=RUN | {changed: "another"})
    again, notes = Reader(), []
    _write(tmp_path / "cut", again, note=notes.append)
    assert again.keys == list(TENSORS)
    assert notes == [f"an unfinished export in {tmp_path / 'cut'} was made from another {changed}: it starts over"]
    _write(tmp_path / "cut", Reader(), note=notes.append)  # whole, and of this run
    assert len(notes) == 1


def test_losses_of_a_narrow_dtype_are_counted_and_survive_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weight_file, "_SYNC_BYTES", 1)
    reports = _write(tmp_path / "a", Reader(), dtype=torch.float16)
    (loss,) = reports.losses.values()
    assert (loss.key, loss.flushed, loss.largest) == ("tiny", 1, 60000.0)
    (tmp_path / "b").mkdir()
    first, second = CastReports(), CastReports()
    file = WeightFile(reversed(_planned(first, torch.float16)))
    with pytest.raises(Stopped):
        file.write(tmp_path / "b", Reader(2), first, run=RUN)
    again = WeightFile(reversed(_planned(second, torch.float16)))
    again.write(tmp_path / "b", Reader(), second, run=RUN)
    assert second.losses == reports.losses


def test_the_first_tensor_that_does_not_fit_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(TENSORS, "t1", torch.full((8, 5), -1e6))
    read = Reader()
    with pytest.raises(CastOverflowError, match=r"t1 does not fit float16: 40 values .* \(up to 1e\+06\)") as caught:
        _write(tmp_path / "a", read, dtype=torch.float16)
    assert (caught.value.key, caught.value.overflowed, caught.value.largest) == ("t1", 40, 1e6)
    assert read.keys == ["t0", "t1"]


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(weight_file.shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(ExportError, match=r"0\.0 GB free, the bundle needs"):
        _write(tmp_path / "a", Reader())
    assert not (tmp_path / "a" / WEIGHTS_FILE).exists()


def test_a_disk_that_fills_up_is_said_and_the_next_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weight_file.os, "fdatasync", full)
    with pytest.raises(ExportError, match=r"No space left on device\); make room and run the same export again"):
        _write(tmp_path / "cut", Reader())
    monkeypatch.undo()
    _write(tmp_path / "cut", Reader())
    _write(tmp_path / "whole", Reader())
    assert (tmp_path / "cut" / WEIGHTS_FILE).read_bytes() == (tmp_path / "whole" / WEIGHTS_FILE).read_bytes()
