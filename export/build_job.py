"""What is built: a graph of a bundle for one package version and one kind of GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from worldvln_edge.bundle import ENGINES_FOLDER
from worldvln_edge.export.optimisation_profiles import Profile

AHEAD_OF_TIME = "tensorrt_rtx"
"""Builds for a named compute capability, on any machine."""
ON_DEVICE = "tensorrt"
"""Builds for the GPU of this machine."""


class EngineBuildError(RuntimeError):
    """An engine that cannot be built. The message says what was found, what was expected and what to do."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of GPU and the package that builds for it."""

    package: str
    version: str
    compute_capability: str
    is_local: bool

    @property
    def folder(self) -> str:
        return f"{ENGINES_FOLDER}/{self.package}-{self.version}/{self.compute_capability}"


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """All that a building process needs."""

    bundle: Path
    graph: str
    file: str
    """The graph's ONNX file, below the bundle folder."""
    profiles: tuple[Profile, ...]
    target: Target
    sources: dict[str, str]
    """Bundle file -> sha256 of what goes into the engine."""

    @property
    def engine_file(self) -> str:
        """Below the bundle folder, as the manifest names it."""
        return f"{self.target.folder}/{self.graph}.engine"

    @property
    def log_file(self) -> str:
        return f"{self.target.folder}/{self.graph}.log"

    @property
    def where(self) -> str:
        """Begin of error messages."""
        return f"graph {self.graph} for {self.target.compute_capability}"
