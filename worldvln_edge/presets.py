"""Named model configurations: the released model, two small ones of the same architecture, and one for benchmarks.

Source: spec/world_model.md 2.1, 3.4, 7; spec/video_vae.md 1; spec/action_decoder.md 1, 2; spec/training.md 8.2.
`nano` and `mini` keep the released spatial stride (16), latent channels (64) and bits (16 and 64), so a clip of `nano`
has only 120 tokens: that is what lets it train on two CPU cores.
"""

from worldvln_edge.config import (
    ActionDecoderConfig,
    AdapterConfig,
    ConfigError,
    GenerationConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    TimesFormerConfig,
    VideoVAEConfig,
    WorldModelConfig,
)
from worldvln_edge.scale_schedule import pixel_budget_scales


def _square(*sides: int) -> tuple[tuple[int, int], ...]:
    return tuple((side, side) for side in sides)


def worldvln_8b() -> ModelConfig:
    """The released sizes: 640x640, 14 scales, 8.8 B parameters."""
    timesformer = TimesFormerConfig(image_hw=(192, 640), patch=16, width=384, depth=12, heads=6)
    return ModelConfig(
        name="worldvln-8b",
        image_hw=(640, 640),
        schedule=ScheduleConfig(
            scale_hw=pixel_budget_scales("0.40M", 1.0),
            image_repetition=(3,) * 14,
            video_repetition=(3,) * 12 + (2, 1),
            semantic_scales=11,
        ),
        world_model=WorldModelConfig(
            width=4096, depth=36, heads=32, kv_heads=8, intermediate=16384, block_chunks=6, text_channels=2048
        ),
        text_encoder=TextEncoderConfig(
            width=2048, layers=24, heads=32, head_dim=64, feed_forward=5120, vocabulary=32128
        ),
        video_vae=VideoVAEConfig(block_out_channels=(96, 192, 384, 384, 384)),
        action_decoder=ActionDecoderConfig(
            adapter=AdapterConfig(resize_hw=(192, 640), hidden=128, groups=32, patch=16),
            latent_head=timesformer,
            rgb_head=timesformer,
        ),
        generation=GenerationConfig(cfg=34.0),
    )


def mini() -> ModelConfig:
    """Small model, trained on one GPU (`worldvln-edge train --preset mini --device cuda`): 128x128, 6 scales."""
    timesformer = TimesFormerConfig(image_hw=(128, 128), patch=16, width=192, depth=6, heads=6)
    return ModelConfig(
        name="mini",
        image_hw=(128, 128),
        schedule=ScheduleConfig(
            scale_hw=_square(1, 2, 3, 4, 6, 8),
            image_repetition=(1,) * 6,
            video_repetition=(1,) * 6,
            semantic_scales=4,
        ),
        world_model=WorldModelConfig(
            width=384,
            depth=8,
            heads=6,
            kv_heads=2,
            intermediate=1536,
            block_chunks=4,
            text_channels=256,
            text_max_tokens=32,
        ),
        text_encoder=TextEncoderConfig(width=256, layers=2, heads=4, head_dim=64, feed_forward=512, vocabulary=256),
        video_vae=VideoVAEConfig(
            block_out_channels=(64, 128, 128, 128), spatial_factors=(2, 1), temporal_factors=(2, 2), pixel_patch=4
        ),
        action_decoder=ActionDecoderConfig(
            adapter=AdapterConfig(resize_hw=(32, 32), hidden=64, groups=8, patch=4),
            latent_head=timesformer,
            rgb_head=timesformer,
        ),
        generation=GenerationConfig(cfg=2.0),
    )


def nano() -> ModelConfig:
    """The embedded default, for two CPU cores: 64x64, 4 scales."""
    timesformer = TimesFormerConfig(image_hw=(64, 64), patch=16, width=96, depth=2, heads=4)
    return ModelConfig(
        name="nano",
        image_hw=(64, 64),
        schedule=ScheduleConfig(
            scale_hw=_square(1, 2, 3, 4),
            image_repetition=(1,) * 4,
            video_repetition=(1,) * 4,
            semantic_scales=3,
        ),
        world_model=WorldModelConfig(
            width=192,
            depth=6,
            heads=6,
            kv_heads=2,
            intermediate=512,
            block_chunks=3,
            text_channels=128,
            text_max_tokens=32,
        ),
        text_encoder=TextEncoderConfig(width=128, layers=2, heads=4, head_dim=32, feed_forward=256, vocabulary=256),
        video_vae=VideoVAEConfig(
            block_out_channels=(32, 64, 64, 64),
            spatial_factors=(2, 1),
            temporal_factors=(2, 2),
            layers_per_block=1,
            pixel_patch=4,
        ),
        action_decoder=ActionDecoderConfig(
            adapter=AdapterConfig(resize_hw=(16, 16), hidden=32, groups=8, patch=4),
            latent_head=timesformer,
            rgb_head=timesformer,
        ),
        generation=GenerationConfig(cfg=2.0),
    )


def narrow() -> ModelConfig:
    """The released schedule at narrow width, for benchmarks; untrained: 640x640, 14 scales, the released horizon."""
    released = worldvln_8b()
    timesformer = TimesFormerConfig(image_hw=(192, 640), patch=16, width=24, depth=2, heads=2)
    return ModelConfig(
        name="narrow",
        image_hw=released.image_hw,
        schedule=released.schedule,
        world_model=WorldModelConfig(
            width=64,
            depth=2,
            heads=2,
            kv_heads=1,
            intermediate=192,
            block_chunks=1,
            text_channels=128,
            text_max_tokens=32,
        ),
        text_encoder=TextEncoderConfig(width=128, layers=2, heads=4, head_dim=32, feed_forward=256, vocabulary=256),
        video_vae=VideoVAEConfig(block_out_channels=(4, 8, 8, 8, 8), layers_per_block=1),
        action_decoder=ActionDecoderConfig(
            adapter=AdapterConfig(resize_hw=(192, 640), hidden=8, groups=4, patch=16),
            latent_head=timesformer,
            rgb_head=timesformer,
        ),
        generation=released.generation,
        horizon=released.horizon,
    )


_PRESETS = {"worldvln-8b": worldvln_8b, "mini": mini, "nano": nano, "narrow": narrow}
PRESET_NAMES = tuple(_PRESETS)


def preset(name: str) -> ModelConfig:
    """The configuration called `name`. Raises ConfigError for an unknown name."""
    if name not in _PRESETS:
        raise ConfigError(f"unknown preset {name!r}; choose one of {', '.join(_PRESETS)}")
    return _PRESETS[name]()
