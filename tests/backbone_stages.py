"""Stages of the backbone on small random flights of different lengths, for its tests."""

import torch
from small_models import WORDS, random_model, tiny_config

from worldvln_edge.models.worldvln import WorldVLN
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.training.stages.backbone_stage import BackboneConfig, BackboneStage
from worldvln_edge.training.stages.tokenizer import build_word_tokenizer

CONFIG = tiny_config()
INSTRUCTIONS = ("fly forward 5 m .", "turn left", "climb to the red tower", "fly back", "turn right", "climb")
FRAMES = (7, 3, 7, 5, 1, 7)
TOKENIZER = PromptTokenizer(
    build_word_tokenizer(WORDS, "<<<t=3s>>>", CONFIG.text_encoder.vocabulary), CONFIG.world_model.text_max_tokens
)
EXACT = BackboneConfig(flip_strength=0.0, condition_drop=0.0)


class MixedFlights:
    """Flights of different lengths."""

    def __init__(self, frames=FRAMES, instructions=INSTRUCTIONS):
        generator = torch.Generator().manual_seed(0)
        channels, hw = CONFIG.world_model.latent_channels, CONFIG.schedule.latent_hw
        self.tensors = [torch.randn(channels, n, *hw, generator=generator) for n in frames]
        self.instructions = list(instructions)

    def __len__(self) -> int:
        return len(self.tensors)

    def name(self, row: int) -> str:
        return f"flights.jsonl:{row}"

    def latent_frames(self, row: int) -> int:
        return self.tensors[row].shape[1]

    def latents(self, row: int) -> torch.Tensor:
        return self.tensors[row]

    def instruction(self, row: int, generator: torch.Generator | None = None) -> str:
        return self.instructions[row]


def make_stage(
    config: BackboneConfig = EXACT, flights=None, model: WorldVLN | None = None, model_config=CONFIG, **more
) -> BackboneStage:
    """A stage on `model`, whose parameters all train; a random one by default."""
    model = model or random_model(model_config)
    model.requires_grad_(True)
    flights = flights or MixedFlights()
    return BackboneStage(config, model_config, model.world_model, model.text_encoder, TOKENIZER, flights, **more)


def mean_loss(stage: BackboneStage, rows: list[int], epoch: int = 0) -> float:
    """What is minimised, of one micro-batch."""
    batch = stage.load(epoch, rows)
    return float(stage.totals(batch)["loss"].detach()) / stage.weights(batch)["loss"]
