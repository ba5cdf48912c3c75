"""The weight file of a bundle: planned whole, then written one tensor at a time; an interrupted run goes on.

All graphs of a bundle keep their tensors in one file, each content once. The places are known before the first byte is
written, because sizes are. A journal beside the file says which tensors are complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from worldvln_edge.export.planned_tensor import CastReport, CastReports, PlannedTensor, TensorReader
from worldvln_edge.export.progress import Note, Progress
from worldvln_edge.export.tracing import ExportError

WEIGHTS_FILE = "weights.bin"
JOURNAL_FILE = ".journal.jsonl"
"""In the folder until the bundle is whole; who finishes the bundle deletes it."""
_PAGE_BYTES = 4096  # large tensors begin on a page, so that an engine can map them instead of reading them
_SMALL_BYTES = 64 << 10
_SMALL_ALIGNMENT = 64
_SYNC_BYTES = 256 << 20
_SPARE_BYTES = 64 << 20  # graphs, tokenizer, manifest


class WeightFile:
    """Places of all tensors, in the order in which they are written."""

    def __init__(self, tensors: Iterable[PlannedTensor]):
        self.places: dict[str, int] = {}
        self._tensors: list[PlannedTensor] = []
        end = 0
        for tensor in tensors:
            if tensor.identity not in self.places:
                alignment = _PAGE_BYTES if tensor.size_bytes >= _SMALL_BYTES else _SMALL_ALIGNMENT
                offset = end + -end % alignment
                self.places[tensor.identity] = offset
                self._tensors.append(tensor)
                end = offset + tensor.size_bytes
        self.size_bytes = end

    def write(
        self,
        folder: Path,
        read: TensorReader,
        reports: CastReports,
        *,
        run: Mapping[str, str],
        progress: Progress | None = None,
        note: Note | None = None,
    ) -> None:
        """Write what is not there yet.

        Args:
            folder: holds the file and its journal.
            read: checkpoint tensors.
            reports: losses of casts; those of tensors written earlier are put back.
            run: what the file is made from, by its name in a sentence. What a run left in the folder that differs in
                any of it is deleted.
            progress: called before every tensor, in bytes.
            note: told why the work starts over.

        Raises:
            ExportError: not enough disk.
            CastOverflowError: a tensor does not fit its dtype; it is the first one.
            CheckpointError: a tensor that cannot be read or holds NaN.
        """
        done = self._take_up(folder, dict(run), reports, note)
        start = self._end(done)
        free = shutil.disk_usage(folder).free
        if free < self.size_bytes - start + _SPARE_BYTES:
            raise ExportError(
                f"{folder.parent} has {free / 1e9:.1f} GB free, the bundle needs {self.size_bytes / 1e9:.1f} GB "
                f"({(self.size_bytes - start) / 1e9:.1f} GB of it still to be written); make room, or choose a smaller "
                "precision"
            )
        try:
            self._append(folder, read, reports, done, progress)
        except OSError as error:
            raise ExportError(
                f"{folder / WEIGHTS_FILE} cannot be written ({error.strerror}); make room and run the same export "
                "again: it goes on where it was"
            ) from error

    def _append(
        self, folder: Path, read: TensorReader, reports: CastReports, done: int, progress: Progress | None
    ) -> None:
        start = self._end(done)
        with (
            (folder / WEIGHTS_FILE).open("ab") as stream,
            (folder / JOURNAL_FILE).open("a", encoding="utf-8") as lines,
        ):
            stream.truncate(start)
            stream.seek(start)
            unsynced: list[str] = []
            pending = 0
            for tensor in self._tensors[done:]:
                if progress is not None:
                    progress(tensor.identity.split("|")[0], stream.tell(), self.size_bytes)
                stream.write(b"\0" * (self.places[tensor.identity] - stream.tell()))
                data = tensor.make(read)
                if data.nbytes != tensor.size_bytes:
                    raise ExportError(
                        f"{tensor.identity}: {data.nbytes} bytes were made, {tensor.size_bytes} are planned"
                    )
                stream.write(memoryview(data.reshape(-1).view("uint8")))
                loss = reports.losses.get(tensor.key or "")
                unsynced.append(json.dumps({"tensor": tensor.identity, "loss": asdict(loss) if loss else None}))
                pending += data.nbytes
                if pending >= _SYNC_BYTES:
                    _sync(stream, lines, unsynced)
                    pending = 0
            _sync(stream, lines, unsynced)

    def _take_up(self, folder: Path, run: dict[str, str], reports: CastReports, note: Note | None) -> int:
        """Number of tensors that an earlier run of the same work has completed."""
        journal = folder / JOURNAL_FILE
        rows = _rows(journal)
        path = folder / WEIGHTS_FILE
        done = 0
        earlier = rows[0].get("run") if rows else None
        if earlier == run and path.exists():
            for tensor, row in zip(self._tensors, rows[1:], strict=False):
                if row.get("tensor") != tensor.identity or self._end(done + 1) > path.stat().st_size:
                    break
                done += 1
                if row.get("loss"):
                    reports.losses[str(tensor.key)] = CastReport(**row["loss"])
        elif isinstance(earlier, dict) and note is not None:
            changed = ", ".join(name for name in run if earlier.get(name) != run[name])
            note(f"an unfinished export in {folder} was made from another {changed}: it starts over")
        if done == 0:
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        kept = [{"run": run}, *rows[1 : done + 1]]
        journal.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        return done

    def _end(self, done: int) -> int:
        if done == 0:
            return 0
        last = self._tensors[done - 1]
        return self.places[last.identity] + last.size_bytes


def _rows(journal: Path) -> list[dict]:
    """Rows of the journal up to the first broken one."""
    rows: list[dict] = []
    if journal.exists():
        for line in journal.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _sync(stream, lines, unsynced: list[str]) -> None:
    """Bytes first, then the lines that promise them."""
    stream.flush()
    os.fdatasync(stream.fileno())
    lines.write("".join(line + "\n" for line in unsynced))
    lines.flush()
    unsynced.clear()
