"""Model configuration: every size that a preset fixes, in one typed tree.

A `ModelConfig` travels with the checkpoint (`config.json`) and with the bundle (`manifest.json`), so that training,
export and runtime can never disagree. Nothing in here is guessed from a tensor's shape.

Source: spec/world_model.md 2, 3; spec/video_vae.md 1; spec/action_decoder.md 1, 2, 8; spec/training.md 8.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec

_FROZEN = {"frozen": True, "kw_only": True, "forbid_unknown_fields": True}


class ConfigError(ValueError):
    """A configuration that cannot work. The message says which field, what was found and what is allowed."""


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, tuple):
        for part in value:
            yield from _numbers(part)
    else:
        yield value  # type: ignore[misc]


def _require_at_least(least: int, part: str, config: msgspec.Struct, *names: str) -> None:
    """Every number in the named fields, also inside tuples, is >= `least`."""
    for name in names:
        value = getattr(config, name)
        if not all(number >= least for number in _numbers(value)):
            raise ConfigError(f"{part}.{name} must be >= {least}, found {value}")


def _require_finite(part: str, config: msgspec.Struct, *names: str, is_positive: bool) -> None:
    """Every number in the named fields is finite, and > 0 or else >= 0."""
    for name in names:
        value = getattr(config, name)
        for number in _numbers(value):
            if not math.isfinite(number) or number < 0 or (is_positive and number == 0):
                raise ConfigError(f"{part}.{name} must be finite and {'>' if is_positive else '>='} 0, found {value}")


class ScheduleConfig(msgspec.Struct, **_FROZEN):
    """Which scales a clip has, how often each is run, and which earlier scales are visible."""

    scale_hw: tuple[tuple[int, int], ...]
    """(rows, columns) of every scale of one clip, coarse to fine; the last one is the latent grid."""
    image_repetition: tuple[int, ...]
    video_repetition: tuple[int, ...]
    semantic_scales: int
    """The first `semantic_scales` scales of a clip use semantic bits and the semantic head, the others detail bits.

    0: every scale is a detail scale.
    """
    frames_inner_clip: int = 4
    """Latent frames of a full video clip."""
    context_frames: int = 10000
    """Latent frames of earlier clips that a clip may look back; fewer than a clip's (0 too): none are visible."""
    context_from_largest_no: int = 1
    """1: one scale per earlier clip is visible, as served. 0: every earlier scale is visible, as published training."""
    context_interval: int = 2
    """By how many scales the visible scale gets coarser with every clip further back; 0: it stays the same."""

    def __post_init__(self) -> None:
        n = len(self.scale_hw)
        if n == 0:
            raise ConfigError("schedule.scale_hw is empty; give at least one (rows, columns) pair")
        _require_at_least(1, "schedule", self, "scale_hw", "frames_inner_clip")
        _require_at_least(0, "schedule", self, "context_frames", "context_from_largest_no", "context_interval")
        rows, cols = self.latent_hw
        for h, w in self.scale_hw:
            if h > rows or w > cols:
                raise ConfigError(
                    f"schedule.scale_hw: scale {h}x{w} is larger than the latent grid {rows}x{cols} (the last scale)"
                )
        for name in ("image_repetition", "video_repetition"):
            repetition = getattr(self, name)
            if len(repetition) != n or min(repetition) < 1:
                raise ConfigError(f"schedule.{name} must hold {n} numbers >= 1 (one a scale), found {repetition}")
        if not 0 <= self.semantic_scales <= n:
            raise ConfigError(f"schedule.semantic_scales must be 0..{n}, found {self.semantic_scales}")
        if self.context_from_largest_no > n:
            raise ConfigError(
                f"schedule.context_from_largest_no must be 0..{n} (a clip has {n} scales), found "
                f"{self.context_from_largest_no}"
            )

    @property
    def scales_per_clip(self) -> int:
        return len(self.scale_hw)

    @property
    def latent_hw(self) -> tuple[int, int]:
        return self.scale_hw[-1]


