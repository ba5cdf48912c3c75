"""The golden set of the world model: what its files hold (tests/golden/world_model/README.md)."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from worldvln_edge.config import ScheduleConfig, WorldModelConfig
from worldvln_edge.models.world_model import WorldModel


class GoldenSet:
    """Configurations, weights and text of the golden folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        description = json.loads((folder / "config.json").read_text())
        c = description["config"]
        self.raw, self.cases, self.units = c, description["cases"], description["units"]
        self.schedule = ScheduleConfig(
            scale_hw=tuple(tuple(hw) for hw in c["scales_hw"]),
            image_repetition=tuple(c["image_rep"]),
            video_repetition=tuple(c["video_rep"]),
            semantic_scales=c["semantic_scales"],
            frames_inner_clip=c["frames_inner_clip"],
            context_frames=c["context_frames"],
            context_from_largest_no=c["context_from_largest_no"],
            context_interval=c["context_interval"],
        )
        self.model_config = WorldModelConfig(
            width=c["embed_dim"],
            depth=c["depth"],
            heads=c["num_heads"],
            kv_heads=c["num_key_value_heads"],
            intermediate=c["intermediate"],
            block_chunks=c["block_chunks"],
            text_channels=c["text_channels"],
            latent_channels=c["codebook_dim"],
            semantic_bits=c["semantic_scale_dim"],
            detail_bits=c["detail_scale_dim"],
            text_max_tokens=c["text_maxlen"],
            norm_eps=c["rms_eps"],
        )
        self.model = WorldModel(self.model_config)
        self.model.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
        self.text = {name: torch.from_numpy(array) for name, array in self.arrays("text").items()}

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.folder / f"{name}.npz") as file:
            return dict(file)
