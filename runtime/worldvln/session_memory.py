"""What one session can hold at most, in bytes, from the shapes that a bundle or a configuration names.

Arrays and device tensors are counted, the interpreter's own objects are not; nor is what sessions share: weights, cache
buffers, text cache, activations. A session that is flown with `record` (parity, recorder) holds more.

Legend: D latent channels, T latent frames, H W latent rows and columns, N patch tokens.
Source: spec/world_model.md 3.3, 9.2; spec/video_vae.md 8; spec/action_decoder.md 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from worldvln_edge.bundle import Manifest
from worldvln_edge.config import ModelConfig
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.scale_schedule import Clip, ScaleSchedule, ScaleStep

if TYPE_CHECKING:  # what a bundle costs is known without an engine
    from worldvln_edge.runtime.engines.engine import Tensor

_FLOAT32 = 4
_Key = tuple[int, int]  # (clip, scale)


class SessionMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that one session holds at most, by what they are."""

    keys_and_values: int
    """Text, and the scales that later clips refer to."""
    vae_states: int
    """Convolution states of encoder and decoder."""
    clips: int
    """Bit labels, inputs and codes of observed clips."""
    frames: int
    """Preprocessed frames of an unfinished group, latents of frames that came early, and the newest frame, from which
    a chained flight goes on."""
    draws: int
    """Random numbers of the next segment."""
    prediction: int
    """Codes of the last segment's clips, and patch tokens of the frames before the next one."""
    speculation: int = 0
    """The next segment on its way, and what it goes on from."""
    preview: int = 0
    """Convolution states behind the predicted frames, and those frames, where people look at them."""

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in self.__struct_fields__)


@dataclass(frozen=True, kw_only=True)
class SessionSizes:
    """What the bound needs besides the configuration."""

    guidance_rows: int
    kv_itemsize: int  # bytes of one number in the KV cache
    token_itemsize: int  # of the adapter's patch tokens
    encoder_state_bytes: int
    decoder_state_bytes: int
    pixel_state_bytes: int = 0

    @classmethod
    def of_bundle(cls, manifest: Manifest) -> SessionSizes:
        """As the signatures of the bundle's graphs say."""
        cache = f"past_{graphs.cache_stems(1)[0]}"
        return cls(
            guidance_rows=manifest.guidance_rows,
            kv_itemsize=_input_itemsize(manifest, graphs.WORLD_MODEL_STEP, cache),
            token_itemsize=_input_itemsize(manifest, graphs.ACTION_HEAD, "tokens"),
            encoder_state_bytes=_state_bytes(manifest, graphs.VAE_ENCODER),
            decoder_state_bytes=_state_bytes(manifest, graphs.VAE_DECODER),
            pixel_state_bytes=_state_bytes(manifest, graphs.VAE_PIXELS),
        )


def bundle_session_memory(
    manifest: Manifest, *, speculates: bool = False, shows_predictions: bool = False
) -> SessionMemory:
    """The bound of a bundle's sessions; see `session_memory`."""
    sizes = SessionSizes.of_bundle(manifest)
    return session_memory(manifest.model, sizes, speculates=speculates, shows_predictions=shows_predictions)


def session_memory(
    config: ModelConfig, sizes: SessionSizes, *, speculates: bool = False, shows_predictions: bool = False
) -> SessionMemory:
    """The most that a session holds between two calls, whatever frames, prompts, profiles and seeds it is sent.

    Args:
        config: of the model.
        sizes: of the graphs.
        speculates: segments are generated before their frames are there.
        shows_predictions: predicted frames are decoded for whoever asks.
    """
    bound = _Bound(config, sizes)
    memory = bound.memory(speculates=speculates)
    return msgspec.structs.replace(memory, preview=bound.preview()) if shows_predictions else memory


