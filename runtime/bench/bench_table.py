"""Tables of a benchmark, for a terminal and as Markdown, from the same rows."""

from __future__ import annotations

from worldvln_edge.runtime.bench.bench_comparison import ComparisonReport
from worldvln_edge.runtime.bench.bench_device import DeviceReport
from worldvln_edge.runtime.bench.bench_report import BenchReport, Quantiles
from worldvln_edge.runtime.bench.report_table import Part, Table
from worldvln_edge.runtime.bench.schedule_agreement import BORDER


def bench_parts(report: BenchReport) -> list[Part]:
    """The report of `bench`."""
    stages = Table(
        ("stage", "runs", "p50 ms", "p95 ms", "p99 ms"),
        (
            *((stage, *_quantiles(quantiles)) for stage, quantiles in report.stages.items()),
            ("segment", *_quantiles(report.segment)),
            ("outside engines", *_quantiles(report.host)),
        ),
    )
    segments = Table(
        (
            "segment no.",
            "p50 ms",
            "p95 ms",
            "p99 ms",
            "outside ms",
            "token-steps",
            "calls",
            "frames",
            "latents",
            "MB in/out",
            "MB KV",
            "ahead ms",
            "ahead steps",
        ),
        tuple(
            (
                str(each.segment),
                *_quantiles(each.total)[1:],
                f"{each.host.p50_ms:.1f}",
                f"{each.work.token_steps:,}",
                str(each.work.world_model_calls),
                str(each.work.frames_encoded),
                str(each.work.latents_decoded),
                f"{each.work.io_bytes / 1e6:.2f}",
                f"{each.work.kv_copied_bytes / 1e6:.2f}",
                f"{each.ahead.p50_ms:.1f}",
                f"{each.work_ahead.token_steps:,}",
            )
            for each in report.segments
        ),
    )
    rates = Table(
        ("step at scale", "tokens", "calls", "p50 ms", "GFLOP/s", "of peak"),
        (
            *(
                (
                    f"{rate.scale_hw[0]}x{rate.scale_hw[1]}",
                    f"{rate.tokens:,}",
                    str(rate.calls),
                    f"{rate.call_p50_ms:.2f}",
                    f"{rate.flops / 1e9:.1f}",
                    f"{rate.peak_share:.0%}",
                )
                for rate in report.steps
            ),
            (
                "all",
                "",
                str(sum(rate.calls for rate in report.steps)),
                "",
                f"{report.step_flops / 1e9:.1f}",
                f"{report.step_peak_share:.0%}",
            ),
        ),
    )
    return [_title(report), stages, segments, rates, "\n".join(_facts(report))]


