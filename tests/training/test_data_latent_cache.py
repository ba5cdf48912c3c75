"""The latent cache: found by content, whole or absent, safe for several writers."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from flight_files import files_no_larger_than

from worldvln_edge.training.data.latent_cache import LatentCache
from worldvln_edge.training.sim.shards import FlightDataError


def cache(folder: Path, weights: str = "w", what: str = "latents") -> LatentCache:
    return LatentCache(folder, weights_sha256=weights, what=what)


def test_what_is_written_is_read(tmp_path: Path):
    tensors = {"latents": torch.randn(4, 3, 2, 2), "bits": torch.ones(5, dtype=torch.uint8)}
    cache(tmp_path).write("k", tensors)
    read = cache(tmp_path).read("k")
    assert read is not None
    assert {name: tensor.dtype for name, tensor in read.items()} == {"latents": torch.float32, "bits": torch.uint8}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_other_rows_weights_and_outputs_are_not_found(tmp_path: Path):
    cache(tmp_path).write("k", {"x": torch.zeros(1)})
    assert cache(tmp_path).holds("k")
    assert cache(tmp_path).read("k") is not None
    for other, key in ((cache(tmp_path), "l"), (cache(tmp_path, "v"), "k"), (cache(tmp_path, what="features"), "k")):
        assert not other.holds(key)
        assert other.read(key) is None


@pytest.mark.parametrize("damage", [b"", b"not tensors", None])
def test_broken_file_counts_as_absent_and_is_replaced(tmp_path: Path, damage: bytes | None):
    kept = cache(tmp_path)
    kept.write("k", {"x": torch.arange(100)})
    path = kept.path("k")
    path.write_bytes(path.read_bytes()[:-7] if damage is None else damage)
    assert kept.read("k") is None
    kept.write("k", {"x": torch.arange(3)})
    read = kept.read("k")
    assert read is not None
    assert read["x"].tolist() == [0, 1, 2]


def test_many_writers_and_readers_of_one_row_meet_whole_files_only(tmp_path: Path):
    kept = cache(tmp_path)

    def write_and_read(value: int) -> set[int]:
        kept.write("k", {"x": torch.full((2000,), value)})
        read = kept.read("k")
        assert read is not None
        return set(read["x"].tolist())

    with ThreadPoolExecutor(8) as pool:
        assert all(len(values) == 1 for values in pool.map(write_and_read, range(60)))
    assert kept.size().files == 1
    assert [path.name for path in kept.path("k").parent.iterdir()] == [kept.path("k").name]


def test_full_disk_is_said_and_keeps_the_older_file(tmp_path: Path):
    kept = cache(tmp_path)
    kept.write("k", {"x": torch.zeros(3)})
    with (
        files_no_larger_than(1000),
        pytest.raises(FlightDataError, match=r"safetensors: cannot be written .*make room"),
    ):
        kept.write("k", {"x": torch.zeros(3000)})
    assert kept.read("k")["x"].shape == (3,)
    assert kept.size().files == 1


def test_size_is_that_of_all_files(tmp_path: Path):
    assert str(cache(tmp_path).size()) == "0 files, 0.00 GB"
    for name, weights in (("a", "w"), ("b", "v")):
        cache(tmp_path, weights).write(name, {"x": torch.zeros(10)})
    size = cache(tmp_path).size()
    assert size.files == 2
    assert size.total_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("damage", [b"", b"not tensors", None])
def test_a_whole_file_is_told_by_its_header(tmp_path: Path, damage: bytes | None):
    kept = cache(tmp_path)
    assert not kept.is_whole("k", "x")
    kept.write("k", {"x": torch.arange(100)})
    assert kept.is_whole("k", "x")
    assert not kept.is_whole("k", "y")
    path = kept.path("k")
    path.write_bytes(path.read_bytes()[:-7] if damage is None else damage)
    assert kept.holds("k")
    assert not kept.is_whole("k", "x")
