"""What the VAE decoder makes of flights: from their true latents, and from latents that the world model predicts.

The decoder's features are what adapter and action head learn from, and decoding dominates their training. They are a
function of the flight and of frozen networks, so a small preset keeps them on disk; a large one, whose features would
fill it, keeps the summed codes (a hundredth of the size) and decodes again. A kept flight is found by its content
(frames, weights, instruction, seed), is written whole or not at all, and does not depend on the rows beside it.

Legend: B rows, F frames, T latent frames, C latent channels, Cf feature channels, h w rows and columns.
Source: spec/training.md 1.4 (keys, atomic), 4.4, 8.3, 8.6; spec/action_decoder.md 10.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import torch
from torch import Tensor, nn
from tqdm import tqdm

from worldvln_edge.config import ConfigError, ModelConfig
from worldvln_edge.models.quantizer import encode_bits
from worldvln_edge.models.video_vae import VideoVAE
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.data.latent_cache import LatentCache
from worldvln_edge.training.sim.shards import FlightDataError
from worldvln_edge.training.stages.recorded_latents import recorded_latents
from worldvln_edge.training.stages.row_plan import rows_of_one_length
from worldvln_edge.training.stages.vae import frames_to_video

_VERSION = 1  # of what a key stands for; a change of the decode makes it another

DECODER_PARTS = ("decoder.", "proj_up.")
"""Parameters of the VAE that only its decoder uses."""

Kept = Literal["features", "codes"]


class FlightPredictor(Protocol):
    """Says what the world model expects behind the observed clips of a flight."""

    def digest(self, instruction: str) -> str:
        """Of everything the prediction of a flight depends on besides its latents and the seed."""

    def predict(
        self,
        latents_BCTHW: Tensor,
        schedule: ScaleSchedule,
        instructions: Sequence[str],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Summed codes [B, C, T-1, H, W] of every clip but the first, each predicted from the real ones before it."""


@dataclass(frozen=True, kw_only=True)
class DecodedFlight:
    """Kept tensors of one flight, on the CPU: features float16 [Cf, F, h, w], or codes float32 [C, T, h, w]."""

    true: Tensor
    predicted: Tensor | None
    """Of frames 1..F-1 (of latent frames 1..T-1); None without a predictor, and for a single frame."""


@torch.no_grad()
def observed_codes(latents_NCTHW: Tensor, schedule: ScaleSchedule, config: ModelConfig) -> Tensor:
    """Summed codes of true latents, clip by clip: as the input."""
    clips = [encode_bits(latents_NCTHW[:, :, clip.frame_slice], clip, config.world_model)[1] for clip in schedule.clips]
    return torch.cat(clips, 2)


def decode_flight(
    vae: VideoVAE, schedule: ScaleSchedule, codes_BCTHW: Tensor, predicted_BCTHW: Tensor
) -> tuple[Tensor, Tensor]:
    """Decoder features of flights, of true and of predicted codes, as serving decodes them.

    Args:
        vae: the decoder.
        schedule: of T latent frames.
        codes_BCTHW: summed codes of what was observed.
        predicted_BCTHW: summed codes of latent frames 1..T-1, each clip predicted from the true ones before it.

    Returns:
        [B, Cf, F, h, w] of the true codes, and [B, Cf, F-1, h, w] of every clip but the first decoded from its
        predicted codes behind the true clips before it.
    """
    state, true, predicted = None, [], []
    for clip in schedule.clips:
        if clip.index > 0:
            later = slice(clip.frame_slice.start - 1, clip.frame_slice.stop - 1)
            predicted.append(vae.decode_features(predicted_BCTHW[:, :, later], state)[0])
        committed, state = vae.decode_features(codes_BCTHW[:, :, clip.frame_slice], state)
        true.append(committed)
    return torch.cat(true, 2), torch.cat(predicted, 2)


