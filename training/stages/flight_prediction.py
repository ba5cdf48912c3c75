"""The world model as the predictor of whole flights, for features of predicted latents.

Source: spec/training.md 8.6 (head trained on predicted latents); spec/world_model.md 6.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from worldvln_edge.config import ModelConfig
from worldvln_edge.models.text_encoder import TextEncoder
from worldvln_edge.models.world_model import WorldModel
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.stages.backbone import TextBatch
from worldvln_edge.training.stages.decoder_features import weights_digest
from worldvln_edge.training.stages.prediction import predict_flight


class WorldModelPredictor:
    """A `FlightPredictor` of frozen networks, all on one device.

    Args:
        model, text_encoder, tokenizer, config: of one checkpoint.
        is_teacher_forced: see `predict_clip`; tells errors of one scale from errors that scales hand on.
    """

    def __init__(
        self,
        model: WorldModel,
        text_encoder: TextEncoder,
        tokenizer: PromptTokenizer,
        config: ModelConfig,
        *,
        is_teacher_forced: bool = False,
    ):
        self._model, self._text_encoder, self._tokenizer, self._config = model, text_encoder, tokenizer, config
        self._is_teacher_forced = is_teacher_forced
        self._networks = f"{weights_digest(model, text_encoder)}{config.to_json().decode()}{is_teacher_forced}"

    def digest(self, instruction: str) -> str:
        """See `FlightPredictor.digest`."""
        tokens = self._tokenizer.encode(tagged_prompt(instruction, self._config.horizon)).tolist()
        return hashlib.sha256(f"{self._networks} {tokens}".encode()).hexdigest()

    @torch.no_grad()
    def predict(
        self,
        latents_BCTHW: Tensor,
        schedule: ScaleSchedule,
        instructions: Sequence[str],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """See `FlightPredictor.predict`."""
        text = TextBatch(tuple(instructions), self._tokenizer, self._config)
        features, lengths = text.features(self._text_encoder, torch.arange(len(instructions)))
        return predict_flight(
            self._model,
            self._config,
            schedule,
            latents_BCTHW,
            features,
            lengths,
            generators,
            is_teacher_forced=self._is_teacher_forced,
        )
