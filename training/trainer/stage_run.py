"""A stage on its ranks: network copied or sharded, optimiser, averaged weights, and one optimiser step of them.

Source: spec/training.md 2.6 (denominators), 2.7, 4.5 (gradients summed once a step).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from worldvln_edge.config import ConfigError
from worldvln_edge.training.trainer.distributed import Ranks, copy_from_first, shard, sum_gradients
from worldvln_edge.training.trainer.ema import MovingAverage
from worldvln_edge.training.trainer.loading import LoadedStep, Share
from worldvln_edge.training.trainer.optimiser import OptimiserConfig, build_optimiser, find_matrices, set_rate
from worldvln_edge.training.trainer.stage import (
    Stage,
    batch_flops,
    batch_tokens,
    parameter_groups,
    shard_units,
    start_epoch,
)
from worldvln_edge.training.trainer.stop_signal import StopSignal


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step did, the same on every rank."""

    terms: Mapping[str, float]
    """`loss` (what is minimised), every term of the stage, and `grad_norm` before clipping."""
    is_finite: bool
    """False: loss or gradient were not finite, and nothing moved."""
    bad_rows: list[int]
    """Of the first micro-batch whose terms were not finite."""
    stops: bool
    """Some rank was asked to stop."""
    tokens: int
    flops: int


class _Ran(NamedTuple):
    """What one rank adds to a step."""

    sums: dict[str, float]
    bad_rows: list[int]
    stops: bool
    tokens: int
    flops: int