class DecoderFeatures:
    """Features (or codes) of all flights of a source, in a folder.

    Args:
        folder: made if missing; may be shared between runs, sources and processes.
        flights: rows; their `key` and `instruction` say which flight is meant. Latents that were recorded with a
            flight are decoded in the place of its own.
        vae: its encoder side (and, where features are kept, its decoder) must not change any more.
        config: of the same model.
        keep: what is kept, see above.
        predictor: None keeps true latents only.
        seed: of the predictions.
    """

    def __init__(
        self,
        folder: Path,
        flights: FlightSource,
        vae: VideoVAE,
        config: ModelConfig,
        *,
        keep: Kept = "features",
        predictor: FlightPredictor | None = None,
        seed: int = 0,
    ):
        if keep not in ("features", "codes"):
            raise ConfigError(f"keep must be 'features' or 'codes', found {keep!r}")
        self.folder, self.flights, self.keep = Path(folder), flights, keep
        self.has_predictions = predictor is not None
        self._vae, self._config, self._predictor, self._seed = vae, config, predictor, seed
        inputs = _digest(
            [
                _VERSION,
                seed if predictor else None,
                weights_digest(vae, without=() if keep == "features" else DECODER_PARTS),
                msgspec.json.encode([config.video_vae, config.schedule, config.world_model]).decode(),
            ]
        )
        self._cache = LatentCache(self.folder, weights_sha256=inputs, what=f"decoder {keep}")
        self._keys: dict[int, str] = {}

    def prepare(self, rows: Sequence[int] | None = None, *, batch: int = 8, show_progress: bool = True) -> int:
        """Compute what is not there yet; damaged files are replaced.

        Args:
            rows: None takes all. Processes that share a folder may each take a part.
            batch: flights that go through the networks together.
            show_progress: a bar on stderr, if there is something to do.

        Returns:
            Number of flights computed.

        Raises:
            FlightDataError: a flight that cannot be read or gives no finite numbers, or a folder that cannot be
                written; what was finished stays.
        """
        wanted = range(len(self.flights)) if rows is None else rows
        missing = [row for row in wanted if not self._cache.is_whole(self._key(row), "true")]
        was_training = self._vae.training
        self._vae.eval()
        is_quiet = not (show_progress and missing)
        with tqdm(total=len(missing), desc=f"decoder {self.keep}", unit="flight", disable=is_quiet) as bar:
            for group in self._groups(missing, batch):
                for row, flight in zip(group, self._compute(group), strict=True):
                    tensors = {"true": flight.true, "predicted": flight.predicted}
                    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
                    if not all(bool(torch.isfinite(tensor).all()) for tensor in kept.values()):
                        raise FlightDataError(
                            f"{self.flights.name(row)}: its decoder {self.keep} hold NaN, infinity or a number beyond "
                            "float16; train the VAE again, or look at the frames (or recorded latents) of the flight"
                        )
                    self._cache.write(self._key(row), kept)
                bar.update(len(group))
        self._vae.train(was_training)
        return len(missing)

    def load(self, row: int) -> DecodedFlight:
        """Tensors of one flight.

        Raises:
            FlightDataError: not prepared, or a damaged file.
        """
        key = self._key(row)
        tensors = self._cache.read(key)
        if tensors is not None and "true" in tensors:
            return DecodedFlight(true=tensors["true"], predicted=tensors.get("predicted"))
        if self._cache.holds(key):
            raise FlightDataError(
                f"{self._cache.path(key)}: decoder {self.keep} of {self.flights.name(row)} are damaged; delete the "
                "file and give the same command again"
            )
        raise FlightDataError(
            f"{self.flights.name(row)}: no decoder {self.keep} in {self.folder}, or the flight has changed since they "
            "were computed; give the same command again"
        )

    def decode(self, flight: DecodedFlight) -> DecodedFlight:
        """Features float32 on the VAE's device, [Cf, F, h, w], of what `load` gave, codes or features.

        The gradient reaches those parameters of the decoder that require one.
        """
        device = next(self._vae.parameters()).device
        true = flight.true.to(device)
        predicted = None if flight.predicted is None else flight.predicted.to(device)
        if self.keep == "features":
            return DecodedFlight(true=true.float(), predicted=None if predicted is None else predicted.float())
        if predicted is None:
            return DecodedFlight(true=self._vae.decode_features(true[None])[0][0].float(), predicted=None)
        schedule = ScaleSchedule(self._config.schedule, true.shape[1])
        features, peeked = decode_flight(self._vae, schedule, true[None], predicted[None])
        return DecodedFlight(true=features[0].float(), predicted=peeked[0].float())

    def _key(self, row: int) -> str:
        if row not in self._keys:
            prediction = self._predictor.digest(self.flights.instruction(row)) if self._predictor else ""
            latents = recorded_latents(self.flights, row)
            recorded = "" if latents is None else _tensor_digest(latents)
            self._keys[row] = f"{self.flights.key(row)} {recorded} {prediction}"
        return self._keys[row]

    def _latents(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """What the world model quantises and what the decoder reads, [B, C, T, h, w] each, on the VAE's device."""
        device, channels = next(self._vae.parameters()).device, self._config.video_vae.raw_channels
        recorded = recorded_latents(self.flights, rows[0])
        if recorded is not None:
            if recorded.ndim != 5 or recorded.shape[:2] != (1, channels):
                raise FlightDataError(
                    f"{self.flights.name(rows[0])}: latents must be [1, {channels}, T, h, w], found "
                    f"{list(recorded.shape)}; they belong to another VAE"
                )
            return recorded.to(device), recorded.to(device)
        frames = torch.stack([torch.from_numpy(self.flights.frames(row)) for row in rows]).to(device)
        latents = self._vae.raw_features(self._vae.encode(frames_to_video(frames))[0])
        return latents, observed_codes(latents, ScaleSchedule(self._config.schedule, latents.shape[2]), self._config)

    def _groups(self, rows: Sequence[int], batch: int) -> Iterator[list[int]]:
        """Rows of equal length, at most `batch` together; recorded latents, which may differ in size, one by one."""
        alone = {row for row in rows if recorded_latents(self.flights, row) is not None}
        yield from ([row] for row in rows if row in alone)
        yield from rows_of_one_length(self.flights, [row for row in rows if row not in alone], batch)

    @torch.no_grad()
    def _compute(self, rows: list[int]) -> list[DecodedFlight]:
        latents, codes = self._latents(rows)
        schedule = ScaleSchedule(self._config.schedule, latents.shape[2])
        if self._predictor is None or len(schedule.clips) == 1:
            true = codes if self.keep == "codes" else self._vae.decode_features(codes)[0].half()
            return [DecodedFlight(true=one, predicted=None) for one in true.cpu()]
        instructions = [self.flights.instruction(row) for row in rows]
        generators = [
            torch.Generator().manual_seed(int(_digest([self._seed, self.flights.key(row)])[:15], 16)) for row in rows
        ]
        predicted = self._predictor.predict(latents, schedule, instructions, generators)
        if self.keep == "features":
            codes, predicted = (part.half() for part in decode_flight(self._vae, schedule, codes, predicted))
        return [
            DecodedFlight(true=one, predicted=other) for one, other in zip(codes.cpu(), predicted.cpu(), strict=True)
        ]


def _tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and values."""
    values = tensor.detach().cpu().contiguous()
    total = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode())
    total.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def weights_digest(*networks: nn.Module, without: tuple[str, ...] = ()) -> str:
    """SHA-256 of names and values of all weights, but for those whose name begins with one of `without`."""
    total = hashlib.sha256()
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            if name.startswith(without):
                continue
            total.update(f"{name} {_tensor_digest(tensor)}".encode())
    return total.hexdigest()


def _digest(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
