"""A soak finds what grows, and only that."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from worldvln_edge.cli import main
from worldvln_edge.config import HorizonConfig
from worldvln_edge.runtime.bench import soak_report
from worldvln_edge.runtime.bench.report_table import render
from worldvln_edge.runtime.bench.soak import SoakConfig, SoakFlights, soak_bundle
from worldvln_edge.runtime.bench.soak_log import SegmentSample, SoakLog
from worldvln_edge.runtime.bench.soak_report import SoakError, SoakReport, soak_parts, summarise
from worldvln_edge.runtime.bench.trend import theil_sen
from worldvln_edge.runtime.sessions.policy import PolicyInfo
from worldvln_edge.runtime.worldvln.worldvln_policy import load_policy

INFO = PolicyInfo(
    name="tiny", precision="fp32", backend="onnx", device="cpu", horizon=HorizonConfig(), image_hw=(16, 24)
)
ON_GPU = PolicyInfo(
    name="tiny", precision="fp32", backend="onnx", device="cuda", horizon=HorizonConfig(), image_hw=(16, 24)
)
COUNT = 400


def log_of(
    *,
    rss_bytes=lambda share: 2e8,
    processor=lambda share: 1.0,
    wall=lambda share: 1.0,
    count: int = COUNT,
    kinds: dict[str, float] | None = None,
    late_kind: str | None = None,
) -> SoakLog:
    """Segments of two kinds with 20 % noise; the functions are factors over the share of the run, 0..1."""
    rng, log = np.random.default_rng(0), SoakLog(count)
    kinds = kinds or {"exact/0": 100.0, "fast/1": 20.0}
    for number in range(count):
        share = number / count
        kind = late_kind if late_kind and share > 0.5 else list(kinds)[rng.integers(len(kinds))]
        usual_ms = kinds[kind] * rng.lognormal(0, 0.2)
        log.add(
            SegmentSample(
                kind=kind,
                elapsed_s=number * 0.1,
                wall_ms=usual_ms * wall(share) * 1.5,
                processor_ms=usual_ms * processor(share),
                rss_bytes=int(rss_bytes(share) * rng.normal(1, 0.0002)),
                sessions=number // 3,
            )
        )
    return log


def faults_of(log: SoakLog, info: PolicyInfo = INFO) -> list[str]:
    return summarise(info, log, threads=1).faults


def test_steady_run_passes():
    report = summarise(INFO, log_of(), threads=1)
    assert report.faults == []
    assert [window.segments for window in report.windows] == list(range(40, COUNT + 1, 40))
    assert report.sessions == report.windows[-1].sessions == (COUNT - 1) // 3
    assert abs(report.rss_growth) < 0.001
    assert report.latency_growth_low < 0 < report.latency_growth_high


def test_memory_that_grows_by_more_than_one_per_cent_is_a_fault():
    assert faults_of(log_of(rss_bytes=lambda share: 2e8 * (1 + 0.008 * share))) == []
    fault, trend = faults_of(log_of(rss_bytes=lambda share: 2e8 * (1 + 0.03 * share)))
    assert fault.startswith("memory (RSS) grew by 2.")
    assert fault.endswith("at most 1% is allowed")
    assert trend.startswith("memory (RSS) has a trend: +2.")
    assert trend.endswith("at 99 %; at most 1% is allowed")


def test_burst_at_the_end_is_growth_but_no_trend():
    (fault,) = faults_of(log_of(rss_bytes=lambda share: 2.2e8 if share > 0.9 else 2e8))
    assert fault.startswith("memory (RSS) grew by ")
    report = summarise(INFO, log_of(rss_bytes=lambda share: 2e8 * (1 + 0.005 * share)), threads=1)
    assert report.rss_trend == pytest.approx(0.005, abs=0.001)
    assert report.rss_trend_low < report.rss_trend < report.rss_trend_high


def test_memory_that_jumped_for_a_moment_is_no_fault():
    assert faults_of(log_of(rss_bytes=lambda share: 3e8 if 0.5 < share < 0.52 else 2e8)) == []


def test_latency_that_grows_beyond_noise_is_a_fault():
    (fault,) = faults_of(log_of(processor=lambda share: 1 + 0.4 * share))
    assert fault.startswith("segments became slower: +")
    assert fault.endswith("at 99 %; at most 1% is allowed")


def test_burst_of_other_work_is_no_trend():
    assert faults_of(log_of(processor=lambda share: 3.0 if 0.8 < share < 0.9 else 1.0)) == []


def test_other_mix_of_segments_is_no_trend():
    assert faults_of(log_of(late_kind="exact/0")) == []


def test_time_on_the_clock_counts_on_a_device_and_processor_time_on_a_processor():
    busier = log_of(wall=lambda share: 1 + share)  # other programs took the processor
    assert faults_of(busier) == []
    assert summarise(INFO, busier, threads=1).latency_clock == "processor"
    (fault,) = faults_of(busier, ON_GPU)
    assert fault.startswith("segments became slower")


def test_too_short_a_soak_is_refused():
    with pytest.raises(SoakError, match="a soak of 4 segments shows nothing; fly 5 or more"):
        summarise(INFO, log_of(count=4), threads=1)
    assert len(summarise(INFO, log_of(count=5), threads=1).windows) == 5


def test_log_takes_its_memory_before_the_run():
    log = SoakLog(1)
    numbers, kind = log._numbers, log._kind
    log.add(SegmentSample(kind="a", elapsed_s=1, wall_ms=2, processor_ms=3, rss_bytes=4, sessions=5))
    assert (log._numbers, log._kind) == (numbers, kind)
    assert [log.elapsed_s, log.wall_ms, log.processor_ms, log.rss_bytes, log.sessions] == [1, 2, 3, 4, 5]
    with pytest.raises(IndexError):
        log.add(SegmentSample(kind="a", elapsed_s=1, wall_ms=2, processor_ms=3, rss_bytes=4, sessions=5))


def test_table_and_verdict_read_the_same_as_markdown():
    parts = soak_parts(summarise(INFO, log_of(), threads=1))
    assert "tiny fp32, onnx on cpu, 1 threads" in render(parts)
    lines = render(parts, markdown=True).splitlines()
    assert lines[2] == "| segments | minutes | sessions | p50 ms | p95 ms | processor p50 ms | RSS MB |"
    assert lines[4].startswith("| 40 | 0.1 | 13 |")
    assert "memory (RSS), last window against the first: " in render(parts, markdown=True)
    assert "memory (RSS), trend over the run: " in render(parts, markdown=True)


def test_trend_is_the_slope_and_outliers_do_not_move_it():
    line = [3 + 0.5 * index for index in range(20)]
    assert (theil_sen(line).slope, theil_sen(line).low, theil_sen(line).high) == pytest.approx((0.5, 0.5, 0.5))
    line[7], line[13] = 1000.0, -1000.0
    found = theil_sen(line)
    assert found.slope == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5, abs=0.2)


def test_interval_of_pure_noise_holds_no_growth_in_nearly_all_cases():
    rng = np.random.default_rng(1)
    trends = [theil_sen(rng.standard_cauchy(20)) for _ in range(500)]  # a distribution without a mean
    assert np.mean([trend.low <= 0 <= trend.high for trend in trends]) >= 0.98
    assert np.mean([theil_sen(rng.standard_cauchy(20), confidence=0.5).low > 0 for _ in range(500)]) > 0.15


def test_trend_of_too_few_values_is_refused():
    with pytest.raises(ValueError, match="a trend needs at least 5 values, found 4"):
        theil_sen([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segments": 0}, "segments must be at least 1"),
        ({"warm_up_segments": -1}, "warm_up_segments at least 0"),
        ({"sessions_at_once": 0}, "sessions_at_once must be at least 1"),
        ({"text_cache_prompts": -1}, "text_cache_prompts at least 0"),
    ],
)
def test_wrong_soak_is_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SoakConfig(**fields)


def test_flights_are_as_different_as_on_a_server(tiny_bundle: Path):
    policy = load_policy(tiny_bundle, threads=1)
    opened = []
    open_session = policy.new_session

    def new_session(*args, **options):
        opened.append(open_session(*args, **options))
        return opened[-1]

    policy.new_session = new_session
    samples = list(SoakFlights(policy, SoakConfig(segments=150, warm_up_segments=10, frame_hw=(30, 50))).fly())
    assert len(samples) == 160
    opened.pop(0)  # the one that measured the longest prompt
    assert samples[-1].sessions == len(opened)
    assert {session.profile.name for session in opened} == set(policy.profiles)
    assert {session._emit for session in opened} == {"ahead", "behind"}
    assert len({session._prompt for session in opened}) < len(opened)
    assert {session.emitted for session in opened} >= {0, 2}  # ended early, and flown to the end
    # Profile, segment, frames in parts, prepared ahead, prompt changed, text not in the cache.
    parts = [set(values) for values in zip(*(sample.kind.split("/") for sample in samples), strict=True)]
    assert parts == [set(policy.profiles), {"0", "1", "2"}, *[{"True", "False"}] * 4]
    assert policy.texts.size_bytes <= policy.texts.max_bytes
    assert policy.texts.size_bytes > 0.5 * policy.texts.max_bytes
    assert all(sample.processor_ms > 0 and sample.wall_ms > 0 for sample in samples)


def test_leak_of_a_session_is_found(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    leaked = []
    start = SoakFlights._start

    def leaky(self: SoakFlights):
        leaked.append(np.ones(1 << 20))  # 8 MB: what the other tests of this process free must not hide it
        return start(self)

    monkeypatch.setattr(SoakFlights, "_start", leaky)
    config = SoakConfig(segments=60, warm_up_segments=10, threads=1, frame_hw=(30, 50))
    (fault, *_) = soak_bundle(tiny_bundle, config).faults
    assert fault.startswith("memory (RSS) grew by")


def test_command_prints_the_report_and_writes_the_table(tiny_bundle: Path, tmp_path: Path):
    flown = ["soak", str(tiny_bundle), "--segments", "40", "--warm-up", "30", "--threads", "1", "--backend", "cpu"]
    table = tmp_path / "new" / "soak.md"
    result = CliRunner().invoke(main, [*flown, "--json", "--markdown", str(table)])
    report = msgspec.json.decode(result.stdout, type=SoakReport)
    assert (report.model, report.segments, len(report.windows)) == ("tiny", 40, 10)
    assert result.exit_code == (1 if report.faults else 0)
    assert table.read_text().startswith("tiny fp32, onnx on cpu, 1 threads")


def test_command_ends_with_one_and_says_what_grew(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(soak_report, "MAX_GROWTH", -1.0)  # everything grows by more than that
    flown = ["soak", str(tiny_bundle), "--segments", "5", "--warm-up", "0", "--threads", "1", "--backend", "cpu"]
    result = CliRunner().invoke(main, flown)
    assert result.exit_code == 1
    assert "error: memory (RSS) grew by" in result.stderr
    assert "segments  minutes" in result.stdout


def test_command_refuses_what_is_no_bundle(tmp_path: Path):
    result = CliRunner().invoke(main, ["soak", str(tmp_path)])
    assert result.exit_code == 1
    assert "is no bundle: manifest.json is missing" in result.stderr
