"""Latents of flights: encoded once, whatever their lengths, and found again without reading them."""

from pathlib import Path

import pytest
import torch
from memory_flights import MemoryFlights
from small_models import random_model, tiny_config

from worldvln_edge.training.sim.shards import FlightDataError
from worldvln_edge.training.stages import flight_latents
from worldvln_edge.training.stages.flight_latents import cache_latents
from worldvln_edge.training.stages.vae import frames_to_video
from worldvln_edge.training.trainer.distributed import Ranks

CONFIG = tiny_config(clips_per_segment=2)
VAE = random_model(CONFIG).vae
COUNTS = (13, 5, 13, 9, 13, 1)


def cached(folder: Path, flights: MemoryFlights, batch: int = 2):
    stride = CONFIG.video_vae.temporal_stride
    return cache_latents(VAE, flights, folder, Ranks(), temporal_stride=stride, batch=batch, show_progress=False)


@pytest.fixture
def encoded(monkeypatch) -> list[list[int]]:
    """Rows that went through the encoder together."""
    groups: list[list[int]] = []
    encode = flight_latents.encode_flights

    def noted(vae, flights, rows):
        groups.append(list(rows))
        return encode(vae, flights, rows)

    monkeypatch.setattr(flight_latents, "encode_flights", noted)
    return groups


def test_every_flight_is_encoded_once_with_flights_of_its_length(tmp_path: Path, encoded):
    flights = MemoryFlights(CONFIG, COUNTS)
    latents = cached(tmp_path, flights)
    assert sorted(row for group in encoded for row in group) == list(range(len(COUNTS)))
    assert all(len({COUNTS[row] for row in group}) == 1 and len(group) <= 2 for group in encoded)
    assert [0, 2] in encoded
    for row in range(len(COUNTS)):
        with torch.no_grad():
            video = frames_to_video(torch.from_numpy(flights.frames(row))[None])
            expected = VAE.raw_features(VAE.encode(video)[0])[0]
        torch.testing.assert_close(latents.latents(row), expected, atol=1e-4, rtol=1e-4)
        assert latents.latent_frames(row) == expected.shape[1]
    del encoded[:]
    cached(tmp_path, flights)
    assert encoded == []


def test_a_cache_is_found_again_without_reading_it(tmp_path: Path, encoded, monkeypatch):
    """Latents of a large data set are hundreds of gigabytes, and every start of a run looks for them."""
    flights = MemoryFlights(CONFIG, COUNTS)
    cached(tmp_path, flights)
    del encoded[:]
    monkeypatch.setattr("worldvln_edge.training.data.latent_cache.load_file", lambda path: pytest.fail(f"read {path}"))
    cached(tmp_path, flights)
    assert encoded == []


def test_a_damaged_file_is_replaced_and_a_lost_one_is_named(tmp_path: Path, encoded):
    flights = MemoryFlights(CONFIG, (5,))
    cached(tmp_path, flights)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    latents = cached(tmp_path, flights)
    assert encoded == [[0], [0]]
    assert latents.latents(0).shape[0] == CONFIG.world_model.latent_channels
    file.unlink()
    with pytest.raises(FlightDataError, match=r"memory row 0: its latents are no longer in .*give the same command"):
        latents.latents(0)
