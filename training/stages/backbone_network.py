"""The networks of the backbone as one module: a batch in, loss and accuracy of every token out.

One module, because a sharded network gathers its parameters when it is called.
Legend: B sequences, V visual tokens, X text tokens, R rows, N tokens of one head, Ct text channels.
Source: spec/training.md 2.3 (condition drop), 2.6 (heads and loss), 2.7 (precision).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from worldvln_edge.models.block_attention import can_attend_in_blocks
from worldvln_edge.models.precision import without_autocast
from worldvln_edge.models.text_encoder import TextEncoder
from worldvln_edge.models.world_model import WorldModel
from worldvln_edge.training.stages.backbone_batch import BackboneBatch, HeadTargets
from worldvln_edge.training.stages.bit_loss import token_accuracies, token_losses


class TokenScores(NamedTuple):
    """Of the tokens of one head, as in its `HeadTargets`."""

    losses_N: Tensor
    """float32, mean over a token's bits."""
    accuracies_N: Tensor
    """float32, without a gradient."""


class BatchScores(NamedTuple):
    semantic: TokenScores
    detail: TokenScores


def drop_conditions(features_RXt: Tensor, cfg_uncond: Tensor, dropped_R: Tensor) -> Tensor:
    """Replace the text of some rows by the unconditional rows; the input is left as it is."""
    uncond = cfg_uncond[: features_RXt.shape[1]].expand_as(features_RXt)
    return torch.where(dropped_R[:, None, None], uncond, features_RXt)


class BackboneNetwork(nn.Module):
    """World model and, where it is trained too, text encoder; keys are those of the checkpoint folder.

    Args:
        world_model: trained.
        text_encoder: trained; None where features come from outside.
        checkpoint_activations: recompute every block in the backward pass.
    """

    def __init__(self, world_model: WorldModel, text_encoder: TextEncoder | None, *, checkpoint_activations: bool):
        super().__init__()
        self.text_encoder = text_encoder
        self.world_model = world_model
        self._checkpoint_activations = checkpoint_activations

    def forward(self, batch: BackboneBatch, features_RXt: Tensor | None = None) -> BatchScores:
        """Scores of all bits of a batch.

        Args:
            batch: on the device of the networks.
            features_RXt: text features of every row; None: the text encoder computes them.
        """
        model = self.world_model
        if features_RXt is None:
            assert self.text_encoder is not None
            lengths = torch.tensor(batch.text_lengths, device=batch.device)
            is_token = torch.arange(batch.ids_RX.shape[1], device=batch.device) < lengths[:, None]
            features_RXt = self.text_encoder(batch.ids_RX, is_token.long())
        features_RXt = drop_conditions(features_RXt, model.cfg_uncond, batch.unconditional_R)
        text_BXt = features_RXt.flatten(0, 1)[batch.text_place_BX]
        in_blocks = can_attend_in_blocks(batch.device, model.config.head_dim)
        hidden_BVC = model.forward_training(
            batch.latents_BVC,
            text_BXt,
            batch.rope_B2Ln,
            batch.mask.blocks() if in_blocks else batch.mask.dense(),
            checkpoint_activations=self._checkpoint_activations and torch.is_grad_enabled(),
        )
        hidden = hidden_BVC.flatten(0, 1)
        return BatchScores(
            semantic=self._scores(hidden, batch.semantic, is_semantic=True),
            detail=self._scores(hidden, batch.detail, is_semantic=False),
        )

    def _scores(self, hidden_TC: Tensor, targets: HeadTargets, *, is_semantic: bool) -> TokenScores:
        logits = self.world_model.logits(hidden_TC[targets.place_N], is_semantic)
        return TokenScores(
            losses_N=token_losses(logits, targets.bits_Nd),
            accuracies_N=token_accuracies(logits.detach(), targets.bits_Nd),
        )


class FrozenTextFeatures:
    """Features of prompts from a text encoder that is not trained, each computed once.

    The encoder is no part of the trained network: it is in no checkpoint, and every rank holds all of it.

    Args:
        encoder: frozen here, and put into eval mode.
        kept: prompts whose features are kept, the latest used ones.
    """

    def __init__(self, encoder: TextEncoder, *, kept: int):
        self._encoder = encoder.requires_grad_(False).eval()
        self._kept = kept
        self._features: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, prompts: list[tuple[int, ...]], device: torch.device) -> Tensor:
        """float32 [R, X, Ct] on `device`, zero behind a prompt's end."""
        return nn.utils.rnn.pad_sequence([self._of(ids).to(device) for ids in prompts], batch_first=True)

    def _of(self, ids: tuple[int, ...]) -> Tensor:
        features = self._features.get(ids)
        if features is None:
            place = next(self._encoder.parameters()).device
            # Alone, so that a prompt's features do not depend on its neighbours; on the CPU, where there is room.
            tokens = torch.tensor([ids], device=place)
            with without_autocast(tokens):  # its precision is that of its weights, as served
                features = self._encoder(tokens)[0].cpu()
            self._features[ids] = features
            if len(self._features) > self._kept:
                self._features.popitem(last=False)
        self._features.move_to_end(ids)
        return features
