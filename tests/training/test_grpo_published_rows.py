"""Replay rows as published: every number of the golden rows, and the rules that they do not show."""

import json
from pathlib import Path

import numpy as np
import pytest

from worldvln_edge.training.grpo.advantages import group_advantages, leave_one_out, ranks_01, shape_costs
from worldvln_edge.training.grpo.published_rows import Candidate, PublishedConfig, published_rows

CONFIGS = {
    "zscore": PublishedConfig(),
    "minstd": PublishedConfig(shaping="minstd_exp"),
    "loo": PublishedConfig(task_mode="dense_loo"),
}
# What a row says beside numbers, and the least cost of a group, which `xminus` and `sigma` give.
NOT_NUMBERS = {
    "video_path",
    "begin_frame_id",
    "end_frame_id",
    "fps",
    "tarsier2_caption",
    "grpo_group_id",
    "candidate_id",
    "seed",
    "traj_id",
    "grpo_traj_group_id",
    "grpo_trace_files",
    "grpo_reward_act_xmin",
    "grpo_reward_ce_xmin",
}


def _flights(arrays) -> dict[int, list[Candidate]]:
    return {
        task: [
            Candidate(
                actions_N6=arrays[f"actions_{task:06d}_k{k:02d}"], log_probs_C=arrays[f"logprob_{task:06d}_k{k:02d}"]
            )
            for k in range(4)
        ]
        for task in (0, 1)
    }


@pytest.mark.golden
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_the_published_ones(golden, name: str):
    folder: Path = golden("training")
    arrays = np.load(folder / "grpo_reward.npz")
    lines = (folder / f"grpo_rows_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    expected = {row["traj_id"]: row for row in map(json.loads, lines)}
    assert len(expected) == 24
    for task, candidates in _flights(arrays).items():
        rows = published_rows(candidates, arrays[f"gt_{task}"], CONFIGS[name])
        for k, segments in enumerate(rows):
            for clip, row in enumerate(segments, 1):
                wanted = expected[f"{task:06d}_k{k:02d}_c{clip}"]
                assert row.keys() == wanted.keys() - NOT_NUMBERS
                for field, value in row.items():
                    assert value == pytest.approx(wanted[field], rel=1e-9, abs=1e-12), (field, task, k, clip)


@pytest.mark.golden
def test_shaping_functions_are_the_published_ones(golden):
    arrays = np.load(golden("training") / "grpo_reward.npz")
    values, even = arrays["values"], arrays["const_values"]
    pairs = {
        "zscore_r": shape_costs(values, "zscore_exp").values,
        "zscore_z": shape_costs(values, "zscore_exp").distances,
        "minstd_r": shape_costs(values, "minstd_exp").values,
        "loo": leave_one_out(values),
        "rank01": ranks_01(values),
        "centered_rank": 2 * (ranks_01(values) - 0.5),
        "const_zscore_r": shape_costs(even, "zscore_exp").values,
        "const_loo": leave_one_out(even),
        "product_advantage_meanstd": group_advantages(values),
    }
    for name, found in pairs.items():
        np.testing.assert_allclose(found, arrays[name], rtol=1e-9, atol=1e-12, err_msg=name)
    # The formula gives zeros for a group of equals; the product drops it, which adds as much to the gradient.
    assert group_advantages(even) is None
    assert not arrays["product_advantage_const"].any()


def test_no_weight_is_negative_and_a_flight_that_ends_off_the_path_weighs_less():
    rng = np.random.default_rng(0)
    reference = np.concatenate([np.zeros((1, 6)), np.cumsum(np.tile([10.0, 0, 0, 0, 0, 0], (48, 1)), 0)])
    good = np.tile([10.0, 0, 0, 0, 0, 0], (48, 1))
    off = good + np.array([0.0, 25.0, 0, 0, 0, 0])
    noisy = good + rng.normal(size=(48, 6))
    rows = published_rows(
        [Candidate(actions_N6=a, log_probs_C=np.array([-9.0, -8.0, -7.0])) for a in (good, off, noisy)],
        reference,
        PublishedConfig(),
    )
    weights = np.array([[row["grpo_adv_final"] for row in flight] for flight in rows])
    assert (weights >= 0).all()
    assert (weights[0] > weights[1]).all()
    assert rows[1][0]["grpo_traj_gate"] < 1 == rows[0][0]["grpo_traj_gate"]


def test_a_shorter_flight_has_rows_of_its_segments_and_no_success_of_the_whole():
    step = np.tile([10.0, 0, 0, 0, 0, 0], (48, 1))
    reference = np.concatenate([np.zeros((1, 6)), np.cumsum(step, 0)])
    rows = published_rows(
        [
            Candidate(actions_N6=step, log_probs_C=np.zeros(3)),
            Candidate(actions_N6=step[:20], log_probs_C=np.zeros(2)),
        ],
        reference,
        PublishedConfig(),
    )
    assert [len(flight) for flight in rows] == [3, 2]
    assert rows[1][0]["grpo_traj_gate"] == 0.0
    assert rows[1][1]["grpo_succ"] == 0.0
    assert rows[1][1]["grpo_act_mse_scalar"] == 0.0


def test_an_empty_segment_is_refused():
    reference = np.zeros((49, 6))
    with pytest.raises(ValueError, match="a segment without poses has no action cost"):
        published_rows([Candidate(actions_N6=np.zeros((16, 6)), log_probs_C=np.zeros(2))], reference, PublishedConfig())
