"""Precisions of a bundle: which dtype every weight and every operator has.

| precision | weights of the world model's linears   | everything else            | runs on                          |
|-----------|----------------------------------------|----------------------------|----------------------------------|
| fp32      | float32                                | float32                    | everything                       |
| fp16      | float16                                | compute dtype              | everything                       |
| bf16      | bfloat16                               | compute dtype              | GPUs from compute capability 8.0 |
| int8      | int8 per output channel; activations   | compute dtype              | everything                       |
|           | int8 with calibrated ranges            |                            |                                  |
| int4      | int4 in blocks along the input; weight | compute dtype              | everything                       |
|           | only                                   |                            |                                  |
| fp8       | e4m3 per output channel; activations   | compute dtype              | GPUs from compute capability 8.9 |
|           | e4m3 with calibrated ranges            |                            |                                  |

Whatever the precision, these stay float32: the norms (those of T5 and of the action heads compute in float32 and keep
their weights in the compute dtype), both bit heads, guidance and sampling, the summed codes and
their resizes, the embeddings of latents and text, the VAE's projections, the last layer of the action heads, and T5's
output projections (their activations leave the range of float16).
Source: spec/world_model.md 2.6; spec/action_decoder.md 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8")
COMPUTE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INT4_METHODS = ("awq", "rtn")
CALIBRATED = ("int8", "fp8")
"""Precisions that need the ranges of activations."""

_ALWAYS_FP32 = (
    "vae.proj_",
    "vae.scale_learnable_parameters",
    "latent_head.tsformer.norm.",
    "latent_head.tsformer.head.",
    "rgb_head.tsformer.norm.",
    "rgb_head.tsformer.head.",
)
_BLOCKS = "world_model.block"  # `blocks.` or `block_chunks.`


class PrecisionError(ValueError):
    """A precision that does not exist, or that does not go with the other options."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What a bundle is stored and computed in.

    Args:
        name: one of `PRECISIONS`.
        compute: dtype of activations and of all weights that are not quantised: fp32, fp16 or bf16. By default that of
            `name`, and fp16 for the quantised ones.
        block: int4 weights that share a scale, along the input axis.
        int4_method: `awq` scales input channels by calibrated activations first; `rtn` only rounds to nearest.

    Raises:
        PrecisionError: unknown or contradictory values.
    """

    name: str
    compute: str = ""
    block: int = 64
    int4_method: str = "awq"

    def __post_init__(self) -> None:
        if self.name not in PRECISIONS:
            raise PrecisionError(f"unknown precision {self.name!r}; choose one of {', '.join(PRECISIONS)}")
        floating = self.name in COMPUTE_DTYPES
        if not self.compute:
            object.__setattr__(self, "compute", self.name if floating else "fp16")
        if self.compute not in COMPUTE_DTYPES or (floating and self.compute != self.name):
            allowed = self.name if floating else ", ".join(COMPUTE_DTYPES)
            raise PrecisionError(f"precision {self.name} cannot compute in {self.compute!r}; choose {allowed}")
        if self.block not in (32, 64, 128):
            raise PrecisionError(f"int4 blocks hold 32, 64 or 128 weights, found {self.block}")
        if self.int4_method not in INT4_METHODS:
            raise PrecisionError(f"unknown int4 method {self.int4_method!r}; choose {' or '.join(INT4_METHODS)}")

    @property
    def needs_calibration(self) -> bool:
        return self.name in CALIBRATED or (self.name == "int4" and self.int4_method == "awq")

    @property
    def quantises(self) -> bool:
        return self.name not in COMPUTE_DTYPES

    def dtype_of(self, key: str) -> torch.dtype:
        """Dtype in which a checkpoint tensor is computed with; quantised weights come out in it."""
        if self.compute == "fp32" or key.startswith(_ALWAYS_FP32):
            return torch.float32
        if key.startswith("world_model.") and not key.startswith(_BLOCKS):
            return torch.float32
        if key.startswith(("world_model.", "vae.")) and "norm" in key.split(".")[-2]:
            return torch.float32
        if key.startswith("text_encoder.") and key.endswith(".wo.weight"):
            return torch.float32
        return COMPUTE_DTYPES[self.compute]

    def quantised(self, key: str) -> bool:
        """Is this the weight of a linear that `name` quantises?"""
        return self.quantises and key.startswith(_BLOCKS) and key.endswith("_proj.weight")
