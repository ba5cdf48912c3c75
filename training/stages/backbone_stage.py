"""Stage `sft`: the world model, and a small preset's text encoder, learn the bits of real flights.

Source: spec/training.md 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor, nn

from worldvln_edge.config import ConfigError, ModelConfig
from worldvln_edge.models.attention_mask import visual_tokens
from worldvln_edge.models.text_encoder import TextEncoder
from worldvln_edge.models.world_model import WorldModel
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.training.data.packing import pack_rows
from worldvln_edge.training.stages.backbone_batch import BackboneBatch, BatchMaker, ScaleWeights
from worldvln_edge.training.stages.backbone_network import BackboneNetwork, BatchScores, FrozenTextFeatures
from worldvln_edge.training.stages.backbone_rows import Corruption, LatentFlights, draw_row
from worldvln_edge.training.stages.backbone_validation import validate_backbone
from worldvln_edge.training.stages.lora import LoraConfig, add_adapters, merged_state
from worldvln_edge.training.stages.partial_freeze import freeze_chunks
from worldvln_edge.training.stages.partial_scales import DEFAULT_WEIGHTS, check_weights
from worldvln_edge.training.trainer.stage import MicroBatch, epoch_order, split_steps
from worldvln_edge.world_model_flops import SequenceTokens, training_flops


class BackboneConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the backbone learns from; the defaults are the published values (2.2, 2.3, 2.6)."""

    flip_strength: float | tuple[float, ...] = 0.3
    """Highest probability that a bit of the running sum is flipped, of all scales or one number a scale; 0: none."""
    condition_drop: float = 0.1
    """How often a row is shown the unconditional text."""
    scale_reweight: float = 4.0
    """k of the scale weights; small k lifts the coarse scales, which carry the motion. 0: every token counts alike."""
    scale_weight_limit: float = 40.0
    image_clip_weight: float = 1.0
    """Of the scales of clip 0, which is always observed and never generated in flight."""
    packed_tokens: int | None = None
    """Tokens of a sequence that several rows are packed into (published: 20480). None: every row is a sequence.

    A row that has more visual tokens trains on one part of its scales an epoch.
    """
    partial_scales: dict[str, float] = msgspec.field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    """Parts that such a row is drawn from, and how often; see `partial_scales.partial_scales`."""
    pad_multiple: int = 128
    step_rows: int = 16
    """Rows of an optimiser step, where rows are not packed."""
    micro_rows: int = 16
    """Rows that go through the networks together, where rows are not packed."""
    step_sequences: int = 8
    """Packed sequences of an optimiser step; each is a micro-batch."""
    checkpoint_activations: bool = False
    """Recompute every block in the backward pass."""
    train_text_encoder: bool = True
    """False, and with `lora` or `frozen_chunks`: it is frozen, and features are kept for `kept_prompts` prompts."""
    kept_prompts: int = 4096
    frozen_chunks: int = 0
    """First chunks of blocks that stay as they are, with everything else but the later chunks, norm and heads."""
    lora: LoraConfig | None = None
    """Train adapters only."""
    held_out_rows: int = 128
    """Most rows of a validation, each of which runs whole and twice; 0: none."""

    @property
    def trains_text(self) -> bool:
        """Whether the text encoder really learns: adapters and frozen chunks leave it as it is."""
        return self.train_text_encoder and self.lora is None and self.frozen_chunks == 0

    def __post_init__(self) -> None:
        strengths = self.flip_strength if isinstance(self.flip_strength, tuple) else (self.flip_strength,)
        for name, values in (("flip_strength", strengths), ("condition_drop", (self.condition_drop,))):
            if not values or not all(0 <= value <= 1 for value in values):
                raise ConfigError(f"sft.{name} is a probability, found {getattr(self, name)}")
        for name in ("scale_reweight", "image_clip_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"sft.{name} must be finite and >= 0, found {getattr(self, name)}")
        if not 1 <= self.scale_weight_limit < float("inf"):
            raise ConfigError(f"sft.scale_weight_limit must be finite and >= 1, found {self.scale_weight_limit}")
        for name in ("pad_multiple", "step_rows", "micro_rows", "step_sequences", "kept_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sft.{name} must be >= 1, found {getattr(self, name)}")
        if self.held_out_rows < 0:
            raise ConfigError(f"sft.held_out_rows must be >= 0, found {self.held_out_rows}")
        if self.packed_tokens is not None and self.packed_tokens < 1:
            raise ConfigError(f"sft.packed_tokens must be >= 1, found {self.packed_tokens}")
        if self.lora is not None and self.frozen_chunks:
            raise ConfigError("sft: lora trains adapters only, so frozen_chunks must be 0 beside it")
        check_weights(self.partial_scales)


class BackboneStage:
    """See `trainer.stage.Stage`.

    Args:
        config: what the backbone learns from.
        model_config: preset.
        world_model: trained in place; loaded weights stay.
        text_encoder: trained in place, or frozen (`config.trains_text`).
        tokenizer: of prompts.
        flights: training rows.
        held_out: rows of `validate`, of which the first `config.held_out_rows` are used; None: it returns nothing.
        seed: of all draws.

    Raises:
        ConfigError: adapters or frozen chunks that the world model does not have.
        BackboneDataError: a held-out flight without an instruction.
    """

    name = "sft"

    def __init__(
        self,
        config: BackboneConfig,
        model_config: ModelConfig,
        world_model: WorldModel,
        text_encoder: TextEncoder,
        tokenizer: PromptTokenizer,
        flights: LatentFlights,
        held_out: LatentFlights | None = None,
        *,
        seed: int = 0,
    ):
        self.config, self._model_config, self._seed = config, model_config, seed
        self.coefficients: Mapping[str, float] = {"loss": 1.0}
        freeze_chunks(world_model, config.frozen_chunks)
        if config.lora is not None:
            add_adapters(world_model, config.lora, seed=seed)
        self.network: nn.Module = BackboneNetwork(
            world_model,
            text_encoder if config.trains_text else None,
            checkpoint_activations=config.checkpoint_activations,
        )
        self._world_model = world_model
        self._frozen_text = None if config.trains_text else FrozenTextFeatures(text_encoder, kept=config.kept_prompts)
        weights = ScaleWeights(
            reweight=config.scale_reweight, limit=config.scale_weight_limit, image_clip=config.image_clip_weight
        )
        self._maker = BatchMaker(model_config, flights, tokenizer, weights, pad_multiple=config.pad_multiple)
        self._held_out = None
        if held_out is not None and len(held_out) and config.held_out_rows:
            self._held_out = BatchMaker(model_config, held_out, tokenizer, weights, pad_multiple=config.pad_multiple)
            for row in self._validated():  # an instruction that is empty is refused now, not in the middle of a run
                self._held_out.prompt(row, held_out.instruction(row))
        self._corruption = Corruption(
            flip_strength=config.flip_strength,
            condition_drop=config.condition_drop,
            partial_scales=config.partial_scales,
            longest_row=config.packed_tokens,
        )
        self._lengths: list[int] | None = None

    def plan(self, epoch: int) -> list[list[list[int]]]:
        """See `Stage.plan`. Packed: a micro-batch is a sequence; else it is up to `micro_rows` rows side by side."""
        config, rows = self.config, len(self._maker.flights)
        if config.packed_tokens is None:
            order = epoch_order(self._seed, epoch, rows)
            return split_steps(order, step_rows=config.step_rows, micro_rows=config.micro_rows)
        packs = pack_rows(self._row_lengths(), budget=config.packed_tokens, seed=self._seed, epoch=epoch)
        return [packs[at : at + config.step_sequences] for at in range(0, len(packs), config.step_sequences)]

    def row_name(self, row: int) -> str:
        """See `Stage`."""
        return self._maker.flights.name(row)

    def load(self, epoch: int, rows: MicroBatch) -> BackboneBatch:
        """See `Stage.load`.

        Raises:
            BackboneDataError: a row that cannot be trained on.
        """
        maker = self._maker
        draws = [
            draw_row(maker.flights, row, maker.schedule(row), self._corruption, seed=self._seed, epoch=epoch)
            for row in rows
        ]
        return maker.make(rows, draws, is_packed=self.config.packed_tokens is not None)

    def weights(self, batch: BackboneBatch) -> dict[str, float]:
        """See `Stage.weights`.

        `loss` is what is minimised; `bit_ce` and `bit_accuracy` are means over tokens, `bit_ce_clip1_scale0` and so on
        those of one (clip, scale); `padding` is the share of the sequences that holds nothing.
        """
        tokens = float(sum(len(head.place_N) for head in (batch.semantic, batch.detail)))
        loss = sum(float(head.weight_N.double().sum()) for head in (batch.semantic, batch.detail))
        found = {"loss": loss, "bit_ce": tokens, "bit_accuracy": tokens, "padding": float(batch.all_tokens)}
        for head in (batch.semantic, batch.detail):
            groups, counts = torch.unique(head.group_N, return_counts=True)
            for group, count in zip(groups.tolist(), counts.tolist(), strict=True):
                found |= dict.fromkeys(self._group_terms(group), float(count))
        return found

    def totals(self, batch: BackboneBatch) -> dict[str, Tensor]:
        """See `Stage.totals`."""
        scores = self._scores(batch)
        device = scores.semantic.losses_N.device
        loss, bit_ce, accuracy = (torch.zeros((), device=device) for _ in range(3))
        found = {"padding": torch.tensor(float(batch.all_tokens - batch.used_tokens))}
        for head, score in ((batch.semantic, scores.semantic), (batch.detail, scores.detail)):
            loss = loss + (head.weight_N.to(device) * score.losses_N).sum()
            losses, accuracies = score.losses_N.detach(), score.accuracies_N
            bit_ce, accuracy = bit_ce + losses.sum(), accuracy + accuracies.sum()
            groups, member_N = torch.unique(head.group_N, return_inverse=True)
            sums = torch.zeros(2, len(groups), device=device)
            sums.index_add_(1, member_N.to(device), torch.stack((losses, accuracies)))
            for group, group_sums in zip(groups.tolist(), sums.unbind(1), strict=True):
                found |= zip(self._group_terms(group), group_sums, strict=True)
        return {"loss": loss, "bit_ce": bit_ce, "bit_accuracy": accuracy, **found}

    def validate(self) -> dict[str, float]:
        """See `Stage.validate` and `backbone_validation.validate_backbone`."""
        if self._held_out is None:
            return {}
        rows_together = 1 if self.config.packed_tokens is not None else self.config.micro_rows
        return validate_backbone(
            self._held_out, self._scores, self._validated(), rows_together=rows_together, seed=self._seed
        )

    def shard_units(self) -> list[nn.Module]:
        """See `Stage`: every block."""
        return list(self._world_model.iterate_blocks())

    def tokens(self, batch: BackboneBatch) -> int:
        """Tokens of a batch, padding left out."""
        return batch.used_tokens

    def flops(self, batch: BackboneBatch) -> int:
        """FLOP of forward and backward, padding and checkpointing left out, as MFU counts them."""
        model = self._model_config.world_model
        tokens = SequenceTokens(
            semantic=len(batch.semantic.place_N),
            detail=len(batch.detail.place_N),
            text=sum(batch.text_lengths),
            pairs=batch.mask.visible_pairs(),
        )
        frozen_blocks = self.config.frozen_chunks * (model.depth // model.block_chunks)
        return training_flops(
            model, tokens, frozen_blocks=frozen_blocks, has_frozen_weights=self.config.lora is not None
        )

    def exported_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of `network` with adapters merged: keys `world_model.` and, if trained, `text_encoder.`."""
        return merged_state(state)

    def _scores(self, batch: BackboneBatch) -> BatchScores:
        device = next(self.network.parameters()).device
        features = None if self._frozen_text is None else self._frozen_text(batch.prompts(), device)
        return self.network(batch.to(device), features)

    def _validated(self) -> range:
        """Held-out rows that are looked at."""
        return range(0 if self._held_out is None else min(len(self._held_out.flights), self.config.held_out_rows))

    def _group_terms(self, group: int) -> tuple[str, str]:
        clip, scale = divmod(group, self._model_config.schedule.scales_per_clip)
        return f"bit_ce_clip{clip}_scale{scale}", f"bit_accuracy_clip{clip}_scale{scale}"

    def _row_lengths(self) -> list[int]:
        """Tokens of every row with its first caption; drawn captions may differ by a few."""
        if self._lengths is None:
            maker = self._maker
            self._lengths = [
                visual_tokens(maker.schedule(row)) + len(maker.prompt(row, maker.flights.instruction(row)))
                for row in range(len(maker.flights))
            ]
        return self._lengths
