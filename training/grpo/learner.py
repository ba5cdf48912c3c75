"""The policy that is trained, the reference it stays near, and the scores of flown bits under both.

Source: spec/training.md 5.9 items 3, 7, 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import torch
from torch import Tensor

from worldvln_edge.models.worldvln import WorldVLN
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.training.grpo.grpo_config import GrpoConfig
from worldvln_edge.training.grpo.grpo_stage import GrpoStage
from worldvln_edge.training.grpo.policy_batch import Sample
from worldvln_edge.training.grpo.scoring import score_samples
from worldvln_edge.training.stages.backbone_network import FrozenTextFeatures
from worldvln_edge.training.stages.backbone_rows import LatentFlights
from worldvln_edge.training.stages.backbone_stage import BackboneConfig, BackboneStage
from worldvln_edge.training.trainer.distributed import Ranks
from worldvln_edge.training.trainer.stage_run import StageRun

_KEPT_PROMPTS = 4096


class AnchorFlights(msgspec.Struct, frozen=True, kw_only=True):
    """Recorded flights, with latents, of the SFT loss that every step adds."""

    config: BackboneConfig
    """Of the SFT stage; what it trains and how many rows a step has is GRPO's to say."""
    flights: LatentFlights
    held_out: LatentFlights | None = None


class Learner:
    """The world model of `model` in training; everything else of it is frozen.

    Args:
        model: on the ranks' device; trained in place. Its weights now are the reference.
        tokenizer: of prompts.
        config: of the run.
        anchor: None: no SFT loss.
        ranks: the processes.
        seed: of the order of samples, and of the anchor.

    Raises:
        ConfigError: frozen chunks that the world model does not have, or segments that are not clips.
    """

    def __init__(
        self,
        model: WorldVLN,
        tokenizer: PromptTokenizer,
        config: GrpoConfig,
        anchor: AnchorFlights | None,
        *,
        ranks: Ranks,
        seed: int,
    ):
        self.model, self._config, self._ranks = model, config, ranks
        self._bf16 = config.precision == "bf16"
        model.requires_grad_(False)
        model.world_model.requires_grad_(True)
        self._text = FrozenTextFeatures(model.text_encoder, kept=_KEPT_PROMPTS)
        stage = None
        if anchor is not None and config.anchor > 0:
            stage = BackboneStage(
                _anchor_config(anchor.config, config),
                model.config,
                model.world_model,
                model.text_encoder,
                tokenizer,
                anchor.flights,
                anchor.held_out,
                seed=seed,
            )
        self.stage = GrpoStage(config, model.config, model.world_model, tokenizer, self._text, stage, seed=seed)
        self.run = StageRun(self.stage, config.optimiser(), ranks, bf16=self._bf16, seed=seed)
        self._trained = {name: p for name, p in self.run.network.named_parameters() if p.requires_grad}
        self._reference = {name: p.detach().to("cpu", copy=True) for name, p in self._trained.items()}

    def scores(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Log-probabilities of flown bits under the policy as it is: float32 [bits] of every sample, on the CPU."""
        model = self.model.world_model
        model.eval()
        with self.autocast():
            found = score_samples(model, self.stage.maker, self._text, samples, together=self._config.micro_samples)
        model.train()
        return found

    def reference_scores(self, samples: Sequence[Sample]) -> list[Tensor]:
        """The same under the policy that the run began with."""
        with self._as_reference():
            return self.scores(samples)

    def autocast(self) -> torch.autocast:
        """The precision of training, for whatever has to agree with it."""
        return torch.autocast(self._ranks.device.type, torch.bfloat16, enabled=self._bf16)

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """The trained parameters hold the reference's values: no second copy of what is frozen, nor on the device."""
        now = {name: p.detach().to("cpu", copy=True) for name, p in self._trained.items()}
        try:
            self._put(self._reference)
            yield
        finally:
            self._put(now)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._trained.items():
            parameter.copy_(values[name])


def _anchor_config(sft: BackboneConfig, config: GrpoConfig) -> BackboneConfig:
    return msgspec.structs.replace(
        sft,
        train_text_encoder=False,
        lora=None,
        frozen_chunks=config.frozen_chunks,
        checkpoint_activations=config.checkpoint_activations,
        step_rows=config.anchor_rows,
        micro_rows=min(sft.micro_rows, config.anchor_rows),
        step_sequences=1,
    )