def comparison_parts(report: ComparisonReport) -> list[Part]:
    """The report of `bench --against full-horizon`."""
    exact, full = report.exact, report.full_horizon
    segments = Table(
        ("segment no.", "full horizon ms", "exact ms", "ratio", "ahead ms"),
        (
            *(
                (str(index), f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}", f"{ahead:.1f}")
                for index, (theirs, ours, ahead) in enumerate(
                    zip(full.segments_ms, exact.segments_ms, exact.ahead_ms, strict=True)
                )
            ),
            (
                "waited for",
                f"{full.waited_ms:.1f}",
                f"{exact.waited_ms:.1f}",
                f"{report.waited_ratio:.2f}",
                "",
            ),
            (
                "episode",
                f"{full.episode_ms:.1f}",
                f"{exact.episode_ms:.1f}",
                f"{report.ratio:.2f}",
                f"{sum(exact.ahead_ms):.1f}",
            ),
            (
                "without previews",
                f"{full.episode_ms - full.previews_ms:.1f}",
                f"{exact.episode_ms:.1f}",
                f"{report.ratio_without_previews:.2f}",
                "",
            ),
            ("token-steps", f"{full.token_steps:,}", f"{exact.token_steps:,}", f"{report.token_step_ratio:.2f}", ""),
            ("calls", str(full.calls), str(exact.calls), f"{full.calls / exact.calls:.2f}", ""),
        ),
    )
    names = dict.fromkeys(stage for stages in (*full.stages_ms, *exact.stages_ms) for stage in stages)
    rows = []
    for stage in names:
        theirs, ours = (sum(stages.get(stage, 0.0) for stages in side.stages_ms) for side in (full, exact))
        rows.append((stage, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}" if ours and theirs else ""))
    stages = Table(("stage, whole episode", "full horizon ms", "exact ms", "ratio"), tuple(rows))
    held = "" if report.tolerance is None else f", allowed {report.tolerance:g}"
    difference = f"largest action difference {report.largest_action_difference:.1e} cm or deg{held}"
    episodes = f"medians of {report.episodes} episodes of each schedule, flown alternately"
    parts: list[Part] = [f"{_title(report)}\n{episodes}", segments, stages, difference]
    if report.agreement:
        parts.append(
            Table(
                ("worst episode", "equal steps", "bits that differ first", "|u - p|", "probability", "action"),
                tuple(
                    (
                        f"segment {each.segment}",
                        f"{each.steps_equal} of {each.steps}",
                        str(each.differing_bits),
                        f"{each.largest_border:.1e}",
                        f"{each.largest_probability_difference:.1e}",
                        f"{each.largest_action_difference:.1e}",
                    )
                    for each in report.agreement
                ),
            )
        )
        parts.append(
            f"bits whose draw lies within {BORDER:g} of their probability are decided by rounding: "
            f"the schedules {'agree' if report.agrees else 'do not agree'}"
        )
    return parts


def device_parts(report: DeviceReport) -> list[Part]:
    """The report of `bench --device cuda`."""
    calls = Table(
        ("graph", "shape", "tokens", "calls", "ms a call", "TFLOP/s", "of peak"),
        tuple(
            (
                each.stage,
                each.shape,
                f"{each.tokens:,}" if each.tokens else "",
                str(each.calls),
                f"{each.call_ms:.3f}",
                "" if each.flops is None else f"{each.flops / 1e12:.2f}",
                "" if each.peak_share is None else f"{each.peak_share:.0%}",
            )
            for each in report.calls
        ),
    )
    stages = Table(
        ("stage", "ms"),
        (
            *((stage, f"{ms:.1f}") for stage, ms in report.stages_ms.items()),
            (f"engine calls of segment {report.segment}", f"{report.segment_ms:.1f}"),
        ),
    )
    peak = report.peak
    facts = (
        f"machine's peak        {peak.matmul_flops / 1e12:.2f} TFLOP/s ({peak.matmul_dtype} product of "
        f"{peak.matmul_size}x{peak.matmul_size})\ncopies between host and device, and the host's work, are not in it"
    )
    return [f"{report.model} {report.precision}, {report.runner} on {report.device}", calls, stages, facts]


def _title(report: BenchReport | ComparisonReport) -> str:
    threads = f"{report.threads} threads" if report.threads else "all cores"
    return f"{report.model} {report.precision}, {report.backend} on {report.device}, {threads}"


def _facts(report: BenchReport) -> list[str]:
    share, peak = report.host.p50_ms / report.segment.p50_ms, report.peak
    facts = [
        f"seconds per segment   {report.segment.p50_ms / 1e3:.3f} ({report.actions_per_segment} actions)",
        f"outside engines       {report.host.p50_ms:.1f} ms a segment, {share:.1%}",
        f"camera frame          {report.fit_ms.p50_ms:.1f} ms to fit it to the model, on decoding threads",
        f"bundle                {report.bundle_bytes / 1e6:.1f} MB, loaded in {report.load_s:.2f} s; "
        f"graphs and weights {report.weight_bytes / 1e6:.1f} MB",
        f"keys and values       {report.kv_bytes / 1e6:.2f} MB a session, "
        f"buffers {report.kv_workspace_bytes / 1e6:.2f} MB",
    ]
    if report.rss_bytes is not None and report.peak_rss_bytes is not None:
        facts.append(
            f"memory (RSS)          {report.rss_bytes / 1e6:.0f} MB, peak {report.peak_rss_bytes / 1e6:.0f} MB"
        )
    copies = f", copies {peak.copy_bytes / 1e9:.1f} GB/s" if peak.copy_bytes else ""  # not measured on a GPU
    facts.append(
        f"machine's peak        {peak.matmul_flops / 1e9:.1f} GFLOP/s ({peak.matmul_dtype} product of "
        f"{peak.matmul_size}x{peak.matmul_size}){copies}"
    )
    if report.energy_j_per_segment is not None:
        facts.append(f"energy                {report.energy_j_per_segment:.1f} J a segment ({report.energy_source})")
    return facts


def _quantiles(quantiles: Quantiles) -> tuple[str, ...]:
    return (str(quantiles.runs), f"{quantiles.p50_ms:.1f}", f"{quantiles.p95_ms:.1f}", f"{quantiles.p99_ms:.1f}")
