"""How well the backbone says the bits of flights it was not trained on, and whether it listens to the instruction.

Rows are shown as they are served: nothing flipped, nothing dropped, the last repetitions.
Source: spec/training.md 2.9 (held-out metrics, majority-bit baseline), 8.4 (lines of `sft`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worldvln_edge.training.stages.backbone_batch import BackboneBatch, BatchMaker, HeadTargets
from worldvln_edge.training.stages.backbone_network import BatchScores, TokenScores
from worldvln_edge.training.stages.backbone_rows import served_row


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The best that one fixed answer per bit can do, for every (clip, scale) and bit of a token."""

    ce: float
    accuracy: float


def majority_baseline(ones_d: Tensor, tokens: int) -> Baseline:
    """Of a group of tokens: always the more frequent value, and its frequency as probability.

    The frequencies are those of the tokens that it is judged by: no fixed answer does better.

    Args:
        ones_d: how many tokens have each bit set.
        tokens: of the group.
    """
    share = ones_d.double() / tokens
    entropy = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share))
    return Baseline(ce=float(entropy.mean()), accuracy=float(torch.maximum(share, 1 - share).mean()))


class _Sums:
    """Tokens of one (clip, scale)."""

    def __init__(self, bits: int):
        self.tokens = 0
        self.loss = self.accuracy = 0.0
        self.ones_d = torch.zeros(bits, dtype=torch.int64)

    def add(self, losses_N: Tensor, accuracies_N: Tensor, bits_Nd: Tensor) -> None:
        self.tokens += len(losses_N)
        self.loss += float(losses_N.double().sum())
        self.accuracy += float(accuracies_N.double().sum())
        self.ones_d += bits_Nd.sum(0)


@torch.no_grad()
def validate_backbone(
    maker: BatchMaker,
    scores_of: Callable[[BackboneBatch], BatchScores],
    rows: Sequence[int],
    *,
    rows_together: int,
    seed: int,
) -> dict[str, float]:
    """Metrics over flights of `maker`.

    Args:
        maker: of the held-out flights.
        scores_of: runs the networks, in eval mode.
        rows: of the flights; at least one.
        rows_together: rows of a batch.
        seed: of whose instruction stands for a row's own in the shuffled run.

    Returns:
        - `loss`: as it is trained, whole flights;
        - `bit_ce`, `bit_accuracy`: mean over tokens; `semantic_bit_ce` and `detail_bit_ce` apart;
        - `majority_bit_ce`, `semantic_majority_bit_ce` and so on: `majority_baseline`, groups weighed by tokens;
        - `bit_ce_clip1_scale0` and so on: of one (clip, scale), beside its baseline;
        - `text_effect`, `text_effect_error`: bit cross entropy of the semantic scales of the video clips with the true
          instruction minus with another flight's, mean over flights and its standard error; below 0: the text helps.
          Missing where no two flights have different instructions, or there is no such scale.
    """
    others = _other_instructions([maker.flights.instruction(row) for row in rows], seed)
    config = maker.config
    per_clip = config.schedule.scales_per_clip
    groups: dict[int, _Sums] = {}
    weighted = weights = 0.0
    effects: list[float] = []
    for first in range(0, len(rows), rows_together):
        part = rows[first : first + rows_together]
        draws = [served_row(maker.flights, row, maker.schedule(row)) for row in part]
        batch = maker.make(part, draws, is_packed=False)
        scores = scores_of(batch)
        for head, score in ((batch.semantic, scores.semantic), (batch.detail, scores.detail)):
            losses, accuracies = score.losses_N.cpu(), score.accuracies_N.cpu()
            weighted += float((head.weight_N.double() * losses.double()).sum())
            weights += float(head.weight_N.double().sum())
            for group in head.group_N.unique().tolist():
                members = head.group_N == group
                sums = groups.setdefault(group, _Sums(head.bits_Nd.shape[1]))
                sums.add(losses[members], accuracies[members], head.bits_Nd[members])
        if others is not None:
            texts = [replace(draw, instruction=others[first + place]) for place, draw in enumerate(draws)]
            shuffled = scores_of(maker.make(part, texts, is_packed=False))
            effects += _row_differences(batch.semantic, scores.semantic, shuffled.semantic, per_clip)
    metrics = {"loss": weighted / weights, **_summary(groups, per_clip, config.schedule.semantic_scales)}
    if effects:
        values = torch.tensor(effects, dtype=torch.float64)
        metrics["text_effect"] = float(values.mean())
        metrics["text_effect_error"] = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.inf
    return metrics


def _summary(groups: dict[int, _Sums], per_clip: int, semantic_scales: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    baselines = {group: majority_baseline(sums.ones_d, sums.tokens) for group, sums in groups.items()}

    def over(chosen: Sequence[int]) -> tuple[float, float, float, float]:
        tokens = sum(groups[g].tokens for g in chosen)
        return (
            sum(groups[g].loss for g in chosen) / tokens,
            sum(groups[g].accuracy for g in chosen) / tokens,
            sum(baselines[g].ce * groups[g].tokens for g in chosen) / tokens,
            sum(baselines[g].accuracy * groups[g].tokens for g in chosen) / tokens,
        )

    def put(prefix: str, suffix: str, chosen: Sequence[int]) -> None:
        if chosen:
            names = ("bit_ce", "bit_accuracy", "majority_bit_ce", "majority_bit_accuracy")
            metrics.update({f"{prefix}{n}{suffix}": v for n, v in zip(names, over(chosen), strict=True)})

    put("", "", list(groups))
    put("semantic_", "", [group for group in groups if group % per_clip < semantic_scales])
    put("detail_", "", [group for group in groups if group % per_clip >= semantic_scales])
    for group in sorted(groups):
        put("", f"_clip{group // per_clip}_scale{group % per_clip}", [group])
    return metrics


def _row_differences(targets: HeadTargets, true: TokenScores, shuffled: TokenScores, per_clip: int) -> list[float]:
    """Mean loss of every row's video clips with its own text minus with the other one."""
    is_video = targets.group_N >= per_clip
    difference = (true.losses_N - shuffled.losses_N).cpu().double()
    rows = targets.row_N[is_video].unique().tolist()
    return [float(difference[is_video & (targets.row_N == row)].mean()) for row in rows]


def _other_instructions(instructions: Sequence[str], seed: int) -> list[str] | None:
    """For every flight, the instruction of another flight that says something else; None if all say the same."""
    if len(set(instructions)) < 2:
        return None
    order = torch.randperm(len(instructions), generator=torch.Generator().manual_seed(seed)).tolist()
    place = {row: at for at, row in enumerate(order)}
    found = []
    for row, own in enumerate(instructions):
        behind = (instructions[order[(place[row] + step) % len(order)]] for step in range(1, len(order)))
        found.append(next(other for other in behind if other != own))
    return found
