"""Traces come back as they were written, whole or not at all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flight_files import files_no_larger_than
from safetensors import safe_open
from safetensors.torch import save_file

from worldvln_edge.training.grpo.trace import HORIZON, FlightTrace, SegmentTrace, TraceError, read_trace, write_trace


def segment(start: np.ndarray, steps: int, seed: int) -> SegmentTrace:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (2, 1, 2, 6), generator=generator, dtype=torch.uint8)
    detail = torch.randint(0, 2, (2, 2, 3, 16), generator=generator, dtype=torch.uint8)
    actions = np.random.default_rng(seed).normal(size=(steps, 6))
    return SegmentTrace(
        bits=(bits, detail),
        log_probs=(-torch.rand(bits.shape, generator=generator), torch.zeros(0)),
        actions=actions,
        poses=np.concatenate([start[None], start + np.cumsum(actions, 0)]),
    )


@pytest.fixture
def trace() -> FlightTrace:
    first = segment(np.array([1.0, 2, 300, 0, 45, 0]), 4, 0)
    second = segment(first.poses[-1], 3, 1)
    return FlightTrace(
        task_id="val-000007",
        group_id="task_000007",
        candidate_id=3,
        seed=20260320 + 7 * 1000003,
        attempt=1,
        prompt='<<<t=3s>>>fly to the "red" tower, 5 °',
        checkpoint_digest="ab" * 32,
        policy_scales="semantic",
        repetitions="last",
        latents=torch.randn(16, 3, 2, 3, generator=torch.Generator().manual_seed(2)),
        segments=(first, second),
        end_reason="budget",
        collided=True,
        environment_steps=7,
        horizon_steps=12,
    )


def test_a_trace_comes_back_as_it_was_written(trace, tmp_path):
    write_trace(trace, tmp_path / "deep" / "one.safetensors")
    found = read_trace(tmp_path / "deep" / "one.safetensors")
    plain = [name for name in trace.__dataclass_fields__ if name not in ("latents", "segments")]
    assert {name: getattr(found, name) for name in plain} == {name: getattr(trace, name) for name in plain}
    assert torch.equal(found.latents, trace.latents)
    for one, other in zip(found.segments, trace.segments, strict=True):
        assert all(torch.equal(a, b) and a.dtype == torch.uint8 for a, b in zip(one.bits, other.bits, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one.log_probs, other.log_probs, strict=True))
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_array_equal(one.poses, other.poses)
        assert (one.actions.dtype, one.poses.dtype) == (np.float64, np.float64)


def test_the_same_trace_is_the_same_file_byte_for_byte(trace, tmp_path):
    for name in ("one", "two"):
        write_trace(trace, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_flight_that_was_stopped_stands_where_it_was_until_the_horizon_is_over(trace):
    completed = trace.completed_poses()
    assert completed.shape == (13, 6)
    np.testing.assert_array_equal(completed[:8], trace.flown_poses())
    np.testing.assert_array_equal(completed[8:], np.tile(trace.segments[1].poses[-1], (5, 1)))
    assert trace.environment_steps_saved == 5


def test_the_log_probability_of_a_segment_is_the_sum_over_its_scored_bits(trace):
    one = trace.segments[0]
    assert one.log_prob == pytest.approx(float(one.log_probs[0].double().sum()), abs=1e-12)


def test_a_missing_a_truncated_and_a_foreign_file_say_what_to_do(trace, tmp_path):
    path = tmp_path / "one.safetensors"
    with pytest.raises(TraceError, match=r"one.safetensors: no such trace; collect the flights first"):
        read_trace(path)
    write_trace(trace, path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(TraceError, match=r"is truncated or no trace .*only this flight is flown anew"):
            read_trace(path)
    save_file({"latents": trace.latents}, path)
    with pytest.raises(TraceError, match="a safetensors file, but no trace of a flight; take it out of the folder"):
        read_trace(path)


def rewritten(path: Path, metadata=None, **tensors) -> None:
    with safe_open(path, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        header = file.metadata()
    kept.update(tensors)
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, path, metadata=metadata or header)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"flight": '{"task_id": "x"}'}}, "does not fit this version"),
        ({"latents": None}, "does not fit this version"),
        ({"latents": torch.zeros(3)}, "latents, segments and steps do not fit together"),
        ({"0.poses": torch.zeros(4, 6, dtype=torch.float64)}, "segment 0 holds tensors that do not fit together"),
        ({"1.log_probs.0": torch.zeros(2)}, "segment 1 holds tensors that do not fit together"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(trace, tmp_path, change, message):
    path = tmp_path / "one.safetensors"
    write_trace(trace, path)
    rewritten(path, **change)
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_numbers_that_are_none_are_not_written(trace, tmp_path):
    broken = replace(trace.segments[1], actions=np.full((3, 6), np.nan))
    with pytest.raises(TraceError, match=r"1.actions of task 'val-000007' holds NaN or infinity; nothing was written"):
        write_trace(replace(trace, segments=(trace.segments[0], broken), end_reason=HORIZON), tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_trace_and_nothing_else(trace, tmp_path):
    path = tmp_path / "one.safetensors"
    write_trace(trace, path)
    before = path.read_bytes()
    with files_no_larger_than(1000), pytest.raises(TraceError, match=r"cannot be written .*; make room"):
        write_trace(replace(trace, seed=1), path)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before
