"""Tables of a LeRobot dataset that we write: of frames with their motion, and of instructions.

Legend: F frames of an episode. Poses and actions: cm and deg.
Source: the format's documentation, huggingface.co/docs/lerobot/lerobot-dataset-v3.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from worldvln_edge.poses import deltas_to_actions
from worldvln_edge.rigid_motion import angles_of_rotations, integrate_deltas
from worldvln_edge.training.data.lerobot_format import ACTION, STATE

COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")


def motion_columns(deltas: np.ndarray | None) -> dict[str, np.ndarray]:
    """Pose from the start and motion to the next frame: float32 [F, 6] each, cm and deg."""
    if deltas is None:
        return {}
    positions, rotations = integrate_deltas(deltas)
    angles = np.unwrap(angles_of_rotations(rotations), axis=0)
    poses = np.concatenate([100 * positions, np.degrees(angles)], axis=1).astype(np.float32)
    return {STATE: poses, ACTION: np.concatenate([deltas_to_actions(deltas), np.zeros((1, 6), np.float32)])}


def frames_schema(has_motion: bool) -> pa.Schema:
    """Columns of a data file; the vectors only where the flights' motion is known."""
    vectors = [(key, pa.list_(pa.float32(), 6)) for key in ((STATE, ACTION) if has_motion else ())]
    counters = [(key, pa.float32() if key == "timestamp" else pa.int64()) for key in COUNTERS]
    return pa.schema(vectors + counters)


def frames_table(columns: dict[str, np.ndarray]) -> pa.Table:
    """Rows of a data file from arrays [F] and [F, 6] by column."""
    arrays = {
        key: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 6) if values.ndim == 2 else pa.array(values)
        for key, values in columns.items()
    }
    return pa.table(arrays, schema=frames_schema(STATE in columns))


def tasks_table(tasks: dict[str, int]) -> pa.Table:
    """Instructions (text -> task_index) as the index of a pandas frame, which is how LeRobot looks them up."""
    table = pa.table({"task_index": pa.array(list(tasks.values()), pa.int64()), "task": pa.array(list(tasks))})

    def column(name: str, kind: str, numpy_type: str) -> dict[str, Any]:
        return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None}

    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "pandas_version": "2.2.0",
    }
    return table.replace_schema_metadata({"pandas": msgspec.json.encode(pandas)})
