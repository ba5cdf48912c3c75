"""Parquet files that are read row group by row group, with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from worldvln_edge.training.sim.shards import FlightDataError


@contextmanager
def opened_parquet(path: Path, columns: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    """A parquet file that has the columns.

    Raises:
        FlightDataError: no such file, broken, or a column is missing.
    """
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                found = ", ".join(file.schema_arrow.names)
                raise FlightDataError(f"{path}: lacks the column {', '.join(missing)}; it has {found}")
            yield file
    except pa.ArrowException as error:
        raise FlightDataError(f"{path}: broken parquet file ({_first_line(error)}); copy it again") from error
    except OSError as error:
        raise FlightDataError(f"{path}: {error.strerror or _first_line(error)}") from error


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole parquet file, or some of its columns. Raises FlightDataError as `opened_parquet`."""
    with opened_parquet(path, columns or ()) as file:
        return file.read(columns=None if columns is None else list(columns))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
