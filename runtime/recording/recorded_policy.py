"""What a policy was loaded with: out of it for a recording, and back for a replay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from worldvln_edge.generation_profile import GenerationProfile, model_profiles
from worldvln_edge.runtime.engines.backends import BackendName
from worldvln_edge.runtime.recording.recording_messages import FlightSettings, Opening
from worldvln_edge.runtime.worldvln.speculation import SpeculationConfig
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy


class OtherPolicyError(ValueError):
    """A recording cannot be replayed with this bundle. The message says what was flown, and what is here."""


def settings_of(policy: WorldVLNPolicy, *, threads: int = 0) -> FlightSettings:
    """What its actions depend on besides its bundle.

    Args:
        policy: loaded.
        threads: that it was loaded with.
    """
    built_in = model_profiles(policy.config)
    own = [profile for name, profile in policy.profiles.items() if name not in built_in]
    return FlightSettings(
        profile=policy.profile.name,
        own_profiles=msgspec.json.encode(own).decode(),
        guidance=policy.config.generation.cfg,
        speculation_threshold=None if policy.speculation is None else policy.speculation.threshold,
        threads=threads,
    )


def load_recorded_policy(
    opening: Opening,
    bundle: Path,
    *,
    backend: BackendName = "auto",
    also: Sequence[Path] = (),
    takes_other_weights: bool = False,
) -> WorldVLNPolicy:
    """The policy of a bundle as it was loaded when the recording was made.

    Args:
        opening: of the recording.
        bundle: that was flown.
        backend: see `backends.open_engines`; on another one, actions agree up to rounding.
        also: other exports, as for `load_policy`.
        takes_other_weights: to see how another bundle would have flown.

    Raises:
        OtherPolicyError: the bundle is another one, or the recording names profiles that cannot be read.
        Everything that `load_policy` raises.
    """
    settings = opening.settings
    try:
        own = msgspec.json.decode(settings.own_profiles, type=list[GenerationProfile])
    except (msgspec.MsgspecError, ValueError) as error:
        raise OtherPolicyError(f"the recording's own profiles cannot be read: {error}") from error
    threshold = settings.speculation_threshold
    policy = load_policy(
        bundle,
        backend=backend,
        threads=settings.threads,
        profiles={profile.name: profile for profile in own},
        profile=settings.profile,
        speculation=None if threshold is None else SpeculationConfig(threshold=threshold),
        also=also,
    )
    if policy.info.weights != opening.policy.weights and not takes_other_weights:
        policy.close()
        raise OtherPolicyError(
            f"{bundle} is not the bundle that was flown: its weights have digest {policy.info.weights[:12]}, those of "
            f"the recording {opening.policy.weights[:12]} ({opening.policy.name}, {opening.policy.precision}); give "
            "that one, or --other-weights to see how this one would have flown"
        )
    return policy
