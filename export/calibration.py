"""What the activations in front of the quantised linears look like over real frames, and the file that keeps it.

The file is one safetensors file: per input that linears share, three vectors over its channels and two numbers, and a
header that says which model and which frames they were measured on. Linears that read the same input (q, k and v; gate
and up) have the same statistics, stored once.

Legend: K input channels of a linear.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from worldvln_edge.atomic import atomic_file
from worldvln_edge.bundle import CalibrationEntry
from worldvln_edge.config import ModelConfig
from worldvln_edge.export.precision import PrecisionError

FORMAT = 1
_HEADER = "calibration"
_AGAIN = "measure again with `worldvln-edge calibrate`"


class CalibrationError(PrecisionError):
    """A calibration that cannot be measured, read, or used for this model."""


@dataclass(frozen=True, kw_only=True)
class ActivationStatistics:
    """Of one input, over all tokens of all flights.

    Attributes:
        largest: absolute value.
        robust: absolute value that all but one in 10,000 stay below; at most `largest`.
        channel_largest: float32 [K] largest absolute value per channel.
        mean_abs: float32 [K] mean absolute value per channel.
        mean_square: float32 [K] mean square per channel.
    """

    largest: float
    robust: float
    channel_largest: Tensor
    mean_abs: Tensor
    mean_square: Tensor


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int
    model: str
    config_sha256: str
    checkpoint_sha256: str
    source: str
    flights: int
    frames: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Statistics of one checkpoint.

    Attributes:
        description: what was flown, for the manifest.
        sha256: of the file's bytes.
        model: name of its configuration.
        config_sha256: of the configuration.
        checkpoint_sha256: `CheckpointSource.fingerprint()` of the checkpoint.
        inputs: statistics by `input_key`.
        content: the file's bytes.
    """

    description: CalibrationEntry
    sha256: str
    model: str
    config_sha256: str
    checkpoint_sha256: str
    inputs: Mapping[str, ActivationStatistics]
    content: bytes

    @classmethod
    def build(
        cls,
        inputs: Mapping[str, ActivationStatistics],
        *,
        config: ModelConfig,
        checkpoint_sha256: str,
        source: str,
        flights: int,
        frames: int,
    ) -> Calibration:
        """From measured statistics.

        Args:
            inputs: by `input_key`.
            config: of the model.
            checkpoint_sha256: `CheckpointSource.fingerprint()`.
            source: where the frames come from.
            flights, frames: how many were flown.

        Raises:
            CalibrationError: nothing measured, or a number that is not finite.
        """
        if not inputs or flights < 1:
            raise CalibrationError(f"no activations were measured on {source}; give at least one flight")
        header = _Header(
            format=FORMAT,
            model=config.name,
            config_sha256=_config_sha256(config),
            checkpoint_sha256=checkpoint_sha256,
            source=source,
            flights=flights,
            frames=frames,
        )
        tensors = {}
        for key, found in inputs.items():
            tensors[f"{key}|channels"] = torch.stack((found.channel_largest, found.mean_abs, found.mean_square)).float()
            tensors[f"{key}|ranges"] = torch.tensor((found.largest, found.robust), dtype=torch.float32)
        # One entry in the header: several would be stored in no fixed order.
        text = json.dumps(msgspec.to_builtins(header), sort_keys=True)
        return cls.parse(safetensors.torch.save(tensors, metadata={_HEADER: text}), source)

    @classmethod
    def parse(cls, content: bytes, place: str) -> Calibration:
        """From a file's bytes; `place` names them in errors. Raises CalibrationError."""
        try:
            length = int.from_bytes(content[:8], "little")
            metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
            header = msgspec.json.decode(metadata.get(_HEADER, ""), type=_Header)
            tensors = safetensors.torch.load(content)
        except (safetensors.SafetensorError, ValueError, AttributeError, TypeError) as error:
            raise CalibrationError(f"{place} is no calibration file ({error}); {_AGAIN}") from error
        if header.format != FORMAT:
            raise CalibrationError(f"{place} has calibration format {header.format}, this is {FORMAT}; {_AGAIN}")
        digest = hashlib.sha256(content).hexdigest()
        entry = CalibrationEntry(source=header.source, flights=header.flights, frames=header.frames, sha256=digest)
        return cls(
            description=entry,
            sha256=digest,
            model=header.model,
            config_sha256=header.config_sha256,
            checkpoint_sha256=header.checkpoint_sha256,
            inputs=_inputs(tensors, place),
            content=content,
        )

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a file. Whether it is of the checkpoint at hand is for `check_model` to say.

        Raises:
            CalibrationError: no such file, or not a calibration.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise CalibrationError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from error
        return cls.parse(content, str(path))

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        with atomic_file(path) as building:
            building.write_bytes(self.content)

    def check_model(self, config: ModelConfig, checkpoint_sha256: str) -> None:
        """Raise CalibrationError when this was measured on another checkpoint.

        Args:
            config: of the checkpoint.
            checkpoint_sha256: its `CheckpointSource.fingerprint()`.
        """
        if self.config_sha256 != _config_sha256(config):
            raise CalibrationError(
                f"the calibration was measured on {self.model!r}, whose configuration is not that of this "
                f"{config.name!r}; {_AGAIN} on this checkpoint"
            )
        if self.checkpoint_sha256 != checkpoint_sha256:
            raise CalibrationError(
                f"the calibration was measured on checkpoint {self.checkpoint_sha256[:12]}, this one is "
                f"{checkpoint_sha256[:12]}; {_AGAIN} on this checkpoint"
            )

    def of(self, key: str, channels: int) -> ActivationStatistics:
        """Statistics of the input of a linear.

        Args:
            key: checkpoint key of the linear's weight.
            channels: that the weight reads.

        Raises:
            CalibrationError: the calibration does not know the linear, or knows another width.
        """
        found = self.inputs.get(input_key(key))
        if found is None:
            raise CalibrationError(f"the calibration has no statistics of {key}: it is of another model; {_AGAIN}")
        if len(found.mean_abs) != channels:
            raise CalibrationError(
                f"the calibration has {len(found.mean_abs)} channels for {key}, the weight reads {channels}; {_AGAIN}"
            )
        return found


