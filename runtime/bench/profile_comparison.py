"""What every generation profile saves and what it changes, measured against `exact` on the same observed frames.

A flight of recorded frames is handed over to all profiles with the same seed, so that draws are the same and no profile
sees the consequences of its own actions (teacher forcing). Work and bits are compared in one pass, times in another,
because bringing bits to the host takes time. Where they are timed, profiles take turns segment by segment, so that
whatever else the machine does meets all alike; a session of every profile is open then. Frames come one by one, as a
camera gives them: what is timed is the wait from the last frame of a segment to its actions.

Legend: S scales of a clip, D latent channels, T latent frames, H W latent rows and columns, N actions of a segment.
Source: spec/world_model.md 6, 9.5.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from worldvln_edge.generation_profile import EXACT, GenerationProfile
from worldvln_edge.runtime.bench.bench_report import Quantiles, quantiles
from worldvln_edge.runtime.worldvln.world_model import GeneratedClip
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy

OTHER_DRAWS_SEED = 2**32
"""Added to a flight's seed: `exact` with other draws, the yardstick for what a profile changes."""


@dataclass(frozen=True, kw_only=True)
class ObservedFlight:
    """What a camera saw in one flight."""

    prompt: str
    frames: Sequence[np.ndarray]  # uint8 RGB [rows, columns, 3], up to the start of the last segment at least
    seed: int  # of the draws


class ProfileSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """Times of a profile over all segments of all flights."""

    segment: Quantiles
    """From the last frame of a segment to its actions."""
    world_model: Quantiles
    """The world model's part of it: keys and values of the newest clip, and generation."""
    segment_speed_up: float
    """Median of (time of `exact` / time of this profile) over the same segments of the same flights."""
    world_model_speed_up: float
    token_steps: float
    """Mean tokens per segment and guidance row through the world model, work ahead included."""
    row_steps: float
    """The same over all rows: what dropping the unconditional row saves is seen here only."""


class ScaleAgreement(msgspec.Struct, frozen=True, kw_only=True):
    """Bits of one scale, over the repetitions that both ran."""

    scale_hw: tuple[int, int]
    bits: int
    """Compared; 0 when the profile skips the scale."""
    equal: float | None
    """Share of them that are equal; None when there are none."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    p50: float
    p95: float


class ProfileAgreement(msgspec.Struct, frozen=True, kw_only=True):
    """What of `exact` a profile reproduces with the same frames and draws."""

    bits_equal: float
    """Share of the bits that both drew."""
    bits_drawn: float
    """Share of the bits of `exact` that the profile draws at all."""
    scales: tuple[ScaleAgreement, ...]
    codes_difference: float
    """Root mean square of the difference of the clips' final codes, as a share of that of `exact`."""
    translation_cm: Spread
    """Length of the difference of each action's translation."""
    rotation_deg: Spread
    """Length of the difference of each action's three angles."""


class ProfileMeasurement(msgspec.Struct, frozen=True, kw_only=True):
    profile: GenerationProfile
    speed: ProfileSpeed
    agreement: ProfileAgreement


class ProfileComparison(msgspec.Struct, frozen=True, kw_only=True):
    """All profiles of a policy, `exact` first, and `exact` with other draws."""

    profiles: tuple[ProfileMeasurement, ...]
    other_draws: ProfileAgreement


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """One segment as a profile flew it."""

    actions: np.ndarray  # float32 [N, 6], cm and deg
    clips: tuple[GeneratedClip, ...]
    steps: tuple[tuple[tuple[int, int], ...], ...]  # of every clip: (scale, step_in_clip) of each entry of its bits
    segment_ms: float
    world_model_ms: float
    token_steps: int  # of the flight so far, with what was done ahead
    row_steps: int


