"""Raw VAE features of flights, computed once and read by the backbone.

Legend: B rows, C latent channels, T latent frames, h w latent grid.
Source: spec/training.md 1.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from worldvln_edge.models.video_vae import VideoVAE
from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.data.latent_cache import LatentCache
from worldvln_edge.training.sim.shards import FlightDataError
from worldvln_edge.training.stages.backbone_rows import CachedFlights
from worldvln_edge.training.stages.decoder_features import DECODER_PARTS, weights_digest
from worldvln_edge.training.stages.row_plan import rows_of_one_length
from worldvln_edge.training.stages.vae import frames_to_video
from worldvln_edge.training.trainer.distributed import Ranks

_TENSOR = "latents"


def cache_latents(
    vae: VideoVAE,
    flights: FlightSource,
    folder: Path,
    ranks: Ranks,
    *,
    temporal_stride: int,
    batch: int,
    show_progress: bool,
) -> CachedFlights:
    """Encode every flight that is not in the cache yet; ranks share the work.

    Args:
        vae: its encoder must not change any more; on the device that is to be used.
        flights: rows.
        folder: of the cache; other runs and other VAEs may share it.
        ranks: all of them call this.
        temporal_stride: frames of a latent frame.
        batch: flights of one length that are encoded together.
        show_progress: a bar on stderr.

    Raises:
        FlightDataError: a flight that cannot be read, or a cache that cannot be written.
    """
    cache = LatentCache(folder, weights_sha256=weights_digest(vae, without=DECODER_PARTS), what=_TENSOR)
    own = range(ranks.rank, len(flights), ranks.count)
    missing = [row for row in own if not cache.is_whole(flights.key(row), _TENSOR)]
    vae.eval()
    with tqdm(total=len(missing), desc="latents", unit="flight", disable=not (show_progress and missing)) as bar:
        for together in rows_of_one_length(flights, missing, batch):
            for row, latents in zip(together, encode_flights(vae, flights, together), strict=True):
                cache.write(flights.key(row), {_TENSOR: latents})
            bar.update(len(together))
    ranks.wait()

    def read(row: int) -> Tensor:
        tensors = cache.read(flights.key(row))
        if tensors is None or _TENSOR not in tensors:
            raise FlightDataError(
                f"{flights.name(row)}: its latents are no longer in {folder}; give the same command again"
            )
        return tensors[_TENSOR]

    return CachedFlights(flights, read, temporal_stride)


@torch.no_grad()
def encode_flights(vae: VideoVAE, flights: FlightSource, rows: Sequence[int]) -> Tensor:
    """Raw features of rows of one length, encoded together: float32 [B, C, T, h, w] on the CPU."""
    device = next(vae.parameters()).device
    frames = torch.stack([torch.from_numpy(flights.frames(row)) for row in rows]).to(device)
    return vae.raw_features(vae.encode(frames_to_video(frames))[0]).float().cpu()
