"""Modules without weights, which are given theirs for as long as they compute.

A model that is built on the meta device costs nothing. Its parts are loaded one after the other, so that a pass over
all of them needs the memory of the largest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from worldvln_edge.models.checkpoint_source import CheckpointSource


@contextmanager
def weights_in(
    module: nn.Module, prefix: str, source: CheckpointSource, device: torch.device, *, without: tuple[str, ...] = ()
) -> Iterator[None]:
    """Hold a module's weights, in float32, until the block ends; before and after it is on the meta device.

    Args:
        module: without weights.
        prefix: of its checkpoint keys, with the dot.
        source: the checkpoint.
        device: takes the weights.
        without: what the names (behind `prefix`) of weights begin with that are not loaded.

    Raises:
        CheckpointError: see `CheckpointSource.tensor`.
    """
    names = [name for name in module.state_dict() if not name.startswith(without)]
    # Parameters are put in one by one: the stored dtype's copy is gone before the next is read.
    for name in names:
        tensor = source.tensor(prefix + name).to(device, torch.float32)
        module.load_state_dict({name: tensor}, strict=False, assign=True)
    try:
        yield
    finally:
        module.to("meta")


@contextmanager
def weights_while_called(
    modules: dict[str, nn.Module], source: CheckpointSource, device: torch.device
) -> Iterator[None]:
    """Load each module when it is called and drop its weights when it returns.

    Args:
        modules: by the prefix of their checkpoint keys, with the dot.
        source, device: see `weights_in`.
    """
    with ExitStack() as hooks:
        for prefix, module in modules.items():
            held = ExitStack()

            def load(module: nn.Module, inputs: tuple, prefix: str = prefix, held: ExitStack = held) -> None:
                held.enter_context(weights_in(module, prefix, source, device))

            def drop(module: nn.Module, inputs: tuple, output: object, held: ExitStack = held) -> None:
                held.close()

            hooks.callback(module.register_forward_pre_hook(load).remove)
            hooks.callback(module.register_forward_hook(drop).remove)
            hooks.callback(held.close)  # a call that raised
        yield
