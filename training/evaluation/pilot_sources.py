"""Where an evaluation gets its policy from: a bundle that is opened in this process, or a server.

A source is opened once per worker process, so one for several workers must be picklable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from worldvln_edge.bundle import MANIFEST_FILE, Bundle
from worldvln_edge.client import SessionClient
from worldvln_edge.generation_profile import EXACT, GenerationProfile, find_profile, model_profiles
from worldvln_edge.training.evaluation.closed_loop import Pilot, PolicyPilot, ServerPilot

if TYPE_CHECKING:
    from worldvln_edge.runtime.engines.backends import BackendName

PilotSource = Callable[[], AbstractContextManager[Pilot]]
"""Opens a pilot."""


@dataclass(frozen=True, kw_only=True)
class BundlePilot:
    """Opens a bundle in this process."""

    folder: Path
    threads: int = 1
    profile: str = EXACT
    profiles: Mapping[str, GenerationProfile] = field(default_factory=dict)  # besides the built-in ones
    backend: BackendName = "cpu"
    also: tuple[Path, ...] = ()  # other exports of the same checkpoint, for profiles that name their precision

    @contextmanager
    def __call__(self) -> Iterator[Pilot]:
        # Imported here: flying through a server needs no inference engine.
        from worldvln_edge.runtime.worldvln.worldvln_policy import load_policy

        policy = load_policy(
            self.folder,
            backend=self.backend,
            threads=self.threads,
            profile=self.profile,
            profiles=self.profiles,
            also=self.also,
        )
        with closing(policy):
            yield PolicyPilot(policy)

    def identity(self) -> str:
        """Another text, other actions: of the manifests (they hold every file's hash), profile, backend and threads."""
        total = hashlib.sha256()
        for folder in (self.folder, *self.also):
            total.update((folder / MANIFEST_FILE).read_bytes())
        flown = find_profile(model_profiles(Bundle.open_manifest(self.folder).model, self.profiles), self.profile)
        total.update(msgspec.json.encode([flown, self.backend, self.threads]))
        return total.hexdigest()


@dataclass(frozen=True, kw_only=True)
class RemotePilot:
    """Opens a connection to a server."""

    server: str
    key: str | None = None
    ca_file: Path | None = None  # authorities to trust behind wss://; None: those of this system

    @contextmanager
    def __call__(self) -> Iterator[Pilot]:
        with self._client() as client:
            yield ServerPilot(client)

    def check(self) -> None:
        """See that a server answers: here, once, rather than in every worker.

        Raises:
            ServerAddressError, TrustFileError, ServerUnreachableError, ServerError: see `SessionClient`.
        """
        with self._client():
            pass

    def identity(self) -> str:
        """Of address and model, as the server says it. It does not say its weights. Raises as `check`."""
        with self._client() as client:
            assert client.welcome is not None  # the client is connected
            return hashlib.sha256(msgspec.json.encode([self.server, client.welcome.model])).hexdigest()

    def _client(self) -> SessionClient:
        return SessionClient(self.server, self.key, ca_file=self.ca_file, frame_format="rgb8")


def check_bundle(folder: Path, profile: str = EXACT, profiles: Mapping[str, GenerationProfile] | None = None) -> None:
    """See that a bundle can be flown: here, once, rather than in every worker.

    Args:
        folder: of the bundle.
        profile: that it will be flown with.
        profiles: besides the built-in ones.

    Raises:
        BundleError: it is not whole.
        ConfigError: an unknown profile, or one that does not fit the model.
    """
    find_profile(model_profiles(Bundle.open(folder).manifest.model, profiles), profile)
