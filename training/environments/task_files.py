"""Tasks that a request names instead of carrying: files of the server's folder, or tasks of the generator."""

from __future__ import annotations

import re
import threading
from functools import lru_cache
from pathlib import Path

from worldvln_edge.tasks import Task, TaskFileError, read_task
from worldvln_edge.training.environments.http_calls import RefusedRequestError
from worldvln_edge.training.sim.tasks import Split, generate_task

_TASK_ID = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
_MAX_INDEX = 999_999


class TaskFiles:
    """Looks tasks up.

    Args:
        root: folder of `<task_id>.json`; None: there are no files.
        split: of the generator, for episodes that have no file.
    """

    def __init__(self, root: Path | None = None, *, split: Split = "train"):
        self._root = None if root is None else root.resolve()
        self._split: Split = split
        self._drawing = threading.Lock()  # the generator looks into scenes that only one thread may use

    def find(self, task_id: str, json_path: str = "") -> tuple[Task | None, str]:
        """The task and the name of its file; (None, "") if there is none of that id.

        Args:
            task_id: stem of a file in the folder.
            json_path: a file's path on this machine; wins over `task_id`.

        Raises:
            RefusedRequestError: a bad id, a path outside of the folder, or a file that holds no task.
        """
        if task_id and not _TASK_ID.fullmatch(task_id):
            raise RefusedRequestError("task_id must be 1 to 128 of A-Z a-z 0-9 . _ - and not start with a dot")
        if json_path:
            path = Path(json_path).resolve()
            if self._root is None or not path.is_relative_to(self._root):
                raise RefusedRequestError("task_json_path is outside of the folder of tasks")
        elif task_id and self._root is not None:
            path = self._root / f"{task_id}.json"
            if not path.is_file():
                return None, ""
        else:
            return None, ""
        try:
            return read_task(path), path.name
        except TaskFileError as error:
            raise RefusedRequestError(str(error).replace(f"{path.parent}/", "")) from None

    def episode(self, data_source: str, number: int) -> Task:
        """A numbered episode: file `<data_source>-<number>.json` or `<number>.json`, else the generator's task.

        Raises:
            RefusedRequestError: the number is out of range, or the file holds no task.
        """
        if not 0 <= number <= _MAX_INDEX:
            raise RefusedRequestError(f"episode_id must be 0 to {_MAX_INDEX}, found {number}")
        for name in (f"{data_source}-{number}", str(number)):
            task, _ = self.find(name)
            if task is not None:
                return task
        with self._drawing:
            return _generated(self._split, number)


@lru_cache(maxsize=1024)
def _generated(split: Split, number: int) -> Task:
    """Kept, because drawing one costs as much as flying it and every candidate of a group asks for the same."""
    return generate_task(split, number)