class _Bound:
    def __init__(self, config: ModelConfig, sizes: SessionSizes):
        self._config, self._sizes = config, sizes
        self._stride = config.video_vae.temporal_stride
        self._schedule = ScaleSchedule(config.schedule, self._latents(config.horizon.num_frames))
        points = config.horizon.points
        borders = [self._latents(point) for point in points]
        self._segments = [
            [clip for clip in self._schedule.clips if first <= clip.first_frame < end]
            for first, end in pairwise(borders)
        ]
        self._observed = [clip for clip in self._schedule.clips if clip.first_frame < borders[-2]]

    def memory(self, *, speculates: bool) -> SessionMemory:
        sizes, config = self._sizes, self._config
        frame = 3 * prod(config.image_hw)
        latents = self._latents(config.horizon.points[-2])
        memory = SessionMemory(
            keys_and_values=self._kv(self._stored_entries()),
            vae_states=sizes.encoder_state_bytes + sizes.decoder_state_bytes,
            clips=sum(self._observed_clip(clip) for clip in self._observed),
            frames=frame + _FLOAT32 * ((self._stride - 1) * frame + latents * prod(self._codes_shape(1))),
            draws=max(sum(map(self._draws, segment)) for segment in self._segments),
            prediction=max(sum(map(self._codes, segment)) for segment in self._segments) + self._context_tokens(),
        )
        if not speculates:
            return memory
        return msgspec.structs.replace(memory, speculation=self._speculation(memory))

    def preview(self) -> int:
        """States of a second decoder and of its pixels, and one segment of pixels."""
        most_latents = max(sum(clip.frames for clip in segment) for segment in self._segments)
        picture = most_latents * self._stride * 3 * prod(self._config.image_hw)
        return self._sizes.decoder_state_bytes + self._sizes.pixel_state_bytes + picture

    def _latents(self, frames: int) -> int:
        """Latent frames of that many frames."""
        return 1 + (frames - 1) // self._stride

    def _codes_shape(self, frames: int) -> tuple[int, ...]:
        return (self._config.world_model.latent_channels, frames, *self._config.schedule.latent_hw)

    def _codes(self, clip: Clip) -> int:
        return _FLOAT32 * prod(self._codes_shape(clip.frames))

    def _bits(self, step: ScaleStep) -> int:
        model = self._config.world_model
        return step.tokens * (model.semantic_bits if step.is_semantic else model.detail_bits)

    def _observed_clip(self, clip: Clip) -> int:
        inputs = sum(self._last_tokens((clip.index, scale)) for scale in self._schedule.scales_referred_to(clip.index))
        inputs *= self._config.world_model.latent_channels
        return sum(map(self._bits, clip.steps)) + _FLOAT32 * inputs + self._codes(clip)

    def _draws(self, clip: Clip) -> int:
        model = self._config.world_model
        return _FLOAT32 * sum(step.tokens for step in clip.steps) * (model.semantic_bits + model.detail_bits)

    def _tokens(self, frames: int) -> int:
        head = self._config.action_decoder.latent_head
        return self._sizes.token_itemsize * frames * head.tokens_per_frame * head.width

    def _context_tokens(self) -> int:
        """What is kept is cut out of the context before and the frames of the latents that were decoded last."""
        left = self._config.action_decoder.left_context
        return self._tokens(left + self._stride * -(-left // self._stride))

    def _kv(self, entries: int) -> int:
        model = self._config.world_model
        per_entry = model.depth * 2 * self._sizes.guidance_rows * model.kv_heads * model.head_dim
        return entries * per_entry * self._sizes.kv_itemsize

    def _last_tokens(self, key: _Key) -> int:
        return self._schedule.last_step(*key).tokens

    def _stored_entries(self) -> int:
        """Text and scales. The most is there when a prompt was changed, because then every scale is made anew."""
        most = max(self._entries(self._reachable(count)) for count in range(len(self._observed) + 1))
        for segment in self._segments:
            most = max(most, self._entries(self._reachable(segment[0].index) | self._kept_by_generation(segment)))
        return self._config.world_model.text_max_tokens + most

    def _entries(self, keys: Iterable[_Key]) -> int:
        return sum(map(self._last_tokens, keys))

    def _reachable(self, observed: int) -> set[_Key]:
        """Scales of the first clips that later clips refer to, directly or through scales that have to be made."""
        later = range(observed, len(self._schedule.clips))
        waiting = [key for clip in later for key in self._schedule.references(clip)]
        found: set[_Key] = set()
        while waiting:
            key = waiting.pop()
            if key not in found:
                found.add(key)
                waiting += self._schedule.references_of_scale(*key)
        return {key for key in found if key[0] < observed}

    def _kept_by_generation(self, segment: Sequence[Clip]) -> set[_Key]:
        """Scales of generated clips that stay until those clips are observed."""
        config = self._config.schedule
        if config.context_from_largest_no <= 0:
            return {(clip.index, scale) for clip in segment for scale in range(config.scales_per_clip)}
        return {(clip.index, s) for clip in segment[:-1] for s in self._schedule.scales_referred_to(clip.index)}

    def _speculation(self, memory: SessionMemory) -> int:
        """A branch with keys, values and draws of its own, on predicted clips; and two segments with their bits."""
        horizon, left = self._config.horizon, self._config.action_decoder.left_context
        segment = max(sum(map(self._recorded, clips)) for clips in self._segments)
        segment += self._tokens(left + horizon.step) + self._sizes.decoder_state_bytes
        predicted = max(sum(map(self._observed_clip, clips)) for clips in self._segments)
        return memory.keys_and_values + memory.draws + predicted + 2 * segment

    def _recorded(self, clip: Clip) -> int:
        """A generated clip whose bits and probabilities are kept; the latter with the columns of both heads."""
        model = self._config.world_model
        probabilities = _FLOAT32 * (model.semantic_bits + model.detail_bits)
        return self._codes(clip) + sum(self._bits(step) + probabilities * step.tokens for step in clip.steps)


def _state_bytes(manifest: Manifest, stem: str) -> int:
    """Convolution states of a streaming VAE part, such as `graphs.VAE_ENCODER`."""
    entry = manifest.graphs.get(graphs.first_or_next(stem, False))
    if entry is None:  # a side graph that was not exported
        return 0
    states = [spec for spec in entry.inputs if spec.name.startswith("state_")]
    return sum(_itemsize(spec.dtype) * prod(int(size) for size in spec.shape) for spec in states)


def _itemsize(dtype: str) -> int:
    """Bytes of one number of a graph's input or output."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _input_itemsize(manifest: Manifest, graph: str, name: str) -> int:
    return next(_itemsize(spec.dtype) for spec in manifest.graphs[graph].inputs if spec.name == name)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """What tensors keep in memory: each memory once, a view with the whole array that it was cut from."""
    owners = {id(owner): owner for owner in map(_owner, tensors)}
    return sum(_size_bytes(owner) for owner in owners.values())


def _owner(tensor: Tensor) -> Tensor:
    while isinstance(tensor, np.ndarray) and isinstance(tensor.base, np.ndarray):
        tensor = tensor.base
    return tensor


def _size_bytes(tensor: Tensor) -> int:
    # An ONNX Runtime value has no `nbytes`; everything else that an engine leaves behind does.
    return int(tensor.nbytes if hasattr(tensor, "nbytes") else tensor.tensor_size_in_bytes())
