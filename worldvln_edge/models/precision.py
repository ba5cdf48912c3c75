"""Regions that must stay fp32 although the caller trains under autocast.

Source: spec/world_model.md 2.6 (heads, guidance, summed codes and their resizes are fp32).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Context in which autocast is off on the tensor's device; does nothing (and exports nothing) where it is off."""
    device = tensor.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
