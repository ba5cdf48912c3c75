"""GRPO as a stage of the trainer: samples of a collection and, beside them, batches of the SFT stage.

One epoch is one pass over a collection. Rows of a micro-batch are samples, or, counted downwards from -1, recorded
flights of the SFT stage.
Source: spec/training.md 5.9 items 7 and 8, 5.7 (partial freeze).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worldvln_edge.config import ModelConfig
from worldvln_edge.models.world_model import WorldModel
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.training.grpo.grpo_config import GrpoConfig
from worldvln_edge.training.grpo.objective import sample_losses
from worldvln_edge.training.grpo.policy_batch import PolicyBatch, PolicyBatchMaker, flight_by_flight
from worldvln_edge.training.grpo.scored_collection import ScoredCollection
from worldvln_edge.training.grpo.scoring import TextFeatures, bit_log_probs
from worldvln_edge.training.stages.backbone_batch import BackboneBatch
from worldvln_edge.training.stages.backbone_stage import BackboneStage
from worldvln_edge.training.stages.partial_freeze import freeze_chunks
from worldvln_edge.training.trainer.stage import MicroBatch, epoch_order, split_steps

MEASURED = ("policy", "divergence", "k3", "clipped", "ratio", "advantage")
"""Terms that are means over the samples of a step."""


@dataclass(frozen=True, kw_only=True)
class GrpoBatch:
    """Samples that go through the network together, on the CPU."""

    policy: PolicyBatch
    old_BN: Tensor
    ref_BN: Tensor
    advantages_B: Tensor


class GrpoStage:
    """See `trainer.stage.Stage`; `use` says which collection is learnt from.

    Args:
        config: of the run.
        model_config: preset.
        world_model: trained in place.
        tokenizer: of prompts.
        text: features of prompts, from a text encoder that is frozen.
        anchor: SFT stage of the same world model; None: no anchor.
        seed: of the order of samples.

    Raises:
        ConfigError: frozen chunks that the world model does not have.
    """

    name = "grpo"

    def __init__(
        self,
        config: GrpoConfig,
        model_config: ModelConfig,
        world_model: WorldModel,
        tokenizer: PromptTokenizer,
        text: TextFeatures,
        anchor: BackboneStage | None,
        *,
        seed: int,
    ):
        freeze_chunks(world_model, config.frozen_chunks)
        self.config, self._seed, self._text, self._anchor = config, seed, text, anchor
        self.maker = PolicyBatchMaker(model_config, tokenizer)
        self._world_model = world_model
        self.network: nn.Module = nn.ModuleDict({"world_model": world_model})
        self.coefficients: Mapping[str, float] = {"policy": 1.0, "divergence": config.objective.beta}
        if anchor is not None:
            self.coefficients = {**self.coefficients, "anchor": config.anchor}
        self._collection: ScoredCollection | None = None

    def use(self, collection: ScoredCollection) -> None:
        """Learn from this collection from now on."""
        self._collection = collection

    @property
    def collection(self) -> ScoredCollection:
        if self._collection is None:
            raise RuntimeError("no collection to learn from; call use(collection) first")
        return self._collection

    def plan(self, epoch: int) -> list[list[list[int]]]:
        """See `Stage.plan`: every sample once, flight by flight, because segments of a flight share what is computed.

        Each step ends with the micro-batches of one SFT step.
        """
        config = self.config
        flights = flight_by_flight(self.collection.samples)
        order = [row for flight in epoch_order(self._seed, epoch, len(flights)) for row in flights[flight]]
        steps = split_steps(order, step_rows=config.step_samples, micro_rows=config.micro_samples)
        if self._anchor is not None:
            anchors = self._anchor.plan(epoch)
            for index, step in enumerate(steps):
                step += [[-1 - row for row in rows] for rows in anchors[index % len(anchors)]]
        return steps

    def load(self, epoch: int, rows: MicroBatch) -> GrpoBatch | BackboneBatch:
        """See `Stage.load`.

        Raises:
            BackboneDataError, ScoringError: a row that cannot be trained on.
        """
        if rows[0] < 0:
            assert self._anchor is not None
            return self._anchor.load(epoch, [-1 - row for row in rows])
        collection, chosen = self.collection, torch.tensor(list(rows))
        batch = self.maker.make([collection.samples[row] for row in rows])
        bits = batch.is_bit_BN.shape[1]
        return GrpoBatch(
            policy=batch,
            old_BN=collection.old_BN[chosen, :bits],
            ref_BN=collection.ref_BN[chosen, :bits],
            advantages_B=collection.advantages[chosen],
        )

    def weights(self, batch: GrpoBatch | BackboneBatch) -> dict[str, float]:
        """See `Stage.weights`: samples, and of the anchor what the SFT loss is divided by."""
        if isinstance(batch, GrpoBatch):
            return dict.fromkeys(MEASURED, float(len(batch.advantages_B)))
        assert self._anchor is not None
        return {"anchor": self._anchor.weights(batch)["loss"]}

    def totals(self, batch: GrpoBatch | BackboneBatch) -> dict[str, Tensor]:
        """See `Stage.totals`."""
        if isinstance(batch, BackboneBatch):
            assert self._anchor is not None
            return {"anchor": self._anchor.totals(batch)["loss"]}
        device = next(self._world_model.parameters()).device
        policy = batch.policy.to(device)
        advantages = batch.advantages_B.to(device)
        new_BN = bit_log_probs(
            self._world_model,
            policy,
            self._text(list(policy.prompts), device),
            checkpoint_activations=self.config.checkpoint_activations,
        )
        losses = sample_losses(
            new_BN,
            batch.old_BN.to(device),
            batch.ref_BN.to(device),
            policy.is_bit_BN,
            advantages,
            self.config.objective,
        )
        values = (losses.policy, losses.divergence, losses.k3, losses.is_clipped, losses.ratio, advantages)
        return {name: value.sum() for name, value in zip(MEASURED, values, strict=True)}

    def validate(self) -> dict[str, float]:
        """See `Stage.validate`: the SFT stage on its held-out flights; empty without an anchor."""
        return {} if self._anchor is None else self._anchor.validate()
