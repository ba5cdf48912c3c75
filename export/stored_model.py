"""The PyTorch model that a bundle stands for: the checkpoint's networks, with weights and inputs rounded as stored.

Held against it, a graph may differ by the rounding of its arithmetic alone, however much its number format costs.

| stored as                | weight of the model                                                         |
|--------------------------|-----------------------------------------------------------------------------|
| cast                     | the checkpoint's, through the stored dtype: not read from the bundle         |
| codes and scales, folded | read from the bundle; `weight_parity` holds them against the checkpoint      |

Legend: N outputs, K inputs of a linear, G blocks along K.
Source: ONNX DequantizeLinear, QuantizeLinear (round half to even, saturating); export/quantise.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from worldvln_edge.bundle import Bundle
from worldvln_edge.export.stored_weights import StoredWeight, StoredWeightError, stored_weights
from worldvln_edge.models.worldvln import WorldVLN

_INT8_RANGE = (-128, 127)


@torch.no_grad()
def hold_stored_weights(model: WorldVLN, bundle: Bundle) -> None:
    """Round the weights of a model as a bundle stores them, in place, one tensor at a time.

    Args:
        model: float32, with the weights of the checkpoint that the bundle was made from.
        bundle: whose weights.

    Raises:
        StoredWeightError: weights of unknown origin, or that do not fit the model.
    """
    parameters = model.state_dict()
    pairs: dict[str, dict[str, StoredWeight]] = defaultdict(dict)
    for weight in stored_weights(bundle):
        parameter = parameters.get(weight.key)
        if parameter is None:
            raise StoredWeightError(f"{weight.key}: the model has no such weight")
        if weight.role in ("codes", "scales"):
            pairs[weight.key][weight.role] = weight
        elif weight.role == "folded":
            _hold(parameter, weight.read().float(), weight.key)
        elif parameter.is_floating_point():
            parameter.copy_(parameter.to(weight.dtype).float())
    for key, pair in pairs.items():
        if set(pair) != {"codes", "scales"}:
            raise StoredWeightError(f"{key} has {' and '.join(pair)} only, codes and scales are needed")
        _hold(parameters[key], _restored(pair["codes"].read(), pair["scales"].read(), key), key)


def _hold(parameter: Tensor, value: Tensor, key: str) -> None:
    if parameter.shape != value.shape:
        raise StoredWeightError(f"{key} is stored as {list(value.shape)}, the model has {list(parameter.shape)}")
    parameter.copy_(value)


def _restored(codes_KN: Tensor, steps: Tensor, key: str) -> Tensor:
    """float32 [N, K]."""
    inputs, outputs = codes_KN.shape
    if steps.numel() % outputs or inputs % (steps.numel() // outputs):
        raise StoredWeightError(f"{key}: scales {list(steps.shape)} do not fit codes {list(codes_KN.shape)}")
    steps_GN = steps.float().reshape(-1, outputs)
    return (codes_KN.float() * steps_GN.repeat_interleave(inputs // len(steps_GN), 0)).t()


def round_inputs(model: WorldVLN, scales: Mapping[str, float]) -> None:
    """From now on round the inputs of linears to int8.

    Args:
        model: its linears get a hook.
        scales: key of a linear's weight -> step between two codes.

    Raises:
        StoredWeightError: a key that is no linear of the model.
    """
    for key, scale in scales.items():
        try:
            linear = model.get_submodule(key.removesuffix(".weight"))
        except AttributeError as error:
            raise StoredWeightError(f"{key}: the model has no such weight") from error
        linear.register_forward_pre_hook(_InputRounding(scale))


class _InputRounding:
    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = inputs[0]
        return ((x.float() / self.scale).round_().clamp_(*_INT8_RANGE).mul_(self.scale).to(x.dtype),)
