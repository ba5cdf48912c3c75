"""Ranks: one process, or those that `torchrun` started, on GPUs or on CPUs.

Networks with `shard_units` are sharded by FSDP2; the others are copied to every rank, and their gradients are summed
once a step (spec/training.md 4.5). What ranks have to agree on every step travels as one small record.
Source: spec/training.md 2.7 (sharding, precision).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


class RanksError(ValueError):
    """Processes, devices or micro-batches that do not fit each other."""


class DeviceError(ValueError):
    """The device that was asked for is not here."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, record: Any) -> list[Any]:
        """The records of all ranks, in order, on every rank."""
        if self.count == 1:
            return [record]
        records: list[Any] = [None] * self.count
        dist.all_gather_object(records, record)
        return records

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def started_ranks(device: str) -> Iterator[Ranks]:
    """Join the other processes of `torchrun`; without it, a run of one process.

    Args:
        device: "cpu" or "cuda"; with `torchrun`, every process of a machine takes a GPU of its own.

    Raises:
        DeviceError: this machine, or this build of PyTorch, has no such device.
        RanksError: more processes than GPUs.
    """
    place = find_device(device)
    if not dist.is_torchelastic_launched():
        yield Ranks(device=place)
        return
    # The names are torchrun's protocol.
    local, local_count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if place.type == "cuda":
        if local_count > torch.cuda.device_count():
            raise RanksError(
                f"torchrun started {local_count} processes on this machine, which has {torch.cuda.device_count()} "
                "GPUs; give --nproc-per-node at most that many"
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    # Ranks fill caches before they train, and the slowest may take long over its part.
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        ranks = Ranks(rank=dist.get_rank(), count=dist.get_world_size(), device=place)
        yield ranks
        ranks.wait()  # a rank that leaves early closes connections that the others may still read from
    finally:
        dist.destroy_process_group()


def find_device(name: str) -> torch.device:
    """The device called `name`. Raises DeviceError unless tensors can be put there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        reason = str(error).strip().splitlines()[0]
        raise DeviceError(f"no device {name!r} for training here ({reason}); give --device cpu") from error
    return device


def shard(root: nn.Module, units: Sequence[nn.Module], ranks: Ranks, *, bf16: bool) -> None:
    """Shard the parameters of `root` over the ranks: every unit alone, the rest together.

    Units are gathered in bf16 where they compute in it. The rest stays fp32: heads and the text projection compute in
    fp32 (spec/training.md 2.7). Inputs are not cast, because rotation tables are fp32 everywhere.

    The values are those of the first rank. On the others, parameters may lie on the meta device: one machine need not
    hold a large network once for every GPU.
    """
    whole = root.state_dict() if ranks.is_first else {}
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for module in root.modules():
        if any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module.to_empty(device=ranks.device, recurse=False)
    set_model_state_dict(root, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def copy_from_first(network: nn.Module, ranks: Ranks) -> None:
    """Give every rank the weights of rank 0."""
    if ranks.count > 1:
        for tensor in (*network.parameters(), *network.buffers()):
            dist.broadcast(tensor.detach(), 0)


def sum_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Sum the gradients of copied parameters over the ranks; those that no rank has stay None, as in one process."""
    if ranks.count == 1:
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=ranks.device)
    dist.all_reduce(present)
    used = [p for p, count in zip(parameters, present.tolist(), strict=True) if count]
    if not used:
        return
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients: list[Tensor] = [p.grad for p in used if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def share_out(micro_batches: int, ranks: Ranks) -> list[tuple[int, bool]]:
    """Which micro-batches of a step this rank runs, and whether each counts.

    Every rank runs as many, because sharded networks are gathered together; what is run only for that does not count.
    """
    rounds = -(-micro_batches // ranks.count)
    places = [ranks.rank + turn * ranks.count for turn in range(rounds)]
    return [(place, True) if place < micro_batches else (0, False) for place in places]


def check_share(largest_step: int, ranks: Ranks) -> None:
    """Raise RanksError where some rank would never have anything to do."""
    if ranks.count > largest_step:
        raise RanksError(
            f"{ranks.count} processes share steps of at most {largest_step} micro-batches; start at most "
            f"{largest_step} processes, or make the micro-batches smaller or the steps larger"
        )
