"""How long a segment takes here: one bundle, flown in process on synthetic frames, stage by stage.

Times, work, memory, energy, and how well `world_model_step` uses the machine, whose best matrix product is measured in
the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from worldvln_edge.runtime.bench.bench_device import why_not_measurable
from worldvln_edge.runtime.bench.bench_flight import BenchConfig, SegmentTiming, fly_segments, synthetic_frames
from worldvln_edge.runtime.bench.bench_report import BenchReport, Quantiles, SegmentReport, StepRate, Work, quantiles
from worldvln_edge.runtime.bench.energy import find_energy_meter
from worldvln_edge.runtime.bench.machine_peak import measure_peak
from worldvln_edge.runtime.engines.engine import EngineError
from worldvln_edge.runtime.engines.engine_meter import Readings, StepReading
from worldvln_edge.runtime.sessions.process_memory import resident_bytes
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy


def bench_bundle(
    bundle_folder: Path, config: BenchConfig | None = None, *, on_segment: Callable[[], None] = lambda: None
) -> BenchReport:
    """Load a bundle and fly it.

    Args:
        bundle_folder: what `worldvln-edge export` wrote.
        on_segment: called after every segment, the warm-up included.

    Raises:
        BundleError: missing or corrupt bundle.
        EngineError: a graph does not load here, or the best matrix product of its device is not measurable.
        NonFiniteActionsError: the model gave NaN.
    """
    config = config or BenchConfig()
    start = time.perf_counter()
    policy = load_policy(bundle_folder, backend=config.backend, threads=config.threads)
    load_s = time.perf_counter() - start
    device = policy.info.device
    if device != "cpu" and (reason := why_not_measurable(device)) is not None:
        raise EngineError(f"a bench compares with the device's best matrix product, which is not measurable: {reason}")
    timings: list[SegmentTiming] = []
    fit = quantiles([_fit_ms(policy, frame) for frame in synthetic_frames(config.frame_hw, 16, config.seed)])
    energy = find_energy_meter()
    flown = fly_segments(policy, config)
    for _ in range(config.warm_up_segments):
        next(flown)
        on_segment()
    if energy is not None:
        energy.start()
    for timing in flown:
        timings.append(timing)
        on_segment()
    joules = energy.stop() / config.segments if energy is not None else None
    rss, peak_rss = resident_bytes("VmRSS"), resident_bytes("VmHWM")  # before the arrays of the measured peak are there
    size = 2048 if device == "cpu" else 8192  # large enough to fill the device
    peak = measure_peak(threads=config.threads, size=size, seconds=config.peak_seconds, device=device)
    steps = [step for timing in timings for step in timing.readings.steps]
    step_flops = _rate(steps)
    info = policy.info
    of_segment = {
        segment: [timing for timing in timings if timing.segment == segment]
        for segment in sorted({timing.segment for timing in timings})
    }
    return BenchReport(
        model=info.name,
        precision=info.precision,
        backend=info.backend,
        device=info.device,
        threads=config.threads,
        bundle_bytes=sum(entry.size_bytes for entry in policy.manifest.files.values()),
        weight_bytes=sum(
            entry.size_bytes
            for name, entry in policy.manifest.files.items()
            if not name.endswith((".json", ".engine", ".log"))
        ),
        load_s=load_s,
        actions_per_segment=info.horizon.step,
        fit_ms=fit,
        segment=quantiles([timing.total_ms for timing in timings]),
        host=quantiles([timing.host_ms for timing in timings]),
        stages=_stages(timings),
        segments=[_segment_report(segment, runs) for segment, runs in of_segment.items()],
        stages_by_segment=[
            {stage: each.p50_ms for stage, each in _stages(runs).items()} for runs in of_segment.values()
        ],
        steps=_step_rates(steps, peak.matmul_flops),
        step_flops=step_flops,
        step_peak_share=step_flops / peak.matmul_flops,
        peak=peak,
        kv_bytes=max(timing.kv_bytes for timing in timings),
        kv_workspace_bytes=policy.workspace.size_bytes,
        rss_bytes=rss,
        peak_rss_bytes=peak_rss,
        energy_j_per_segment=joules,
        energy_source=energy.source if energy is not None else None,
    )


def _fit_ms(policy: WorldVLNPolicy, frame: np.ndarray) -> float:
    start = time.perf_counter()
    policy.fit_frame(frame)
    return (time.perf_counter() - start) * 1e3


def _segment_report(segment: int, timings: list[SegmentTiming]) -> SegmentReport:
    return SegmentReport(
        segment=segment,
        total=quantiles([timing.total_ms for timing in timings]),
        host=quantiles([timing.host_ms for timing in timings]),
        ahead=quantiles([timing.ahead_ms for timing in timings]),
        work=_work([(timing.counted, timing.readings) for timing in timings]),
        work_ahead=_work([(timing.ahead_counted, timing.ahead_readings) for timing in timings]),
    )


def _work(runs: list[tuple[dict[str, int], Readings]]) -> Work:
    def median(values: list[int]) -> int:
        return round(float(np.median(values)))

    def counter(name: str) -> int:
        return median([counted[name] for counted, _ in runs])

    return Work(
        token_steps=counter("token_steps"),
        world_model_calls=counter("world_model_calls"),
        frames_encoded=counter("frames_encoded"),
        latents_decoded=counter("latents_decoded"),
        io_bytes=median([readings.io_bytes for _, readings in runs]),
        kv_copied_bytes=median([readings.kv_bytes for _, readings in runs]),
    )


def _stages(timings: list[SegmentTiming]) -> dict[str, Quantiles]:
    names = dict.fromkeys(stage for timing in timings for stage in timing.stages_ms)
    return {
        stage: quantiles([timing.stages_ms[stage] for timing in timings if stage in timing.stages_ms])
        for stage in names
    }


def _step_rates(steps: list[StepReading], peak_flops: float) -> list[StepRate]:
    rates = []
    for thw in sorted({step.thw for step in steps}, key=lambda thw: (thw[0] * thw[1] * thw[2], thw)):
        calls = [step for step in steps if step.thw == thw]
        flops = _rate(calls)
        rates.append(
            StepRate(
                scale_hw=thw[1:],
                tokens=thw[0] * thw[1] * thw[2],
                calls=len(calls),
                call_p50_ms=float(np.median([call.ms for call in calls])),
                flops=flops,
                peak_share=flops / peak_flops,
            )
        )
    return rates


def _rate(steps: list[StepReading]) -> float:
    return sum(step.flops for step in steps) / (sum(step.ms for step in steps) / 1e3)
