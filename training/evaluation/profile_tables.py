"""The tables of `worldvln-edge profiles`: speed, agreement with `exact`, bits by scale, flights."""

from __future__ import annotations

from collections.abc import Sequence

from worldvln_edge.generation_profile import EXACT, GenerationProfile
from worldvln_edge.runtime.bench.profile_comparison import ProfileAgreement
from worldvln_edge.runtime.bench.report_table import Part, Table
from worldvln_edge.training.evaluation.profile_quality import ProfileQuality, ProfileQualityReport

_OTHER_DRAWS = f"{EXACT}, other draws"


def profile_parts(report: ProfileQualityReport) -> list[Part]:
    """Sentences and tables, for `report_table.render`."""
    threads = {0: "all cores", 1: "1 thread"}.get(report.threads, f"{report.threads} threads")
    agreements = [(quality.measured.profile.name, quality.measured.agreement) for quality in report.profiles]
    agreements.append((_OTHER_DRAWS, report.other_draws))
    parts: list[Part] = [
        f"{report.model} {report.precision}, {report.backend} on {report.device}, {threads}",
        _definitions([quality.measured.profile for quality in report.profiles], report.precision),
        f"Time from the last frame of a segment to its actions: {report.segments} segments of {report.flights} flights "
        "a profile, flown in turns. `times`: median of the time of exact over this one's, segment by segment. "
        "Token-steps: tokens through the world model per segment and guidance row; row-steps: the same over both rows.",
        _speed(report.profiles),
        "The same frames and draws as exact. Bits: equal among those that both drew; `drawn`: share of the bits of "
        "exact that are drawn at all. Codes: root mean square of the difference, as a share of that of exact. Actions: "
        "length of the difference of each action.",
        _agreement(agreements),
        "Equal bits by scale; - where the profile skips the scale, so that there are none.",
        _bits(agreements),
    ]
    if report.tasks:
        parts += [
            f"{report.tasks} held-out tasks in closed loop, the same tasks and draws for every profile; intervals are "
            "95 %. `against exact`: difference of success in points, in pairs; `won`, `lost`: tasks that succeed under "
            "this profile only, under exact only.",
            _flights(report.profiles),
        ]
    else:
        parts.append("No tasks were flown, so nothing is said about success.")
    return parts


def _definitions(profiles: Sequence[GenerationProfile], precision: str) -> Table:
    rows = []
    for profile in profiles:
        most = profile.max_repetitions
        repetitions = "all" if most is None else str(most) if isinstance(most, int) else " ".join(map(str, most))
        guided = "all" if profile.guided_scales is None else str(profile.guided_scales)
        rows.append((profile.name, repetitions, guided, str(profile.skipped_scales), profile.precision or precision))
    return Table(("profile", "repetitions of a scale", "guided scales", "skipped scales", "world model"), tuple(rows))


def _speed(profiles: Sequence[ProfileQuality]) -> Table:
    rows = []
    for quality in profiles:
        speed = quality.measured.speed
        rows.append(
            (
                quality.measured.profile.name,
                f"{speed.segment.p50_ms:.1f}",
                f"{speed.segment.p95_ms:.1f}",
                f"{speed.segment_speed_up:.2f}",
                f"{speed.world_model.p50_ms:.1f}",
                f"{speed.world_model.p95_ms:.1f}",
                f"{speed.world_model_speed_up:.2f}",
                _goal(quality),
                f"{speed.token_steps:,.0f}",
                f"{speed.row_steps:,.0f}",
            )
        )
    header = ("profile", "segment p50 ms", "p95 ms", "times", "world model p50 ms", "p95 ms", "times", "goal")
    return Table((*header, "token-steps", "row-steps"), tuple(rows))


def _goal(quality: ProfileQuality) -> str:
    """The speed-up that is meant to be reached, and what reaches it."""
    goal, speed = quality.speed_goal, quality.measured.speed
    if goal is None:
        return ""
    if speed.segment_speed_up >= goal:
        return f"{goal:g}: reached"
    return f"{goal:g}: {'world model only' if speed.world_model_speed_up >= goal else 'missed'}"


def _agreement(agreements: Sequence[tuple[str, ProfileAgreement]]) -> Table:
    return Table(
        ("profile", "bits equal", "drawn", "codes differ", "action p50 cm", "p95 cm", "p50 deg", "p95 deg"),
        tuple(
            (
                name,
                f"{each.bits_equal:.1%}",
                f"{each.bits_drawn:.0%}",
                f"{each.codes_difference:.1%}",
                f"{each.translation_cm.p50:.2f}",
                f"{each.translation_cm.p95:.2f}",
                f"{each.rotation_deg.p50:.2f}",
                f"{each.rotation_deg.p95:.2f}",
            )
            for name, each in agreements
        ),
    )


def _bits(agreements: Sequence[tuple[str, ProfileAgreement]]) -> Table:
    scales = [f"{h}x{w}" for h, w in (scale.scale_hw for scale in agreements[0][1].scales)]
    return Table(
        ("profile", *scales),
        tuple(
            (name, *("-" if scale.equal is None else f"{scale.equal:.1%}" for scale in each.scales))
            for name, each in agreements
        ),
    )


def _flights(profiles: Sequence[ProfileQuality]) -> Table:
    rows = []
    for quality in profiles:
        assert quality.closed_loop is not None  # tasks were flown
        result, paired = quality.closed_loop.outcome, quality.closed_loop.against_exact
        low, high = result.success_interval
        against, won, lost = "", "", ""
        if paired is not None:
            points = [100 * share for share in (paired.difference, *paired.interval)]
            against = f"{points[0]:+.1f} ({points[1]:+.1f} to {points[2]:+.1f})"
            won, lost = str(paired.gained), str(paired.lost)
        rows.append(
            (
                quality.measured.profile.name,
                f"{result.success_rate:.1%}",
                f"{low:.0%} to {high:.0%}",
                against,
                won,
                lost,
                f"{result.mean_distance_m:.2f}",
                f"{result.mean_yaw_error_deg:.1f}",
            )
        )
    return Table(("profile", "success", "95 %", "against exact", "won", "lost", "distance m", "yaw deg"), tuple(rows))
