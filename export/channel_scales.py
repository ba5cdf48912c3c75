"""Scales per input channel that make a linear easier to quantise, folded into the tensors in front of it.

A linear's columns are multiplied by `s` and its input is divided by it, which changes nothing before rounding. The
division costs no operator: it goes into what makes the input.

| linears           | the division goes into                                                              |
|-------------------|-------------------------------------------------------------------------------------|
| q, k, v           | the weight of `input_layernorm`                                                     |
| gate, up          | the weight of `post_attention_layernorm`                                            |
| down              | rows of `up` (the gate's activation is not linear, but its product with `up` is)    |
| o                 | rows and bias of `v`; query heads that share a value head share their scales        |

Cached values are divided then, too; every graph of a bundle is folded alike, so they fit each other.
A block's scale moves with its row, so dividing rows costs no accuracy.

Legend: N outputs, K inputs.
Source: AWQ (arXiv 2306.00978): s = mean|x|^alpha, alpha by search; here the error is taken from second moments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from worldvln_edge.export.calibration import Calibration, input_key
from worldvln_edge.export.low_bits import block_size, int4_blocks, rows_of, stored_scales
from worldvln_edge.export.planned_tensor import TensorReader

ALPHAS = tuple(step / 10 for step in range(11))
_SAMPLED_ROWS = 1024  # of each weight, in the search
_LIMIT = 64.0  # of a scale: float16 has room for it everywhere
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_NORMS = {"input_layernorm.weight": "attn.q_proj.weight", "post_attention_layernorm.weight": "mlp.gate_proj.weight"}

Search = Callable[[str, Tensor], Tensor]


class ChannelScales:
    """Scales of all linears of a checkpoint, each searched when first asked for.

    Args:
        calibration: moments of the inputs.
        block: int4 block size that is wanted.
        scale_dtype: of the block scales.
    """

    def __init__(self, calibration: Calibration, block: int, scale_dtype: torch.dtype):
        self._calibration = calibration
        self._block, self._scale_dtype = block, scale_dtype
        self._found: dict[str, Tensor] = {}

    def of_inputs(self, key: str, read: TensorReader) -> Tensor:
        """float32 [K]: what the columns of weight `key` are multiplied by."""
        first = input_key(key)
        if first not in self._found:
            self._found[first] = self._search(first, read)
        return self._found[first]

    def of_outputs(self, key: str, read: TensorReader) -> Tensor | None:
        """float32 [N]: what the rows of weight or bias `key` are divided by; None where nothing is."""
        stem, part = _split(key)
        if part == "up_proj":
            return self.of_inputs(f"{stem}down_proj.weight", read)
        if part != "v_proj":
            return None
        scales, head_dim = self.of_inputs(f"{stem}o_proj.weight", read), len(read(f"{stem}k_norm.weight"))
        values = len(read(f"{stem}v_proj.weight"))
        return scales.view(values // head_dim, -1, head_dim)[:, 0].flatten()

    def importance(self, key: str, read: TensorReader) -> Tensor:
        """float32 [K]: mean square of the divided input, hence what a squared weight error costs."""
        scales = self.of_inputs(key, read)
        return self._calibration.of(key, len(scales)).mean_square / scales.square()

    @staticmethod
    def linear_behind(key: str) -> str | None:
        """Key of a linear behind the norm with weight `key`; None where `key` is not such a norm."""
        for norm, linear in _NORMS.items():
            if key.startswith("world_model.block") and key.endswith(norm):
                return key.removesuffix(norm) + linear
        return None

    def _search(self, first: str, read: TensorReader) -> Tensor:
        """The scales with the least error of the outputs of all linears behind one input."""
        stem, part = _split(first)
        names = _QKV if part == "q_proj" else _GATE_UP if part == "gate_proj" else (part,)
        weights = [_sample(read(f"{stem}{name}.weight")) for name in names]
        inputs = weights[0].shape[1]
        found = self._calibration.of(first, inputs)
        mean_abs = found.mean_abs
        if part == "o_proj":
            mean_abs = self._mean_of_groups(stem, mean_abs, read)
        block = block_size(first, inputs, self._block)
        best, best_error = torch.ones(inputs), float("inf")
        for alpha in ALPHAS:
            scales = _power(mean_abs, alpha)
            importance = found.mean_square / scales.square()
            error = sum(self._error(weight, scales, importance, block) for weight in weights)
            if error < best_error:
                best, best_error = scales, error
        return best

    def _error(self, weight_NK: Tensor, scales_K: Tensor, importance_K: Tensor, block: int) -> float:
        scaled = weight_NK * scales_K
        codes, raw = int4_blocks(rows_of(scaled), tuple(scaled.shape), block, self._scale_dtype)
        values = codes.float() * stored_scales(raw, self._scale_dtype).float().repeat_interleave(block, 1)
        return float(((values - scaled).square_() * importance_K).sum())

    def _mean_of_groups(self, stem: str, per_channel_K: Tensor, read: TensorReader) -> Tensor:
        """Channels of query heads that read one value head get their common mean."""
        head_dim, values = len(read(f"{stem}k_norm.weight")), len(read(f"{stem}v_proj.weight"))
        per_head = per_channel_K.view(values // head_dim, -1, head_dim)
        return per_head.mean(1, keepdim=True).expand_as(per_head).flatten()


def _split(key: str) -> tuple[str, str]:
    """`...attn.q_proj.weight` -> (`...attn.`, `q_proj`)."""
    stem, part, _ = key.rsplit(".", 2)
    return f"{stem}.", part


def _sample(weight_NK: Tensor) -> Tensor:
    return weight_NK[:: -(-len(weight_NK) // _SAMPLED_ROWS)].float()


def _power(mean_abs_K: Tensor, alpha: float) -> Tensor:
    """mean|x|^alpha, around 1. A channel that is silent counts as very quiet."""
    logarithm = mean_abs_K.clamp_min(1e-6 * float(mean_abs_K.max())).log()
    limit = torch.tensor(_LIMIT).log()
    return ((logarithm - logarithm.mean()) * alpha).clamp(-limit, limit).exp()