def compare_profiles(
    policy: WorldVLNPolicy, flights: Sequence[ObservedFlight], *, on_flight: Callable[[], None] = lambda: None
) -> ProfileComparison:
    """Measure every profile of a policy.

    Args:
        policy: its sessions fly alone while this runs.
        flights: at least one.
        on_flight: called `flights_in_comparison` times, whenever a flight ends.

    Raises:
        ValueError: no flights, or one with too few frames.
        EngineError, NonFiniteActionsError: the policy's.
    """
    if not flights:
        raise ValueError("no flights to compare profiles on")
    needed = policy.config.horizon.points[-2]
    for flight in flights:
        if len(flight.frames) < needed:
            raise ValueError(f"a flight needs {needed} frames for all segments to start, found {len(flight.frames)}")
    profiles = tuple(policy.profiles.values())
    exact = policy.profiles[EXACT]
    scales = policy.config.schedule.scale_hw
    tallies = {profile.name: _Tally(scales) for profile in profiles}
    other_draws = _Tally(scales)
    token_steps: dict[str, int] = {profile.name: 0 for profile in profiles}
    row_steps = dict(token_steps)
    for flight in flights:
        reference = list(_fly(policy, exact, flight, record=True))
        on_flight()
        for profile in profiles:  # `exact` too: a flight that is not reproduced says nothing about profiles
            flown = list(_fly(policy, profile, flight, record=True))
            on_flight()
            tallies[profile.name].add(reference, flown)
            token_steps[profile.name] += flown[-1].token_steps
            row_steps[profile.name] += flown[-1].row_steps
        other_draws.add(reference, list(_fly(policy, exact, flight, record=True, other_draws=True)))
        on_flight()
    times = _times(policy, profiles, flights, on_flight)
    segments = len(flights) * policy.config.horizon.segments
    return ProfileComparison(
        profiles=tuple(
            ProfileMeasurement(
                profile=profile,
                speed=_speed(
                    times[profile.name],
                    times[EXACT],
                    token_steps=token_steps[profile.name] / segments,
                    row_steps=row_steps[profile.name] / segments,
                ),
                agreement=tallies[profile.name].agreement(),
            )
            for profile in profiles
        ),
        other_draws=other_draws.agreement(),
    )


def flights_in_comparison(profiles: int, flights: int) -> int:
    """How many flights `compare_profiles` flies for that many profiles and observed flights."""
    return flights * (2 * profiles + 2)


def _times(
    policy: WorldVLNPolicy,
    profiles: Sequence[GenerationProfile],
    flights: Sequence[ObservedFlight],
    on_flight: Callable[[], None],
) -> dict[str, np.ndarray]:
    """Profile -> float64 [segments of all flights, 2]: ms of the segment and of its world model.

    The engines are warm: every profile was flown before.
    """
    times: dict[str, list[tuple[float, float]]] = {profile.name: [] for profile in profiles}
    for number, flight in enumerate(flights):
        flying = {profile.name: _fly(policy, profile, flight, record=False) for profile in profiles}
        for turn in range(policy.config.horizon.segments):
            first = (number + turn) % len(profiles)  # so that no profile always comes behind the same other one
            for profile in (*profiles[first:], *profiles[:first]):
                segment = next(flying[profile.name])
                times[profile.name].append((segment.segment_ms, segment.world_model_ms))
        for flight_of_profile in flying.values():
            flight_of_profile.close()
            on_flight()
    return {name: np.array(values) for name, values in times.items()}


def _speed(times: np.ndarray, exact: np.ndarray, *, token_steps: float, row_steps: float) -> ProfileSpeed:
    segment, world_model = np.median(exact / times, axis=0)
    return ProfileSpeed(
        segment=quantiles(times[:, 0].tolist()),
        world_model=quantiles(times[:, 1].tolist()),
        segment_speed_up=float(segment),
        world_model_speed_up=float(world_model),
        token_steps=token_steps,
        row_steps=row_steps,
    )


