"""Trajectory files: declared layouts and units, the golden labels, and nothing guessed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flight_files import files_no_larger_than, straight_poses
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worldvln_edge.training.data.trajectory_file import Trajectory, TrajectoryUnits, read_trajectory, write_trajectory
from worldvln_edge.training.sim.shards import FlightDataError

CM_DEG = TrajectoryUnits(length="cm", angle="deg")
M_RAD = TrajectoryUnits(length="m", angle="rad")


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "t.json"


@pytest.mark.golden
def test_labels_of_poses_are_the_golden_ones(golden: Callable[[str], Path], file: Path):
    arrays = np.load(golden("training") / "labels.npz")
    write_trajectory(file, arrays["abs_pose_cm_deg"], "pose6", CM_DEG)
    trajectory = read_trajectory(file)
    assert trajectory.frames == 49
    np.testing.assert_allclose(trajectory.deltas(), arrays["delta_rad_m"][1:], atol=1e-5)


@pytest.mark.golden
def test_motions_are_the_golden_ones(golden: Callable[[str], Path], file: Path):
    arrays = np.load(golden("training") / "labels.npz")
    write_trajectory(file, arrays["delta4_in"], "delta4", TrajectoryUnits(length="m", angle="deg"))
    np.testing.assert_allclose(read_trajectory(file).deltas(), arrays["delta4_out"][1:], atol=1e-6)
    write_trajectory(file, arrays["delta6_in"], "delta6", TrajectoryUnits(length="cm", angle="rad"))
    np.testing.assert_allclose(read_trajectory(file).deltas(), arrays["delta6_out_div100"][1:], atol=1e-6)


@pytest.mark.golden
def test_first_motion_that_is_zero_counts_like_any_other(golden: Callable[[str], Path], file: Path):
    rows = np.load(golden("training") / "labels.npz")["delta6_zero_first_in"]
    write_trajectory(file, rows, "delta6", M_RAD)
    trajectory = read_trajectory(file)
    assert trajectory.frames == len(rows) + 1
    np.testing.assert_allclose(trajectory.deltas(), rows, atol=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_labels_between_chosen_frames_do_not_depend_on_the_layout(seed: int):
    rng = np.random.default_rng(seed)
    poses = np.cumsum(rng.normal(0, 0.2, (12, 6)), axis=0)
    recorded = Trajectory("pose6", poses)
    moved = Trajectory("delta6", recorded.deltas().astype(np.float64))
    for frames in ([0, 1, 2, 3], [0, 3, 6, 11], [2, 2, 5]):
        np.testing.assert_allclose(moved.deltas(frames), recorded.deltas(frames), atol=2e-6)


def test_yaw_may_cross_half_a_turn(file: Path):
    poses = np.zeros((3, 6))
    poses[:, 4] = [179, -179, 181.5]
    write_trajectory(file, poses, "pose6", CM_DEG)
    np.testing.assert_allclose(np.degrees(read_trajectory(file).deltas()[:, 0]), [2, 0.5], atol=1e-4)


@pytest.mark.parametrize("key", [None, "preprocessed_logs", "processed_logs", "traj", "poses", "logs"])
def test_older_files_are_read_as_declared(file: Path, key: str | None):
    poses = straight_poses(5)
    rows = [[*row, 99.0] for row in poses.tolist()]  # more columns are cut
    write(file, rows if key is None else {"other": 1, key: rows})
    deltas = read_trajectory(file, layout="pose6", units=CM_DEG).deltas()
    np.testing.assert_allclose(deltas[:, 0], np.radians(0.5), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(deltas[:, 3:], axis=1), 0.1, atol=1e-6)


@pytest.mark.parametrize(
    "content", [[[0.0] * 6], {"poses": [[0.0] * 6]}, {"action6": [[0.0] * 6]}, {"action6": [[0.0] * 6], "meta": {}}]
)
def test_older_files_are_never_guessed(file: Path, content: Any):
    write(file, content)
    with pytest.raises(FlightDataError, match=r't\.json: does not say its layout and units; give "traj_layout"'):
        read_trajectory(file)


def test_action6_is_delta6_in_the_units_its_columns_name(file: Path):
    rows = [[3.0, 0, 0, 10, 0, 0]] * 2
    write(file, {"action6": rows, "meta": {"action6_layout": "dz_deg, dy_deg, dx_deg, tx_cm, ty_cm, tz_cm"}})
    trajectory = read_trajectory(file)
    assert trajectory.frames == 3
    np.testing.assert_allclose(trajectory.deltas()[0], [np.radians(3), 0, 0, 0.1, 0, 0], atol=1e-6)
    assert read_trajectory(file, units=CM_DEG).frames == 3
    with pytest.raises(FlightDataError, match="holds action6, which is delta6, but the manifest says pose6"):
        read_trajectory(file, layout="pose6")
    with pytest.raises(FlightDataError, match="columns are named in cm and deg, but the manifest says m and rad"):
        read_trajectory(file, units=M_RAD)


def test_a_declared_file_is_not_contradicted(file: Path):
    write_trajectory(file, straight_poses(3), "pose6", CM_DEG)
    read_trajectory(file, layout="pose6", units=CM_DEG)
    with pytest.raises(FlightDataError, match="says pose6 in cm and deg, but the manifest says pose6 in m and rad"):
        read_trajectory(file, units=M_RAD)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ('"text"', "no trajectory in it"),
        ('{"rows": []}', "no trajectory in it"),
        ('{"layout": "pose7", "units": {"length": "m", "angle": "deg"}, "rows": []}', "pose7"),
        ('{"layout": "pose6", "rows": [[0,0,0,0,0,0]]}', "units"),
        ('{"layout": "pose6", "units": {"length": "km", "angle": "deg"}, "rows": []}', "km"),
        ('{"layout": "pose6", "units": {"length": "m", "angle": "deg"}, "rows": [[1,2,3]]}', r"row 0 must be 6 finite"),
        ('{"layout": "pose6", "units": {"length": "m", "angle": "deg"}, "rows": []}', "holds no poses"),
        ('{"layout": "pose6", "units": {"length": "m", "angle": "deg"}, "rows": [[1,2,3,4,5,"6"]]}', "rows"),
    ],
)
def test_files_that_are_none_say_why(file: Path, content: str, message: str):
    file.write_text(content)
    with pytest.raises(FlightDataError, match=rf"t\.json: .*{message}"):
        read_trajectory(file)


def test_numbers_of_older_files_are_checked(file: Path):
    write(file, [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, True]])
    with pytest.raises(FlightDataError, match="row 1 must be 6 finite numbers"):
        read_trajectory(file, layout="pose6", units=CM_DEG)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
_KEYS = st.sampled_from(["layout", "units", "rows", "poses", "action6", "meta"])


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=_VALUES | st.dictionaries(_KEYS, _VALUES | st.sampled_from(["pose6", "delta4"]), max_size=4))
def test_any_file_is_a_trajectory_or_refused_by_name(file: Path, content: Any):
    write(file, content)
    refused, rows = "", np.zeros(0)
    try:
        rows = read_trajectory(file, units=CM_DEG).rows
    except FlightDataError as error:
        refused = str(error)
    assert refused.startswith(f"{file}: ") or (not refused and np.isfinite(rows).all())


def test_missing_file_is_named(file: Path):
    with pytest.raises(FlightDataError, match=r"t\.json: No such file"):
        read_trajectory(file)


def test_frame_without_a_pose_is_refused():
    with pytest.raises(IndexError, match="frame 5 has no pose, the trajectory covers 5 frames"):
        Trajectory("pose6", straight_poses(5)).deltas([0, 5])


@pytest.mark.parametrize("rows", [np.zeros((3, 4)), np.full((3, 6), np.nan), np.zeros(6)])
def test_only_rows_of_the_layout_are_written(file: Path, rows: np.ndarray):
    with pytest.raises(ValueError, match="pose6 needs finite rows of 6"):
        write_trajectory(file, rows, "pose6", CM_DEG)
    assert not file.exists()


def test_full_disk_is_said_and_leaves_nothing(file: Path):
    with files_no_larger_than(1000), pytest.raises(FlightDataError, match=r"t\.json: cannot be written .*nothing"):
        write_trajectory(file, straight_poses(500), "pose6", CM_DEG)
    assert list(file.parent.iterdir()) == []