class WorldModelConfig(msgspec.Struct, **_FROZEN):
    """Next-scale transformer (spec/world_model.md 2)."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    intermediate: int
    block_chunks: int
    text_channels: int
    latent_channels: int = 64
    semantic_bits: int = 16
    detail_bits: int = 64
    text_max_tokens: int = 512
    """Longest prompt in tokens, rows of `cfg_uncond`, and the scale position of the first visual token."""
    qkvo_bias: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = [name for name in self.__struct_fields__ if name not in ("qkvo_bias", "norm_eps")]
        _require_at_least(1, "world_model", self, *sizes)
        _require_finite("world_model", self, "norm_eps", is_positive=True)
        for name in ("semantic_bits", "detail_bits"):
            if getattr(self, name) > self.latent_channels:
                raise ConfigError(
                    f"world_model.{name} must be 1..{self.latent_channels} (latent_channels, averaged down to bits), "
                    f"found {getattr(self, name)}"
                )
        if self.width % self.heads or self.heads % self.kv_heads or self.depth % self.block_chunks:
            raise ConfigError(
                "world_model: width must divide by heads, heads by kv_heads and depth by block_chunks; found "
                f"width {self.width}, heads {self.heads}, kv_heads {self.kv_heads}, depth {self.depth}, "
                f"block_chunks {self.block_chunks}"
            )
        if self.head_dim % 8:
            raise ConfigError(f"world_model: width / heads must divide by 8 (4-D RoPE), found {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class TextEncoderConfig(msgspec.Struct, **_FROZEN):
    """T5 encoder, gated-GELU (v1.1) form. Width equals `world_model.text_channels`."""

    width: int
    layers: int
    heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    relative_buckets: int = 32
    relative_max_distance: int = 128

    def __post_init__(self) -> None:
        _require_at_least(1, "text_encoder", self, *self.__struct_fields__)
        # Half of the buckets is for each direction, and half of those for exact distances.
        if self.relative_buckets < 4 or self.relative_buckets % 2:
            raise ConfigError(
                f"text_encoder.relative_buckets must be an even number >= 4, found {self.relative_buckets}"
            )
        if self.relative_max_distance <= self.relative_buckets // 4:
            raise ConfigError(
                f"text_encoder.relative_max_distance must be > relative_buckets / 4 = {self.relative_buckets // 4}, "
                f"found {self.relative_max_distance}"
            )


class VideoVAEConfig(msgspec.Struct, **_FROZEN):
    """Causal video VAE (spec/video_vae.md). Spatial stride = pixel_patch * prod(spatial_factors) * latent_patch."""

    block_out_channels: tuple[int, ...]
    """Width of every down block and, last, of the middle; block i samples from entry i to entry i+1."""
    spatial_factors: tuple[int, ...] = (2, 2, 2)
    temporal_factors: tuple[int, ...] = (2, 2, 1)
    layers_per_block: int = 2
    latent_channels: int = 16
    pixel_patch: int = 1
    """Pixel-unshuffle before the first and pixel-shuffle after the last convolution; 1 in the released model."""
    latent_patch: int = 2

    def __post_init__(self) -> None:
        samplers = len(self.block_out_channels) - 2
        if samplers < 1 or len(self.spatial_factors) != samplers or len(self.temporal_factors) != samplers:
            raise ConfigError(
                "video_vae: block_out_channels needs two entries more than spatial_factors and temporal_factors; found "
                f"{self.block_out_channels}, {self.spatial_factors}, {self.temporal_factors}"
            )
        _require_at_least(
            1,
            "video_vae",
            self,
            "block_out_channels",
            "layers_per_block",
            "latent_channels",
            "pixel_patch",
            "latent_patch",
        )
        for name in ("spatial_factors", "temporal_factors"):
            if not set(getattr(self, name)) <= {1, 2}:
                raise ConfigError(f"video_vae.{name} must be 1 or 2 each, found {getattr(self, name)}")
        self._check_channels()

    def _check_channels(self) -> None:
        """Samplers move pixels into channels and back without a remainder."""
        widths = self.block_out_channels
        if widths[-1] != widths[-2]:
            raise ConfigError(
                "video_vae: the last down block has no sampler, so the last two block_out_channels must be equal; "
                f"found {widths}"
            )
        for sf, fine, coarse in zip(self.spatial_factors, widths[:-2], widths[1:-1], strict=True):
            if coarse % sf**2 or sf**2 * fine % coarse:
                raise ConfigError(
                    f"video_vae.block_out_channels: a sampler from {fine} to {coarse} channels, spatial factor {sf}, "
                    f"does not divide; {coarse} must divide by {sf**2}, and {sf**2 * fine} by {coarse}"
                )

    @property
    def feature_channels(self) -> int:
        """Channels of the last up-block feature, which feeds the action decoder."""
        return self.block_out_channels[0]

    @property
    def raw_channels(self) -> int:
        """Channels of the patchified latent that the world model quantises."""
        return self.latent_channels * self.latent_patch**2

    @property
    def spatial_stride(self) -> int:
        stride = self.pixel_patch * self.latent_patch
        for factor in self.spatial_factors:
            stride *= factor
        return stride

    @property
    def temporal_stride(self) -> int:
        stride = 1
        for factor in self.temporal_factors:
            stride *= factor
        return stride


class TimesFormerConfig(msgspec.Struct, **_FROZEN):
    """Divided space-time transformer over short windows (spec/action_decoder.md 2)."""

    image_hw: tuple[int, int]
    patch: int
    width: int
    depth: int
    heads: int
    mlp_ratio: int = 4
    window: int = 4
    """Frames of a window; a window yields window-1 motions of 6 numbers."""

    def __post_init__(self) -> None:
        _require_at_least(1, "timesformer", self, "image_hw", "patch", "width", "depth", "heads", "mlp_ratio")
        _require_at_least(2, "timesformer", self, "window")
        if self.image_hw[0] % self.patch or self.image_hw[1] % self.patch:
            raise ConfigError(f"timesformer.image_hw must divide by patch {self.patch}, found {self.image_hw}")
        if self.width % self.heads:
            raise ConfigError(f"timesformer.width must divide by heads {self.heads}, found {self.width}")

    @property
    def grid_hw(self) -> tuple[int, int]:
        return self.image_hw[0] // self.patch, self.image_hw[1] // self.patch

    @property
    def tokens_per_frame(self) -> int:
        return self.grid_hw[0] * self.grid_hw[1]

    @property
    def outputs(self) -> int:
        return 6 * (self.window - 1)


class AdapterConfig(msgspec.Struct, **_FROZEN):
    """VAE features to TimesFormer patch tokens (spec/action_decoder.md 1)."""

    resize_hw: tuple[int, int]
    hidden: int
    groups: int
    patch: int

    def __post_init__(self) -> None:
        _require_at_least(1, "adapter", self, *self.__struct_fields__)
        if self.resize_hw[0] % self.patch or self.resize_hw[1] % self.patch:
            raise ConfigError(f"adapter.resize_hw must divide by patch {self.patch}, found {self.resize_hw}")
        if self.hidden % self.groups:
            raise ConfigError(f"adapter.hidden must divide by groups {self.groups}, found {self.hidden}")

    @property
    def grid_hw(self) -> tuple[int, int]:
        return self.resize_hw[0] // self.patch, self.resize_hw[1] // self.patch


class ActionDecoderConfig(msgspec.Struct, **_FROZEN):
    """Latent head (adapter + TimesFormer) and RGB head (its own TimesFormer)."""

    adapter: AdapterConfig
    latent_head: TimesFormerConfig
    rgb_head: TimesFormerConfig
    left_context: int = 3
    """Observed frames in front of a segment that its windows may look at."""
    rgb_mean: tuple[float, float, float] = (0.34721234, 0.36705238, 0.36066107)
    rgb_std: tuple[float, float, float] = (0.30737526, 0.31515116, 0.32020183)

    def __post_init__(self) -> None:
        if self.adapter.grid_hw != self.latent_head.grid_hw:
            raise ConfigError(
                f"action_decoder: adapter grid {self.adapter.grid_hw} differs from latent head grid "
                f"{self.latent_head.grid_hw}; resize_hw / patch must equal image_hw / patch"
            )
        if self.left_context < 1:
            raise ConfigError(
                f"action_decoder.left_context must be >= 1 (motions start at an observed frame), found "
                f"{self.left_context}"
            )
        _require_finite("action_decoder", self, "rgb_std", is_positive=True)
        if not all(map(math.isfinite, self.rgb_mean)):
            raise ConfigError(f"action_decoder.rgb_mean must be finite, found {self.rgb_mean}")


class GenerationConfig(msgspec.Struct, **_FROZEN):
    """Sampling of bits (spec/world_model.md 6)."""

    cfg: float
    """Guidance weight; 1: no guidance, and the unconditional row is not computed."""
    tau_image: float = 1.0
    tau_video: float = 0.4
    apg_norm_threshold: float = 0.05
    """Largest root mean square of the guidance; 0: no limit."""
    apg_eta: float = 0.0

    def __post_init__(self) -> None:
        _require_finite("generation", self, "tau_image", "tau_video", is_positive=True)
        _require_finite("generation", self, "cfg", "apg_norm_threshold", "apg_eta", is_positive=False)


class HorizonConfig(msgspec.Struct, **_FROZEN):
    """Frames of one horizon and of one segment (spec/session_protocol.md 1)."""

    num_frames: int = 49
    step: int = 16
    fps: int = 16

    def __post_init__(self) -> None:
        _require_at_least(1, "horizon", self, "fps", "step")
        if self.num_frames < 2 or (self.num_frames - 1) % self.step:
            raise ConfigError(
                f"horizon: num_frames - 1 must be a positive multiple of step, found num_frames {self.num_frames} and "
                f"step {self.step}"
            )

    @property
    def points(self) -> tuple[int, ...]:
        """Segment borders as 1-based frame indices: 1, 1+step, ..., num_frames."""
        return (*range(1, self.num_frames, self.step), self.num_frames)

    @property
    def segments(self) -> int:
        return len(self.points) - 1


class ModelConfig(msgspec.Struct, **_FROZEN):
    """Everything a checkpoint needs besides its tensors."""

    name: str
    image_hw: tuple[int, int]
    schedule: ScheduleConfig
    world_model: WorldModelConfig
    text_encoder: TextEncoderConfig
    video_vae: VideoVAEConfig
    action_decoder: ActionDecoderConfig
    generation: GenerationConfig
    horizon: HorizonConfig = HorizonConfig()

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ConfigError("name is blank; give the model a name")
        stride, (rows, cols) = self.video_vae.spatial_stride, self.schedule.latent_hw
        if self.image_hw != (rows * stride, cols * stride):
            raise ConfigError(
                f"image_hw {self.image_hw} does not fit: last scale {rows}x{cols} times VAE stride {stride} is "
                f"{rows * stride}x{cols * stride}"
            )
        if self.video_vae.raw_channels != self.world_model.latent_channels:
            raise ConfigError(
                f"video_vae gives {self.video_vae.raw_channels} channels after patchify, world_model expects "
                f"{self.world_model.latent_channels}"
            )
        if self.text_encoder.width != self.world_model.text_channels:
            raise ConfigError(
                f"text_encoder.width {self.text_encoder.width} differs from world_model.text_channels "
                f"{self.world_model.text_channels}"
            )
        horizon, clip = self.horizon, self.video_vae.temporal_stride * self.schedule.frames_inner_clip
        if horizon.step % clip:
            raise ConfigError(
                f"horizon.step {horizon.step} must be a multiple of the {clip} frames of a clip, so that observed and "
                "generated clips have the same borders"
            )
        for name in ("latent_head", "rgb_head"):
            window = getattr(self.action_decoder, name).window
            if window > horizon.step + 1:
                raise ConfigError(
                    f"action_decoder.{name}: a window of {window} frames does not fit into the {horizon.step + 1} "
                    "frames of the first segment (horizon.step + 1)"
                )

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


def parse_model_config(data: bytes, source: str) -> ModelConfig:
    """Decode a `config.json`.

    Args:
        data: JSON text.
        source: where it came from; stands in the error.

    Raises:
        ConfigError: not JSON, an unknown or missing field, or sizes that do not fit together.
    """
    try:
        return msgspec.json.decode(data, type=ModelConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: not a model config: {error}") from error


def read_model_config(path: Path) -> ModelConfig:
    """Read a `config.json`. Raises ConfigError (see `parse_model_config`) or FileNotFoundError."""
    return parse_model_config(path.read_bytes(), str(path))