def _fly(
    policy: WorldVLNPolicy,
    profile: GenerationProfile,
    flight: ObservedFlight,
    *,
    record: bool,
    other_draws: bool = False,
) -> Generator[_Segment, None, None]:
    """Fly a segment at a time; several flights may be under way. Closing ends the session."""
    seed = flight.seed + (OTHER_DRAWS_SEED if other_draws else 0)
    session = policy.new_session(flight.prompt, seed=seed, record=record)
    session.profile = profile
    try:
        session.work_ahead()
        for frame in flight.frames[: policy.config.horizon.points[-2]]:
            start = time.perf_counter()
            chunk = session.observe([frame])
            segment_ms = (time.perf_counter() - start) * 1e3
            if chunk is None:
                continue
            clips = session.last_prediction if record else ()
            session.work_ahead()
            counters = session.counters
            yield _Segment(
                actions=chunk.actions,
                clips=clips,
                steps=_steps(policy, profile, chunk.segment) if record else (),
                segment_ms=segment_ms,
                world_model_ms=chunk.timings_ms["world_model_context"] + chunk.timings_ms["world_model_step"],
                token_steps=counters["token_steps"],
                row_steps=counters["row_steps"],
            )
    finally:
        session.close()


def _steps(policy: WorldVLNPolicy, profile: GenerationProfile, segment: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    scales = policy.config.schedule.scales_per_clip
    clips = (policy.tables.schedule.clips[index] for index in policy.clips_of(segment))
    return tuple(
        tuple((each.step.scale, each.step.step_in_clip) for each in profile.steps(clip, scales)) for clip in clips
    )


class _Tally:
    """Sums over segments of what a profile drew and flew, beside what `exact` did."""

    def __init__(self, scale_hw: Sequence[tuple[int, int]]):
        self._scale_hw = scale_hw
        self._bits = np.zeros(len(scale_hw), np.int64)  # compared
        self._equal = np.zeros(len(scale_hw), np.int64)
        self._exact_bits = 0
        self._codes_difference = self._codes = 0.0  # sums of squares
        self._actions: list[np.ndarray] = []  # differences, [N, 6]

    def add(self, exact: Sequence[_Segment], other: Sequence[_Segment]) -> None:
        for ours, theirs in zip(exact, other, strict=True):
            self._actions.append(theirs.actions.astype(np.float64) - ours.actions)
            for number, (clip, their_clip) in enumerate(zip(ours.clips, theirs.clips, strict=True)):
                self._exact_bits += sum(bits.size for bits in clip.bits)
                self._codes_difference += float(np.square(their_clip.codes - clip.codes, dtype=np.float64).sum())
                self._codes += float(np.square(clip.codes, dtype=np.float64).sum())
                # A step is named by its place in the whole schedule, where its draws come from.
                drawn = dict(zip(ours.steps[number], clip.bits, strict=True))
                for step, bits in zip(theirs.steps[number], their_clip.bits, strict=True):
                    self._bits[step[0]] += bits.size
                    self._equal[step[0]] += int((bits == drawn[step]).sum())

    def agreement(self) -> ProfileAgreement:
        differences = np.abs(np.concatenate(self._actions))
        return ProfileAgreement(
            bits_equal=float(self._equal.sum() / self._bits.sum()),
            bits_drawn=float(self._bits.sum() / self._exact_bits),
            scales=tuple(
                ScaleAgreement(scale_hw=hw, bits=int(bits), equal=float(equal / bits) if bits else None)
                for hw, bits, equal in zip(self._scale_hw, self._bits, self._equal, strict=True)
            ),
            codes_difference=float(np.sqrt(self._codes_difference / self._codes)),
            translation_cm=_spread(np.linalg.norm(differences[:, :3], axis=1)),
            rotation_deg=_spread(np.linalg.norm(differences[:, 3:], axis=1)),
        )


def _spread(values: np.ndarray) -> Spread:
    p50, p95 = np.percentile(values, [50, 95])
    return Spread(p50=float(p50), p95=float(p95))
