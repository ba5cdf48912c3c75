"""Log-probabilities of flown bits, teacher-forced: one function for the policies that flew, learn and are stayed near.

Legend: B samples (a segment of a flight each), N most bits of a sample, R sequences, M tokens of one head, d bits of a
token, X text tokens, Ct text channels.
Source: spec/training.md 5.4, 5.9 item 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from worldvln_edge.config import ModelConfig
from worldvln_edge.models.block_attention import can_attend_in_blocks
from worldvln_edge.models.world_model import WorldModel
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.training.grpo.policy_batch import (
    PolicyBatch,
    PolicyBatchMaker,
    Prompt,
    Sample,
    ScoringError,
    flight_by_flight,
)
from worldvln_edge.training.grpo.rewards import flight_name
from worldvln_edge.training.grpo.trace import FlightTrace

TextFeatures = Callable[[list[Prompt], torch.device], Tensor]
"""(token ids of prompts, device) -> features [prompts, X, Ct]; see `backbone_network.FrozenTextFeatures`."""


def bit_log_probs(
    model: WorldModel, batch: PolicyBatch, features_RXt: Tensor, *, checkpoint_activations: bool = False
) -> Tensor:
    """Log-probability of every flown bit of a batch: float32 [B, N], 0 where `is_bit_BN` is False.

    Guidance off, temperature 1, text never dropped (5.4).

    Args:
        model: its device is that of the other tensors.
        batch: as `PolicyBatchMaker` lays it out.
        features_RXt: text features of every sequence.
        checkpoint_activations: recompute every block in the backward pass.
    """
    in_blocks = can_attend_in_blocks(batch.latents_RVC.device, model.config.head_dim)
    hidden = model.forward_training(
        batch.latents_RVC,
        features_RXt,
        batch.rope_R2Ln,
        batch.mask.blocks() if in_blocks else batch.mask.dense(),
        checkpoint_activations=checkpoint_activations and torch.is_grad_enabled(),
    ).flatten(0, 1)
    found = torch.zeros(batch.is_bit_BN.numel(), device=hidden.device)
    for tokens, is_semantic in ((batch.semantic, True), (batch.detail, False)):
        if not len(tokens.place_M):
            continue
        logits_Md2 = model.logits(hidden[tokens.place_M], is_semantic)
        towards_one = logits_Md2[..., 1] - logits_Md2[..., 0]
        log_probs_Md = F.logsigmoid(torch.where(tokens.bits_Md.bool(), towards_one, -towards_one))
        places = tokens.start_M[:, None] + torch.arange(tokens.bits_Md.shape[1], device=hidden.device)
        found = found.index_put((places.flatten(),), log_probs_Md.float().flatten())
    return found.view(batch.is_bit_BN.shape)


@torch.no_grad()
def score_samples(
    model: WorldModel,
    maker: PolicyBatchMaker,
    text: TextFeatures,
    samples: Sequence[Sample],
    *,
    together: int,
) -> list[Tensor]:
    """Log-probabilities of the flown bits of each sample, `together` samples at a time: float32 [bits] on the CPU.

    The bits are those of `SegmentTrace.log_probs`, flattened and one step behind the other.

    Raises:
        ScoringError: see `PolicyBatchMaker.make`.
    """
    device = next(model.parameters()).device
    order = [index for flight in flight_by_flight(samples) for index in flight]
    found: dict[int, Tensor] = {}
    for first in range(0, len(order), together):
        chosen = order[first : first + together]
        batch = maker.make([samples[index] for index in chosen]).to(device)
        log_probs = bit_log_probs(model, batch, text(list(batch.prompts), device))
        for index, row, is_bit in zip(chosen, log_probs, batch.is_bit_BN, strict=True):
            found[index] = row[is_bit].cpu()
    return [found[index] for index in range(len(samples))]


def segment_log_probs(
    model: WorldModel,
    config: ModelConfig,
    tokenizer: PromptTokenizer,
    text: TextFeatures,
    traces: Sequence[FlightTrace],
    segment: int,
    *,
    together: int = 16,
) -> list[tuple[Tensor, ...]]:
    """Log-probabilities of one segment of some flights, in the shapes of their `SegmentTrace.log_probs`.

    Raises:
        ScoringError: see `PolicyBatchMaker.make`.
    """
    maker = PolicyBatchMaker(config, tokenizer)
    scores = score_samples(model, maker, text, [(trace, segment) for trace in traces], together=together)
    return [
        tuple(
            part.view(like.shape)
            for part, like in zip(
                flat.split([one.numel() for one in trace.segments[segment].log_probs]),
                trace.segments[segment].log_probs,
                strict=True,
            )
        )
        for flat, trace in zip(scores, traces, strict=True)
    ]


def flown_log_probs(trace: FlightTrace, segment: int) -> Tensor:
    """What the trace recorded, flattened like `score_samples`: float32 [bits]."""
    return torch.cat([one.flatten() for one in trace.segments[segment].log_probs])


def check_drift(samples: Sequence[Sample], scores: Sequence[Tensor], *, limit: float) -> float:
    """The largest difference of a bit's log-probability between flight and scoring (5.9 item 3).

    Raises:
        ScoringError: it is above `limit`; names the flight.
    """
    drifts = [
        float((scored - flown_log_probs(*sample)).abs().max()) for sample, scored in zip(samples, scores, strict=True)
    ]
    worst = max(range(len(drifts)), key=lambda index: (math.isnan(drifts[index]), drifts[index]), default=None)
    largest = 0.0 if worst is None else drifts[worst]
    if worst is None or largest <= limit:
        return largest
    trace, segment = samples[worst]
    raise ScoringError(
        f"{flight_name(trace)}, segment {segment}: a bit's log-probability differs by {largest:.2g} between flight and "
        f"scoring, more than {limit:.2g}: flight and trainer do not run the same policy. Fly with the trainer's "
        "checkpoint and precision, or raise grpo.drift_limit if it is rounding"
    )
