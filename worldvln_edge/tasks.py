"""Tasks: what to fly, from where, and what counts as success. One JSON file a task, or one file with a list.

The keys are those of UAV-Flow-Eval, so its files load as they are; the simulator's own keys (`kind`, `scene`,
`success`, ...) are optional and unknown keys are ignored. Poses are [x, y, z, roll, yaw, pitch] in cm and deg.
Source: spec/session_protocol.md 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from worldvln_edge.atomic import atomic_file

Pose6 = tuple[float, float, float, float, float, float]


class TaskFileError(ValueError):
    """A task that cannot be read. The message says which file, which key, and what is wrong."""


class SceneRef(msgspec.Struct, frozen=True, kw_only=True):
    """A procedural scene: family (`city`, `rooms`) and seed."""

    family: str
    seed: int


class SuccessRule(msgspec.Struct, frozen=True, kw_only=True):
    """How near to `end_pos` a flight must end."""

    position_m: float = 1.5
    yaw_deg: float = 15.0


class Task(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One flight to make."""

    instruction: str
    initial_pos: Pose6
    task_id: str = ""
    """The file's stem when the task was read from a file of its own."""
    end_pos: Pose6 | None = None
    use_obj: int | None = None
    """1: a person, 2: a car (UAV-Flow-Eval)."""
    obj_id: int | None = None
    target_pos: Pose6 | None = None
    """Position and rotation of the object."""
    reference_path_raw: tuple[Pose6, ...] = ()
    """The expert's poses in the world, start included."""
    reference_path_preprocessed: tuple[Pose6, ...] = ()
    """The same, start-local."""

    kind: str = ""
    """Kind of motion, e.g. `forward`, `approach`."""
    magnitude: tuple[float, ...] = ()
    """The numbers that the instruction holds, in its order: m and deg. Empty when the text holds none."""
    landmark: str | None = None
    """Name of the landmark that the instruction is about."""
    scene: SceneRef | None = None
    success: SuccessRule = SuccessRule()
    seed: int = 0
    dynamics: Literal["kinematic", "tracked"] = "kinematic"


def task_from_json(record: Any, *, source: str = "task", task_id: str = "") -> Task:
    """A task from decoded JSON.

    Args:
        record: a JSON object.
        source: what to call it in errors, usually the path.
        task_id: used when the record holds none.

    Raises:
        TaskFileError: not an object, no instruction, a pose that is not 6 finite numbers, or a key of a wrong type.
    """
    if not isinstance(record, dict):
        raise TaskFileError(f"{source}: a task must be a JSON object, found {_type_name(record)}")
    fields = dict(record)
    texts = [record.get(key) for key in ("instruction", "instruction_unified")]
    spoken = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not spoken:
        raise TaskFileError(f'{source}: no instruction; give "instruction" or "instruction_unified" as non-blank text')
    fields["instruction"] = spoken[0]
    if record.get("initial_pos") is None:
        raise TaskFileError(f'{source}: "initial_pos" is missing; give the start pose as 6 numbers (cm, deg)')
    fields["initial_pos"] = _pose(record["initial_pos"], source, "initial_pos", may_be_longer=True)
    if record.get("end_pos") is not None:
        fields["end_pos"] = _pose(record["end_pos"], source, "end_pos")
    fields["target_pos"] = _object_pose(record, source)
    for key in ("reference_path_raw", "reference_path_preprocessed"):
        path = record.get(key) or []
        if not isinstance(path, list):
            raise TaskFileError(f'{source}: "{key}" must be a list of poses, found {_type_name(path)}')
        fields[key] = [_pose(pose, source, f"{key}[{i}]", may_be_longer=True) for i, pose in enumerate(path)]
    fields["task_id"] = record.get("task_id") or task_id
    try:
        return msgspec.convert(fields, Task)
    except msgspec.ValidationError as error:
        raise TaskFileError(f"{source}: {error}") from error


def read_task(path: str | Path) -> Task:
    """Read a file with one task; its `task_id` is the file's stem.

    Raises:
        TaskFileError: the file is missing, is not JSON, or holds no valid task.
    """
    record = _read_json(Path(path))
    if isinstance(record, list):
        raise TaskFileError(f"{path}: holds a list of {len(record)} tasks; read it with read_task_list")
    return task_from_json(record, source=str(path), task_id=Path(path).stem)


def read_task_list(path: str | Path) -> list[Task]:
    """Read tasks from a JSON list, from a file with one task, or from every `*.json` of a folder, in name order.

    Raises:
        TaskFileError: nothing there, not JSON, or a task in it is bad; the message names its position.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise TaskFileError(f"{path}: the folder holds no .json file")
        return [read_task(file) for file in files]
    records = _read_json(path)
    if not isinstance(records, list):
        return [task_from_json(records, source=str(path), task_id=path.stem)]
    return [
        task_from_json(record, source=f"{path}: task {i}", task_id=f"{path.stem}-{i:05d}")
        for i, record in enumerate(records)
    ]


def write_task(task: Task, path: str | Path) -> None:
    """Write one task to one file, atomically."""
    with atomic_file(Path(path)) as building:
        building.write_bytes(msgspec.json.format(msgspec.json.encode(task), indent=1))


def write_task_list(tasks: Sequence[Task], path: str | Path) -> None:
    """Write tasks as one JSON list, one task a line, atomically."""
    with atomic_file(Path(path)) as building:
        building.write_bytes(b"[\n" + b",\n".join(msgspec.json.encode(task) for task in tasks) + b"\n]\n")


def _pose(value: Any, source: str, key: str, *, may_be_longer: bool = False) -> list[float]:
    if isinstance(value, list) and (len(value) == 6 or (may_be_longer and len(value) > 6)):
        numbers = value[:6]
        if all(_is_finite_number(number) for number in numbers):
            return [float(n) for n in numbers]
    shown = str(value)
    raise TaskFileError(
        f'{source}: "{key}" must be 6 finite numbers [x, y, z, roll, yaw, pitch] in cm and deg, found {shown[:80]}'
    )


def _is_finite_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**53  # JSON integers may be too long for a float
    return isinstance(value, float) and math.isfinite(value)


def _object_pose(record: dict[str, Any], source: str) -> list[float] | None:
    """Pose of the object: `target_pos` if it is 6 long, else `obj_pos` and `obj_rot`."""
    target = record.get("target_pos")
    if isinstance(target, list) and len(target) == 6:
        return _pose(target, source, "target_pos")
    place = record.get("obj_pos")
    if isinstance(place, list) and len(place) == 3:
        turn = record.get("obj_rot")
        return _pose(place + (turn if isinstance(turn, list) else [0.0, 0.0, 0.0]), source, "obj_pos + obj_rot")
    return None


def _read_json(path: Path) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise TaskFileError(f"{path}: no such file") from None
    except OSError as error:
        raise TaskFileError(f"{path}: cannot be read ({error.strerror})") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TaskFileError(f"{path}: not JSON ({error})") from error


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
