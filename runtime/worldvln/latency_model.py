"""How long a segment takes under every profile on this machine, and which profile fits a deadline.

`worldvln-edge tune` measures it once and keeps it in the bundle's folder `tuned/`, one file a device and number of
threads. In flight the model is corrected by what segments really took, so that a board that throttles chooses less.

Source: spec/session_protocol.md 7.5.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import msgspec

from worldvln_edge.atomic import atomic_file
from worldvln_edge.bundle import Manifest
from worldvln_edge.generation_profile import GenerationProfile

TUNED_FOLDER = "tuned"
_SCHEMA = 1
_MARGIN = 1.05
"""A profile fits when this much more than its predicted time is left."""


class LatencyModelError(ValueError):
    """A file of measured times that is not for this bundle. The message says what to do."""


class ProfileLatency(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one profile."""

    profile: GenerationProfile
    segment_s: tuple[float, ...]
    """95th percentile by segment, from encoded frames to actions, with work done ahead."""


class LatencyModel(msgspec.Struct, frozen=True, kw_only=True):
    """Measured times of one bundle on one device."""

    schema: int
    device: str
    threads: int
    graphs_sha256: str
    """Of the bundle's graphs and weights."""
    profiles: tuple[ProfileLatency, ...]

    def seconds(self, profile: GenerationProfile, segment: int) -> float | None:
        """Predicted time of a segment; None when the profile was not measured as it is now."""
        for entry in self.profiles:
            if entry.profile == profile:
                return entry.segment_s[min(segment, len(entry.segment_s) - 1)]
        return None


class ProfileChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A profile for one segment, and why."""

    profile: GenerationProfile
    reason: str


class DeadlineChooser:
    """Chooses the deepest profile that fits, and learns how far the measured times are off today."""

    def __init__(self, model: LatencyModel, profiles: Mapping[str, GenerationProfile], window: int = 8):
        self._model, self._profiles = model, profiles
        self._ratios: deque[float] = deque(maxlen=window)

    @property
    def correction(self) -> float:
        """Real over measured time of the last segments."""
        return statistics.median(self._ratios) if self._ratios else 1.0

    def seconds(self, profile: GenerationProfile, segment: int) -> float | None:
        """Expected time of a segment now; None when the profile was never measured."""
        measured = self._model.seconds(profile, segment)
        return None if measured is None else measured * self.correction

    def least_seconds(self, ceiling: GenerationProfile, segment: int) -> float | None:
        """Expected time of the quickest profile that may be chosen."""
        return min((expected for _, expected in self._candidates(ceiling, segment)), default=None)

    def choose(self, ceiling: GenerationProfile, segment: int, budget_s: float) -> ProfileChoice:
        """The deepest profile that fits, none deeper than `ceiling`; the quickest one if none does.

        Args:
            ceiling: what is flown without a deadline.
            segment: 0-based.
            budget_s: time left until the actions are due.
        """
        candidates = sorted(self._candidates(ceiling, segment), key=lambda candidate: candidate[1], reverse=True)
        if not candidates:
            return ProfileChoice(
                profile=ceiling, reason=f"{ceiling.name} was not measured here; run worldvln-edge tune"
            )
        left = f"the {budget_s * 1e3:.0f} ms that are left"
        for profile, expected in candidates:
            if expected * _MARGIN <= budget_s:
                return ProfileChoice(profile=profile, reason=f"about {expected * 1e3:.0f} ms of {left}")
        profile, expected = candidates[-1]
        return ProfileChoice(profile=profile, reason=f"nothing fits {left}; about {expected * 1e3:.0f} ms is the least")

    def add(self, profile: GenerationProfile, segment: int, seconds: float) -> None:
        """A segment was flown and took that long."""
        measured = self._model.seconds(profile, segment)
        if measured:
            self._ratios.append(seconds / measured)

    def _candidates(self, ceiling: GenerationProfile, segment: int) -> list[tuple[GenerationProfile, float]]:
        most = self.seconds(ceiling, segment)
        if most is None:
            return []
        expected = [(profile, self.seconds(profile, segment)) for profile in self._profiles.values()]
        quicker = [(p, s) for p, s in expected if s is not None and s < most and p != ceiling]
        return [*quicker, (ceiling, most)]


def graphs_sha256(manifest: Manifest) -> str:
    """Identity of what runs: every graph and weight file of a bundle."""
    digest = hashlib.sha256()
    for name, entry in sorted(manifest.files.items()):
        digest.update(f"{name}:{entry.sha256}\n".encode())
    return digest.hexdigest()


def device_name() -> str:
    """The processor, as the system names it."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", path.read_text(errors="replace"), re.MULTILINE)
        if found:
            return f"{found[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def model_path(bundle_folder: Path, device: str, threads: int) -> Path:
    """Where the times of a device are kept."""
    plain = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return bundle_folder / TUNED_FOLDER / f"{plain}-{threads or 'all'}-threads.json"


def new_model(manifest: Manifest, device: str, threads: int, profiles: tuple[ProfileLatency, ...]) -> LatencyModel:
    """Measured times, ready to be written."""
    return LatencyModel(
        schema=_SCHEMA, device=device, threads=threads, graphs_sha256=graphs_sha256(manifest), profiles=profiles
    )


def write_model(bundle_folder: Path, model: LatencyModel) -> Path:
    """Keep measured times in the bundle; returns the file."""
    path = model_path(bundle_folder, model.device, model.threads)
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(model), indent=1) + b"\n")
    return path


def read_model(bundle_folder: Path, manifest: Manifest, device: str, threads: int) -> LatencyModel | None:
    """Measured times of this bundle on this device; None if it was not tuned here.

    Raises:
        LatencyModelError: the file is unreadable, or the bundle was exported again since.
    """
    path = model_path(bundle_folder, device, threads)
    if not path.is_file():
        return None
    again = f"run `worldvln-edge tune {bundle_folder}` again"
    try:
        model = msgspec.json.decode(path.read_bytes(), type=LatencyModel)
    except (msgspec.MsgspecError, ValueError) as error:
        raise LatencyModelError(f"{path}: not a file of measured times ({error}); {again}") from error
    if model.schema != _SCHEMA:
        raise LatencyModelError(f"{path}: schema {model.schema} found, this version reads {_SCHEMA}; {again}")
    if model.graphs_sha256 != graphs_sha256(manifest):
        raise LatencyModelError(f"{path}: measured on another export of this bundle; {again}")
    return model
