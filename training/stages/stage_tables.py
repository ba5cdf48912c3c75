"""The stages of training: their order, their tables in a recipe, what they read, and which weights they make.

Source: spec/training.md 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
from torch import Tensor

from worldvln_edge.config import ConfigError
from worldvln_edge.training.data.open_flights import ReadingOptions
from worldvln_edge.training.grpo.grpo_config import GrpoConfig
from worldvln_edge.training.stages.action_stage import ActionStageConfig
from worldvln_edge.training.stages.adapter import AdapterStageConfig
from worldvln_edge.training.stages.backbone_stage import BackboneConfig
from worldvln_edge.training.stages.rgb_stage import RgbStageConfig
from worldvln_edge.training.stages.vae_stage import VaeConfig, VaeEncoderConfig


class ChainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What lies between the stages: table `[chain]`."""

    limit: int | None = None
    """Use at most that many flights."""
    action_flights: int | None = None
    """Flights that the action head and the adapter learn from, whose decoder features are kept; None: all."""
    keep: Literal["features", "codes"] = "features"
    """What is kept of a flight for them; codes are a hundredth of the size, and are decoded in every step."""
    batch: int = 16
    """Flights that are encoded and decoded together."""

    def __post_init__(self) -> None:
        for name in ("limit", "action_flights", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"chain.{name} must be >= 1, found {value}")


@dataclass(frozen=True, kw_only=True)
class StageTable:
    """A stage as the chain sees it."""

    config: type[msgspec.Struct]
    needs: tuple[str, ...]
    """Parts of the model that must be trained before."""
    makes: str
    """The part of the model that it trains."""
    uses: tuple[str, ...]
    """Parts of the model that it runs; the others need no memory."""
    after: tuple[str, ...]
    """Earlier stages whose weights it starts from or reads."""
    prefixes: Mapping[str, str]
    """Prefix in the network -> prefix in the model; what has none is no part of the model."""
    sharded: str | None = None
    """The part that several processes share: the first one gives it to the others."""

    def model_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's part of a network's state dict."""
        found = {}
        for name, tensor in weights.items():
            for own, model in self.prefixes.items():
                if name.startswith(own):
                    found[model + name[len(own) :]] = tensor
        return found


STAGES: Mapping[str, StageTable] = {
    "vae_encoder": StageTable(
        config=VaeEncoderConfig,
        needs=(),
        makes="vae",
        uses=("vae",),
        after=(),
        prefixes={"vae.": "vae.", "readouts.": "readouts."},
    ),
    "vae": StageTable(
        config=VaeConfig, needs=(), makes="vae", uses=("vae",), after=("vae_encoder",), prefixes={"vae.": "vae."}
    ),
    "rgb_head": StageTable(
        config=RgbStageConfig,
        needs=(),
        makes="rgb_head",
        uses=("rgb_head",),
        after=(),
        prefixes={"head.": "rgb_head."},
    ),
    "adapter": StageTable(
        config=AdapterStageConfig,
        needs=("vae", "rgb_head"),
        makes="latent_head",
        uses=("vae", "rgb_head", "latent_head"),
        after=("vae", "rgb_head"),
        prefixes={"": "latent_head.adapter."},
    ),
    "sft": StageTable(
        config=BackboneConfig,
        needs=("vae",),
        makes="world_model",
        uses=("vae", "text_encoder", "world_model"),
        after=("vae",),
        prefixes={"world_model.": "world_model.", "text_encoder.": "text_encoder."},
        sharded="world_model",
    ),
    "action": StageTable(
        config=ActionStageConfig,
        needs=("vae",),
        makes="latent_head",
        uses=("vae", "latent_head"),
        after=("vae", "adapter", "sft"),
        prefixes={"head.": "latent_head.", "decoder.": "vae.decoder.", "proj_up.": "vae.proj_up."},
    ),
}
"""In the order of a run of all."""

TABLES: Mapping[str, type[msgspec.Struct]] = {"chain": ChainConfig, "data": ReadingOptions, "grpo": GrpoConfig}
"""Tables of a recipe that are no stage."""

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "vae": ("vae_encoder", "vae"),
    "backbone": ("sft",),
    "adapter": ("adapter",),
    "action": ("action",),
    "rgb-head": ("rgb_head",),
    "all": tuple(STAGES),
}
"""What a subcommand of `worldvln-edge train` runs; of `all`, and of `vae`, the stages that the recipe names."""

COMMAND_OF_PART: Mapping[str, str] = {
    "vae": "vae",
    "rgb_head": "rgb-head",
    "latent_head": "action",
    "world_model": "backbone",
    "text_encoder": "backbone",
}
