"""Low-rank adapters: fine-tuning for those whose memory holds no optimiser state of the whole model.

An adapted layer computes W x + (alpha / rank) * up(down(x)); W stays as it is. Its own keys are those of the plain
layer, so released weights load before or after; merging adds the product to W and leaves plain keys only.
Source: Hu et al., LoRA (arXiv 2106.09685) 4.1. peft would rename the keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldvln_edge.config import ConfigError

_DOWN, _UP, _SCALE = "lora_down", "lora_up", "lora_scale"


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which layers get an adapter, and how large it is."""

    rank: int = 16
    alpha: float = 32.0
    """The adapter's output counts alpha / rank times."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Last names of the linear layers."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank must be >= 1, found {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"lora.alpha must be finite and > 0, found {self.alpha}")
        if not self.targets:
            raise ConfigError("lora.targets is empty; name at least one layer, such as q_proj")


class LoraLinear(nn.Module):
    """A linear layer with an adapter, which begins as nothing.

    Args:
        linear: its weights are shared, not copied, and frozen.
        config: rank and scale.
        generator: CPU generator of the first values.
    """

    def __init__(self, linear: nn.Linear, config: LoraConfig, generator: torch.Generator):
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        # fp32 whatever the frozen weights are: an optimiser's small steps are lost in bf16.
        dtype, device = torch.float32, linear.weight.device
        down = nn.init.kaiming_uniform_(
            torch.empty(config.rank, linear.in_features, dtype=dtype), a=math.sqrt(5), generator=generator
        )
        self.lora_down = nn.Parameter(down.to(device))
        self.lora_up = nn.Parameter(torch.zeros(linear.out_features, config.rank, dtype=dtype, device=device))
        self.lora_scale: Tensor
        self.register_buffer(_SCALE, torch.tensor(config.alpha / config.rank, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        plain = F.linear(x, self.weight, self.bias)
        small = F.linear(F.linear(x.to(self.lora_down.dtype), self.lora_down), self.lora_up)
        return plain + (self.lora_scale * small).to(plain.dtype)


def add_adapters(model: nn.Module, config: LoraConfig, *, seed: int) -> list[str]:
    """Freeze a model and put adapters on its target layers, in place; returns the names of the adapted layers.

    Args:
        model: its layers of the target names are replaced.
        config: which, and how large.
        seed: of the adapters' first values.

    Raises:
        ConfigError: a target that no linear layer is called.
    """
    model.requires_grad_(False)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in config.targets
    ]
    missing = set(config.targets) - {name.rpartition(".")[2] for name, _ in found}
    if missing:
        names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        raise ConfigError(
            f"lora.targets: no linear layer is called {', '.join(sorted(missing))}; there are "
            f"{', '.join(sorted(names))}"
        )
    generator = torch.Generator().manual_seed(seed)
    for name, module in found:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoraLinear(module, config, generator))
    return [name for name, _ in found]


def merged_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with every adapter added to its layer's weight, and plain keys only; the input stays as it is."""
    merged = {key: tensor for key, tensor in state.items() if key.rpartition(".")[2] not in (_DOWN, _UP, _SCALE)}
    for key, up in state.items():
        if key.rpartition(".")[2] == _UP:
            layer = key.removesuffix(_UP)
            weight = merged[f"{layer}weight"]
            change = state[f"{layer}{_SCALE}"].float() * (up.float() @ state[f"{layer}{_DOWN}"].float())
            merged[f"{layer}weight"] = (weight.float() + change).to(weight.dtype)
    return merged