def input_key(key: str) -> str:
    """Key of the linear whose statistics stand for all that read the same input."""
    for shared, first in ((".k_proj.", ".q_proj."), (".v_proj.", ".q_proj."), (".up_proj.", ".gate_proj.")):
        key = key.replace(shared, first)
    return key


def _config_sha256(config: ModelConfig) -> str:
    return hashlib.sha256(config.to_json()).hexdigest()


def _inputs(tensors: Mapping[str, Tensor], place: str) -> dict[str, ActivationStatistics]:
    inputs = {}
    for name in sorted(tensors):
        key, _, kind = name.partition("|")
        if kind != "channels":
            continue
        channels, ranges = tensors[name], tensors.get(f"{key}|ranges")
        if ranges is None or ranges.shape != (2,) or channels.ndim != 2 or len(channels) != 3:
            raise CalibrationError(f"{place}: the statistics of {key} are incomplete; {_AGAIN}")
        both = torch.cat((channels.flatten(), ranges))
        if not torch.isfinite(both).all() or (both < 0).any() or not 0 < float(ranges[1]) <= float(ranges[0]):
            raise CalibrationError(
                f"{place}: the activations in front of {key} were zero, NaN or infinite; look at the checkpoint and "
                "the frames"
            )
        inputs[key] = ActivationStatistics(
            largest=float(ranges[0]),
            robust=float(ranges[1]),
            channel_largest=channels[0],
            mean_abs=channels[1],
            mean_square=channels[2],
        )
    if not inputs:
        raise CalibrationError(f"{place} holds no statistics; {_AGAIN}")
    return inputs