class _Forward(nn.Module):
    """A stage as one module: sharded parameters are whole inside `forward`, and only there."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.network = stage.network
        self._stage = [stage]  # in a list: a stage may be a module, whose other parts are no children of this one

    def forward(self, batch: Any | None) -> Mapping[str, Any]:
        """Totals of a batch; without one, the metrics of a validation."""
        return self._stage[0].validate() if batch is None else self._stage[0].totals(batch)


class StageRun:
    """See the module.

    Args:
        stage: its network is on the ranks' device; the values of the first rank count.
        config: of the optimiser.
        ranks: the processes.
        bf16: run networks under autocast.
        seed: of what networks draw.
    """

    def __init__(self, stage: Stage, config: OptimiserConfig, ranks: Ranks, *, bf16: bool, seed: int):
        self.stage, self.network, self._config, self._ranks, self._seed = stage, stage.network, config, ranks, seed
        self._bf16 = bf16
        start_epoch(stage, 0)
        self._module = _Forward(stage)
        groups, decaying = parameter_groups(stage), find_matrices(self.network)
        units = shard_units(stage)
        self.is_sharded = ranks.count > 1 and bool(units)
        if self.is_sharded:
            names = {id(p): name for name, p in self.network.named_parameters()}
            shard(self._module, units, ranks, bf16=bf16)
            new = dict(self.network.named_parameters())  # sharding puts new parameters in the places of the old ones
            groups = [replace(group, parameters=[new[names[id(p)]] for p in group.parameters]) for group in groups]
            decaying = frozenset(id(new[names[key]]) for key in decaying)
        else:
            copy_from_first(self.network, ranks)
        self._frozen = self._frozen_names()
        self._parameters = list(self.network.parameters())
        self.optimiser = build_optimiser(groups, decaying, config, fused=ranks.device.type == "cuda")
        self.average = MovingAverage(self.network, config.ema_decay) if config.ema_decay > 0 else None

    def start_epoch(self, epoch: int) -> None:
        """Begin an epoch. Raises ConfigError where a sharded network would freeze or thaw."""
        start_epoch(self.stage, epoch)
        self.network.train()
        if self.is_sharded and self._frozen_names() != self._frozen:
            raise ConfigError(
                f"{self.stage.name}: epoch {epoch} freezes or thaws parameters, which a network that is sharded over "
                "processes cannot; train it with one process, or freeze for the whole run"
            )

    def step(self, loaded: LoadedStep, number: int, total: int, *, stop: StopSignal) -> StepOutcome:
        """One optimiser step.

        Args:
            loaded: this rank's micro-batches.
            number: 0-based, among `total` (for rates).
            stop: asked when the gradients are there.
        """
        pairs = [
            (share, batch)
            for share, batch in zip(loaded.shares, loaded.batches, strict=True)
            if share.counts or self.is_sharded
        ]
        weights: Counter[str] = Counter()
        own: Counter[str] = Counter()
        for share, batch in pairs:
            if share.counts:
                own.update({name: float(weight) for name, weight in self.stage.weights(batch).items()})
        for part in self._ranks.gather(dict(own)):
            weights.update(part)
        self.optimiser.zero_grad(set_to_none=True)
        counted: list[Share] = []
        totals: list[Mapping[str, Tensor]] = []
        tokens = flops = 0
        for share, batch in pairs:
            self._seed_draws(loaded, share.place)
            found = self._backward(batch, weights, counts=share.counts)
            if not share.counts:
                continue
            counted.append(share)
            totals.append(found)
            tokens += batch_tokens(self.stage, batch) or 0
            flops += batch_flops(self.stage, batch) or 0
        if not self.is_sharded:
            sum_gradients(self._parameters, self._ranks)
        *numbers, clipped = _on_host([*totals, {"norm": self._clip(self._config.clip(number, total))}])
        norm = clipped["norm"]
        sums: Counter[str] = Counter()
        bad_rows: list[int] = []
        for share, part in zip(counted, numbers, strict=True):
            sums.update(part)
            if not bad_rows and not all(map(math.isfinite, part.values())):
                bad_rows = list(share.rows)
        everyone = self._ranks.gather(_Ran(dict(sums), bad_rows, stop.requested, tokens, flops))
        terms = self._terms([ran.sums for ran in everyone], weights)
        is_finite = math.isfinite(terms["loss"]) and math.isfinite(norm)
        if is_finite:
            set_rate(self.optimiser, self._config.rate(number, total))
            self.optimiser.step()
            if self.average is not None:
                self.average.update()
        return StepOutcome(
            terms=terms | {"grad_norm": norm},
            is_finite=is_finite,
            bad_rows=next((ran.bad_rows for ran in everyone if ran.bad_rows), []),
            stops=any(ran.stops for ran in everyone),
            tokens=sum(ran.tokens for ran in everyone),
            flops=sum(ran.flops for ran in everyone),
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Metrics of the stage, with averaged weights where there are some: those of the first rank, on every rank."""
        self.network.eval()
        device = self._ranks.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self._autocast(), self.averaged():
            torch.manual_seed(self._seed)
            metrics = dict(self._module(None))
        self.network.train()
        return self._ranks.gather(metrics)[0]  # ranks decide by them together what is the best

    def weights(self) -> dict[str, Tensor]:
        """State dict of the whole network on the CPU, averaged where asked for; empty on other ranks than the first."""
        with self.averaged():
            if self.is_sharded:
                options = StateDictOptions(full_state_dict=True, cpu_offload=True)
                return {
                    str(name): cast("Tensor", t)
                    for name, t in get_model_state_dict(self.network, options=options).items()
                }
            if not self._ranks.is_first:
                return {}
            return {name: tensor.detach().cpu().clone() for name, tensor in self.network.state_dict().items()}

    def averaged(self) -> AbstractContextManager[None]:
        """The averaged weights in the network for the length of a block; without averaging, nothing changes."""
        return nullcontext() if self.average is None else self.average.in_place()

    def _seed_draws(self, loaded: LoadedStep, micro_batch: int) -> None:
        mixed = self._seed
        for number in (loaded.at.epoch, loaded.at.step, micro_batch):
            mixed = mixed * 1_000_003 + number
        torch.manual_seed(mixed % 2**63)

    def _backward(self, batch: Any, weights: Mapping[str, float], *, counts: bool) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch's part of the step's loss; returns its numerators, still on the device."""
        with self._autocast():
            totals = self._module(batch)
        loss = None
        for name, coefficient in self.stage.coefficients.items():
            if name in totals and weights[name] > 0:
                part = totals[name].float() * (coefficient / weights[name])
                loss = part if loss is None else loss + part
        if loss is not None and loss.requires_grad:
            # Sharded gradients are averaged over ranks; what belongs together is their sum.
            factor = self._ranks.count if self.is_sharded else 1
            (loss * (factor if counts else 0)).backward()
        return {name: total.detach() for name, total in totals.items()}

    def _terms(self, sums: list[dict[str, float]], weights: Mapping[str, float]) -> dict[str, float]:
        """Numerators of all ranks over denominators of all ranks, and the loss."""
        added: Counter[str] = Counter()
        for part in sums:
            added.update(part)
        terms = {name: total / weights[name] for name, total in added.items() if weights[name] > 0}
        named = [coefficient * terms[name] for name, coefficient in self.stage.coefficients.items() if name in terms]
        return {"loss": sum(named), **terms}

    def _clip(self, limit: float) -> Tensor:
        """Clip the gradients; returns their norm before that."""
        moving = [p for p in self._parameters if p.requires_grad]
        for parameter in self._parameters:
            if not parameter.requires_grad:
                parameter.grad = None
        norm = nn.utils.clip_grad_norm_(moving, limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _frozen_names(self) -> frozenset[str]:
        return frozenset(name for name, p in self.network.named_parameters() if not p.requires_grad)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._ranks.device.type, torch.bfloat16, enabled=self._bf16)


def _on_host(records: Sequence[Mapping[str, Tensor]]) -> list[dict[str, float]]:
    """Scalars as numbers, all of one device together: the host waits for a GPU once a step."""
    scalars = [scalar.double() for record in records for scalar in record.values()]
    numbers = [0.0] * len(scalars)
    for device in {scalar.device for scalar in scalars}:
        places = [at for at, scalar in enumerate(scalars) if scalar.device == device]
        for at, number in zip(places, torch.stack([scalars[at] for at in places]).tolist(), strict=True):
            numbers[at] = number
    left = iter(numbers)
    return [{name: next(left) for name in record} for record in records]
