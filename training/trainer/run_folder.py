"""A run's folder: whose run it is, one process group at a time, and where its files lie.

`run.json` says what the run depends on (recipe, preset, data, seed). A folder of another run is refused, with what
differs; how many processes take part may change.
Source: spec/training.md 2.8 (config hash).
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from worldvln_edge.atomic import atomic_file
from worldvln_edge.training.trainer.distributed import Ranks

RUN_FILE, CURVE_FILE, CURVE_PICTURE = "run.json", "loss_curve.jsonl", "loss_curve.png"
CHECKPOINTS, EVENTS = "checkpoints", "tensorboard"


class WorkFolderError(ValueError):
    """The work folder belongs to another run, or to another process."""


@contextmanager
def open_run(folder: Path, identity: Mapping[str, Any], ranks: Ranks) -> Iterator[Path]:
    """Hold `folder` for the run that `identity` describes; it is made on first use.

    Args:
        folder: of the run.
        identity: everything that the result depends on, as JSON values.
        ranks: the first one looks, the others hear of it.

    Raises:
        WorkFolderError: another run's folder (with up to five differences), something else's, or in use.
    """
    if not ranks.is_first:
        _agree(ranks, None)
        yield folder
        return
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
        # A record lock: unlike flock, it does not live on in the workers of a process that was killed.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        problem = _check(folder, _plain(identity))
    except BlockingIOError:
        problem = f"{folder} is in use by another training process; wait for it to end, or give another --work folder"
    except OSError as error:
        problem = f"{folder} cannot be used as a work folder: {error.strerror or error}"
    try:
        _agree(ranks, problem)
        yield folder
    finally:
        if lock is not None:
            lock.close()


def is_run(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether `folder` holds the run that `identity` describes.

    Raises:
        WorkFolderError: it holds another one.
    """
    if not (folder / RUN_FILE).exists():
        return False
    problem = _check(folder, _plain(identity))
    if problem is not None:
        raise WorkFolderError(problem)
    return True


def identity_hash(identity: Mapping[str, Any]) -> str:
    """sha256 of an identity, independent of the order of its keys."""
    return hashlib.sha256(msgspec.json.encode(_plain(identity), order="sorted")).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two JSON values, as `path: old there, new here`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in {**old, **new}:
            below = f"{path}.{key}" if path else str(key)
            found += differences(old.get(key, "nothing"), new.get(key, "nothing"), below)
        return found
    return [] if old == new else [f"{path}: {_short(old)} there, {_short(new)} here"]


def _agree(ranks: Ranks, problem: str | None) -> None:
    problem = ranks.gather(problem)[0]
    if problem is not None:
        raise WorkFolderError(problem)


def _check(folder: Path, identity: dict[str, Any]) -> str | None:
    file = folder / RUN_FILE
    if not file.exists():
        if (folder / CHECKPOINTS).exists() or (folder / CURVE_FILE).exists():
            return f"{folder} holds a run but no {RUN_FILE} that says which; give an empty --work folder"
        with atomic_file(file) as building:
            building.write_bytes(msgspec.json.format(msgspec.json.encode(identity), indent=1) + b"\n")
        return None
    try:
        found = msgspec.json.decode(file.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return f"{file}: not JSON ({error}); give an empty --work folder"
    if not isinstance(found, dict):
        return f"{file}: describes no run; give an empty --work folder"
    changed = differences(found, identity)
    if not changed:
        return None
    listed = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
    return f"{folder} holds another run: {listed}. Give another --work folder"


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON would give it back, so that tuples equal lists."""
    return msgspec.json.decode(msgspec.json.encode(dict(identity)))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= 40 else f"{text[:37]}..."
