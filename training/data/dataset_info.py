"""What a dataset holds, in numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.training.data.latent_cache import LatentCache
from worldvln_edge.training.data.open_flights import ReadingOptions, kind_of_flights, open_flights
from worldvln_edge.training.sim.shards import FlightDataError

_ROWS_MEASURED = 1000


def describe_dataset(path: Path, options: ReadingOptions | None = None) -> dict[str, Any]:
    """Rows, frames, size, instructions and motion of a dataset; files and bytes of a latent cache. Ready for JSON.

    Motion is measured on at most 1000 rows, spread over all.

    Raises:
        FlightDataError: as `open_flights`, or the motion of a measured row cannot be read.
    """
    size = LatentCache(path, weights_sha256="").size()
    if size.files:
        return {"path": str(path), "kind": "latent-cache", "files": size.files, "total_bytes": size.total_bytes}
    source = open_flights(path, options)
    if not len(source):
        raise FlightDataError(f"{path}: no usable row; `worldvln-edge data check {path}` says why")
    counts = Counter(source.frame_count(row) for row in range(len(source)))
    texts = Counter(source.instruction(row) for row in range(len(source)))
    described: dict[str, Any] = {
        "path": str(path),
        "kind": kind_of_flights(path),
        "rows": len(source),
        "left_out": len(source.skipped),
        "rows_of_frames": {str(frames): rows for frames, rows in sorted(counts.items())},
        "frame_hw": list(source.frames(0).shape[1:3]),
        "instructions": len(texts),
        "most_frequent": texts.most_common(1)[0][0],
    }
    measured = np.unique(np.linspace(0, len(source) - 1, min(len(source), _ROWS_MEASURED)).astype(int))
    labels = [deltas for deltas in map(source.deltas, measured.tolist()) if deltas is not None and len(deltas)]
    described["rows_with_motion"] = f"{len(labels)} of {len(measured)} measured"
    if labels:
        stats = LabelStats.of_labels(np.concatenate(labels))
        described["mean_step_m"] = [round(v, 4) for v in stats.mean_t]
        described["std_step_m"] = [round(v, 4) for v in stats.std_t]
        described["std_yaw_pitch_roll_deg"] = [round(float(np.degrees(v)), 3) for v in stats.std_angles]
    return described
