"""Generation profiles: how deep a clip is generated, traded against time.

`exact` is the model as it was trained. The others leave out repetitions of a scale, the finest scales (what is left of
the clip is the upsampled sum of the coarser ones), or the unconditional row of fine scales. What that costs in quality
is measured for every model, not assumed (`worldvln-edge profiles`): see docs/runtime.md.

Legend: S scales of a clip.
Source: spec/world_model.md 6, 9.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from worldvln_edge.config import ConfigError, ModelConfig, ScheduleConfig
from worldvln_edge.scale_schedule import Clip, ScaleStep

EXACT = "exact"


class GenerationProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Raises ConfigError for numbers below 1 (below 0 where none is meant)."""

    name: str
    max_repetitions: tuple[int, ...] | int | None = None
    """Most repetitions of a scale: one number for all of them, or S numbers; None: as many as the schedule has."""
    skipped_scales: int = 0
    """Finest scales that are not generated."""
    guided_scales: int | None = None
    """Coarsest scales that are guided; finer ones run without the unconditional row. None: all."""
    precision: str | None = None
    """Of the world model's weights, from another loaded export of the same checkpoint. None: the bundle's."""

    def __post_init__(self) -> None:
        if not self.name or self.name != self.name.strip():
            raise ConfigError(f"a profile needs a name without blanks around it, found {self.name!r}")
        most = self.max_repetitions
        for count in (most,) if isinstance(most, int) else most or ():
            if count < 1:
                raise ConfigError(f"profile {self.name}: max_repetitions must be at least 1, found {count}")
        if self.skipped_scales < 0:
            raise ConfigError(f"profile {self.name}: skipped_scales must be at least 0, found {self.skipped_scales}")
        if self.guided_scales is not None and self.guided_scales < 0:
            raise ConfigError(f"profile {self.name}: guided_scales must be at least 0, found {self.guided_scales}")

    @property
    def is_exact(self) -> bool:
        is_whole = self.max_repetitions is None and not self.skipped_scales and self.guided_scales is None
        return is_whole and self.precision is None

    def check(self, schedule: ScheduleConfig, *, clips_per_segment: int) -> None:
        """Raise ConfigError when the profile does not fit a model's schedule."""
        scales = schedule.scales_per_clip
        if self.skipped_scales >= scales:
            raise ConfigError(
                f"profile {self.name}: skips {self.skipped_scales} scales of {scales}; at least one must be left"
            )
        if isinstance(self.max_repetitions, tuple) and len(self.max_repetitions) != scales:
            raise ConfigError(
                f"profile {self.name}: max_repetitions has {len(self.max_repetitions)} numbers for {scales} scales"
            )
        if self.skipped_scales and clips_per_segment > 1:
            raise ConfigError(
                f"profile {self.name}: skips scales that the next clip of the same segment refers to; with "
                f"{clips_per_segment} clips a segment, leave out repetitions or guidance instead"
            )

    def steps(self, clip: Clip, scales: int) -> Iterator[ProfileStep]:
        """Steps of a clip that are run, in order. Draws and positions stay those of the whole schedule."""
        most = self.max_repetitions
        for step in clip.steps:
            if step.scale >= scales - self.skipped_scales:
                return
            allowed = most[step.scale] if isinstance(most, tuple) else most
            if allowed is not None and step.repetition >= allowed:
                continue
            is_last = step.is_last_repetition or (allowed is not None and step.repetition == allowed - 1)
            is_guided = self.guided_scales is None or step.scale < self.guided_scales
            yield ProfileStep(step=step, is_last_repetition=is_last, is_guided=is_guided)

    def is_guided_at_all(self) -> bool:
        """False: the unconditional row is never looked at, not even in the keys and values of observed clips."""
        return self.guided_scales != 0


@dataclass(frozen=True, kw_only=True)
class ProfileStep:
    """A step of the schedule as a profile runs it."""

    step: ScaleStep
    is_last_repetition: bool
    is_guided: bool


def built_in_profiles(schedule: ScheduleConfig, *, clips_per_segment: int = 1) -> dict[str, GenerationProfile]:
    """`exact`, `balanced` and `fast` for a schedule, deepest first.

    balanced: every scale once, fine (detail) scales without guidance; where the schedule runs every scale once anyway,
    no guidance, and the finest scale left out. fast: every scale once, no guidance, and the scales of the last doubling
    of the grid left out. They are meant to be 2 and 5 times faster than `exact` where the world model takes the time;
    docs/runtime.md says how far they are, and at what quality.

    Args:
        schedule: of the model.
        clips_per_segment: clips of one segment refer to each other's scales, so with several of them `balanced` leaves
            out none, and there is no `fast`.
    """
    rows = [h for h, _ in schedule.scale_hw]
    fine = min(sum(1 for h in rows if h > rows[-1] / 2), len(rows) - 1)
    if max(schedule.video_repetition) > 1:
        balanced = GenerationProfile(name="balanced", max_repetitions=1, guided_scales=schedule.semantic_scales)
    else:
        finest = min(1, fine) if clips_per_segment == 1 else 0
        balanced = GenerationProfile(name="balanced", max_repetitions=1, guided_scales=0, skipped_scales=finest)
    profiles = [GenerationProfile(name=EXACT), balanced]
    if clips_per_segment == 1:
        profiles.append(GenerationProfile(name="fast", max_repetitions=1, guided_scales=0, skipped_scales=fine))
    return {profile.name: profile for profile in profiles}


def model_profiles(
    config: ModelConfig, own: Mapping[str, GenerationProfile] | None = None
) -> dict[str, GenerationProfile]:
    """The built-in profiles that a model can be flown with, deepest first, and behind them `own`.

    Raises:
        ConfigError: one of `own` does not fit the model.
    """
    clips = config.horizon.step // config.video_vae.temporal_stride // config.schedule.frames_inner_clip
    profiles = {**built_in_profiles(config.schedule, clips_per_segment=clips), **(own or {})}
    for profile in profiles.values():
        profile.check(config.schedule, clips_per_segment=clips)
    return profiles


def find_profile(profiles: Mapping[str, GenerationProfile], name: str) -> GenerationProfile:
    """The profile of that name. Raises ConfigError when there is none."""
    if name not in profiles:
        raise ConfigError(f"unknown profile {name!r}; choose one of {', '.join(profiles)}")
    return profiles[name]


def read_profiles(path: Path) -> dict[str, GenerationProfile]:
    """Profiles of a JSON file: a list of objects with the fields of `GenerationProfile`.

    Raises:
        ConfigError: unreadable, an unknown field, a wrong value, or a name that is used twice or built in.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=list[GenerationProfile])
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a JSON file of profiles") from error
    except (msgspec.MsgspecError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}; see docs/runtime.md for the fields of a profile") from error
    profiles: dict[str, GenerationProfile] = {}
    for profile in found:
        if profile.name in profiles or profile.name in (EXACT, "balanced", "fast"):
            raise ConfigError(f"{path}: profile {profile.name!r} is there already; give it another name")
        profiles[profile.name] = profile
    return profiles
