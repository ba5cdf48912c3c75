"""Random models of a few thousand weights, for tests that need every network at once.

The architecture is the released one; sizes are chosen so that a whole bundle exports in seconds.
"""

from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.config import (
    ActionDecoderConfig,
    AdapterConfig,
    GenerationConfig,
    HorizonConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    TimesFormerConfig,
    VideoVAEConfig,
    WorldModelConfig,
)
from worldvln_edge.models.worldvln import HeadStats, WorldVLN, save_checkpoint
from worldvln_edge.presets import preset
from worldvln_edge.training.stages.tokenizer import build_word_tokenizer

WORDS = ("fly", "forward", "back", "turn", "left", "right", "climb", "to", "the", "red", "tower", "5", "m", ".")
STATS = HeadStats(
    latent_head=LabelStats(
        mean_angles=(0.01, 0.0, -0.02), std_angles=(0.05, 0.02, 0.01), mean_t=(0.1, 0.0, -0.02), std_t=(0.1, 0.05, 0.04)
    ),
    rgb_head=LabelStats(
        mean_angles=(0.02, 0.0, 0.01), std_angles=(0.04, 0.03, 0.02), mean_t=(0.2, 0.1, 0.0), std_t=(0.2, 0.02, 0.03)
    ),
)


def tiny_config(
    *,
    name: str = "tiny",
    repetitions: int = 2,
    context_from_largest_no: int = 1,
    context_interval: int = 1,
    clips_per_segment: int = 1,
    left_context: int = 3,
    generation: GenerationConfig | None = None,
) -> ModelConfig:
    """Two-layer networks on 16x24 pixels: latent grid 2x3, clips of 4 frames, three segments.

    The three scales include one that is not a divisor of the grid, the last repetition list is uneven as in the
    released model, and every axis has a size of its own.
    """
    step = 4 * clips_per_segment
    return ModelConfig(
        name=name,
        image_hw=(16, 24),
        schedule=ScheduleConfig(
            scale_hw=((1, 1), (1, 2), (2, 3)),
            image_repetition=(repetitions,) * 3,
            video_repetition=(repetitions, repetitions, 1),
            semantic_scales=2,
            frames_inner_clip=2,
            context_from_largest_no=context_from_largest_no,
            context_interval=context_interval,
        ),
        world_model=WorldModelConfig(
            width=32,
            depth=2,
            heads=4,
            kv_heads=2,
            intermediate=48,
            block_chunks=2,
            text_channels=24,
            latent_channels=16,
            semantic_bits=6,
            detail_bits=16,
            text_max_tokens=12,
        ),
        text_encoder=TextEncoderConfig(width=24, layers=1, heads=2, head_dim=8, feed_forward=40, vocabulary=32),
        video_vae=VideoVAEConfig(
            block_out_channels=(8, 16, 16),
            spatial_factors=(2,),
            temporal_factors=(2,),
            layers_per_block=1,
            latent_channels=4,
            pixel_patch=2,
        ),
        action_decoder=ActionDecoderConfig(
            adapter=AdapterConfig(resize_hw=(8, 16), hidden=8, groups=4, patch=4),
            latent_head=TimesFormerConfig(image_hw=(8, 16), patch=4, width=24, depth=2, heads=3, window=3),
            rgb_head=TimesFormerConfig(image_hw=(16, 24), patch=8, width=16, depth=2, heads=2, window=4),
            left_context=left_context,
        ),
        generation=generation or GenerationConfig(cfg=3.0, tau_image=1.0, tau_video=0.5),
        horizon=HorizonConfig(num_frames=1 + 3 * step, step=step, fps=4),
    )


def released_schedule_config() -> ModelConfig:
    """The released scales, repetitions, clips and horizon, and nothing else of the released size: 160x160 pixels."""
    released = preset("worldvln-8b")
    tiny = tiny_config()
    return msgspec.structs.replace(
        tiny,
        name="released-schedule",
        image_hw=(160, 160),
        schedule=released.schedule,
        world_model=msgspec.structs.replace(
            tiny.world_model, width=8, depth=2, heads=1, kv_heads=1, intermediate=8, latent_channels=16
        ),
        video_vae=VideoVAEConfig(
            block_out_channels=(8, 8, 8, 8),
            spatial_factors=(2, 1),
            temporal_factors=(2, 2),
            layers_per_block=1,
            latent_channels=4,
        ),
        horizon=released.horizon,
    )


def random_model(config: ModelConfig, seed: int = 0) -> WorldVLN:
    """A model whose outputs depend visibly on all of its inputs: initial weights, made larger, and no zero biases."""
    torch.manual_seed(seed)
    model = WorldVLN(config)
    with torch.no_grad():
        for module in (model.world_model, model.latent_head, model.rgb_head):
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.6 / parameter[0].numel() ** 0.5 if parameter.ndim > 2 else 0.25)
        for head in (model.world_model.head, model.world_model.semantic_head2):
            nn.init.normal_(head.weight, std=0.4)
        nn.init.normal_(model.world_model.cfg_uncond, std=0.7)
        model.vae.scale_learnable_parameters.fill_(1.5)
    return model.requires_grad_(False).eval()


def tokenizer_json(config: ModelConfig) -> str:
    seconds = (config.horizon.num_frames - 1) // config.horizon.fps
    return build_word_tokenizer(WORDS, f"<<<t={seconds}s>>>", config.text_encoder.vocabulary).to_str()


def save_random_checkpoint(folder: Path, config: ModelConfig, seed: int = 0) -> None:
    save_checkpoint(folder, random_model(config, seed), STATS, tokenizer_json(config))


def random_frames(
    config: ModelConfig, count: int, seed: int = 0, hw: tuple[int, int] | None = None
) -> list[np.ndarray]:
    """Smooth moving pictures, uint8 [H, W, 3]: neighbours resemble each other as camera frames do."""
    h, w = hw or config.image_hw
    rng = np.random.default_rng(seed)
    phase, speed = rng.uniform(0, 6, (2, 3)), rng.uniform(0.1, 0.5, 3)
    rows, cols = np.mgrid[0:h, 0:w]
    frames = []
    for t in range(count):
        waves = [np.sin(rows * 0.4 + phase[0, c] + speed[c] * t) + np.cos(cols * 0.3 + phase[1, c]) for c in range(3)]
        noise = rng.normal(0, 12, (h, w, 3))
        frames.append(np.clip(127 + 50 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8))
    return frames
