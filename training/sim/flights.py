"""Expert flights as training data: frames, achieved motion and instruction, in shards (`shards.py`).

Source: spec/training.md 8.1, 8.6.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from worldvln_edge.atomic import atomic_file
from worldvln_edge.poses import actions_between
from worldvln_edge.tasks import Task
from worldvln_edge.training.sim.perturbation import PerturbationConfig, perturb_path
from worldvln_edge.training.sim.shards import (
    SETTINGS_FILE,
    FlightDataError,
    present_shards,
    refuse_foreign_shards,
    shard_sizes,
)
from worldvln_edge.training.sim.simulator import Simulator
from worldvln_edge.training.sim.tasks import Split, generate_task, score_flight

_FORMAT = 2
_PERTURBED_CLEARANCE_M = 0.15
_PERTURBED_DRAWS = 12


@dataclass(frozen=True)
class Flight:
    task: Task
    frames: np.ndarray  # uint8 [49, H, W, 3]
    actions: np.ndarray  # float64 [48, 6], achieved, cm and deg
    poses: np.ndarray  # float64 [49, 6], achieved
    collided: bool

    @property
    def instruction(self) -> str:
        return self.task.instruction


@dataclass(frozen=True, kw_only=True)
class FlightsConfig:
    """What all shards of a folder share."""

    split: Split
    image_hw: tuple[int, int] = (64, 64)
    shard_flights: int = 64
    dynamics: Literal["kinematic", "tracked"] = "kinematic"
    perturbation: PerturbationConfig | None = None

    def __post_init__(self) -> None:
        if self.shard_flights < 1:
            raise ValueError(f"shard_flights must be >= 1, found {self.shard_flights}")


def fly_expert(
    task: Task,
    *,
    image_hw: tuple[int, int] = (64, 64),
    perturbation: PerturbationConfig | None = None,
    seed: int = 0,
    simulator: Simulator | None = None,
) -> Flight:
    """Fly the expert's path of a task and record what the camera sees.

    Args:
        task: with `reference_path_raw` of 49 poses.
        image_hw: size of the frames; ignored when `simulator` is given.
        perturbation: disturbs `perturbation.share` of the flights (drawn by `seed`); None flies the path itself.
        seed: of the disturbance and of the wind.
        simulator: one that stands in the task's scene, to be used again; None makes one and closes it.

    Raises:
        FlightDataError: the task has no reference path.
        RenderingUnavailableError: no offscreen OpenGL on this machine.
    """
    if len(task.reference_path_raw) < 2:
        raise FlightDataError(f'task {task.task_id!r} has no "reference_path_raw", so there is nothing to fly')
    if simulator is None:
        with Simulator.for_task(task, image_hw=image_hw) as own:
            return fly_expert(task, perturbation=perturbation, seed=seed, simulator=own)
    path = np.array(task.reference_path_raw)
    if perturbation is not None:
        path = _perturbed(task, path, perturbation, simulator, np.random.default_rng([4, seed]))
    frames, collided = [simulator.reset(path[0], seed)], False
    for action in actions_between(path):
        seen = simulator.step(action)
        frames.append(seen.frame)
        collided |= seen.collided
    return Flight(task, np.stack(frames), simulator.labels, simulator.poses, collided)


def generate_flights(
    config: FlightsConfig, count: int, out_dir: str | Path, *, workers: int = 2, show_progress: bool = True
) -> list[Path]:
    """Fly tasks 0 .. count-1 of a split and write them as shards. The same call goes on with an unfinished folder.

    Args:
        config: split, frame size, shard size, dynamics, perturbation.
        count: flights in all.
        out_dir: folder of the shards; made if missing. It may hold shards of the same run, which are kept.
        workers: processes; one per core.
        show_progress: a bar on stderr.

    Returns:
        Paths of all shards, in order.

    Raises:
        FlightDataError: the folder holds flights of another run: another count, other settings, or unknown ones.
    """
    if count < 1 or workers < 1:
        raise ValueError(f"count and workers must be >= 1, found {count} and {workers}")
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    shards = shard_sizes(count, config.shard_flights)
    _claim_folder(folder, config, count)
    refuse_foreign_shards(folder, [path.name for path in present_shards(folder)], shards)
    missing = [name for name in shards if not (folder / name).exists()]
    with tqdm(total=count, unit="flight", disable=not show_progress, smoothing=0.1) as bar:
        bar.update(count - sum(shards[name][1] for name in missing))
        if workers == 1:
            for name in missing:
                bar.update(_write_shard(config, *shards[name], folder / name))
        elif missing:
            # Spawned, not forked: a fork would share the parent's OpenGL state.
            with ProcessPoolExecutor(min(workers, len(missing)), mp_context=get_context("spawn")) as pool:
                jobs = [pool.submit(_write_shard, config, *shards[name], folder / name) for name in missing]
                try:
                    for job in as_completed(jobs):
                        bar.update(job.result())
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
    return [folder / name for name in shards]


def _perturbed(
    task: Task, path: np.ndarray, config: PerturbationConfig, simulator: Simulator, rng: np.random.Generator
) -> np.ndarray:
    """A disturbed path that hits nothing and still ends in success, or the path itself."""
    if rng.random() >= config.share:
        return path
    for _ in range(_PERTURBED_DRAWS):
        flown = perturb_path(path, config, rng)
        free = simulator.scene_model.path_clearance_m(flown, stop_below_m=_PERTURBED_CLEARANCE_M)
        if free >= _PERTURBED_CLEARANCE_M and score_flight(task, flown, False).success:
            return flown
    return path


def _fly_many(config: FlightsConfig, first: int, count: int) -> Iterator[Flight]:
    """Expert flights of neighbouring tasks; those in one scene share a simulator, which costs more than a flight."""
    simulator, scene = None, None
    try:
        for index in range(first, first + count):
            task = generate_task(config.split, index, dynamics=config.dynamics)
            if simulator is None or task.scene != scene:
                if simulator is not None:
                    simulator.close()
                simulator, scene = Simulator.for_task(task, image_hw=config.image_hw), task.scene
            yield fly_expert(task, perturbation=config.perturbation, seed=task.seed, simulator=simulator)
    finally:
        if simulator is not None:
            simulator.close()


def _write_shard(config: FlightsConfig, first: int, count: int, path: Path) -> int:
    flights = list(_fly_many(config, first, count))
    magnitudes = np.full((count, 2), np.nan, np.float32)
    for row, flight in zip(magnitudes, flights, strict=True):
        row[: len(flight.task.magnitude)] = flight.task.magnitude
    arrays: dict[str, Any] = {
        "frames": np.stack([flight.frames for flight in flights]),
        "actions": np.stack([flight.actions for flight in flights]).astype(np.float32),
        "poses": np.stack([flight.poses for flight in flights]).astype(np.float32),
        "instructions": np.array([flight.instruction for flight in flights]),
        "kinds": np.array([flight.task.kind for flight in flights]),
        "magnitudes": magnitudes,
        "landmarks": np.array([flight.task.landmark or "" for flight in flights]),
        "task_indices": np.arange(first, first + count, dtype=np.int64),
    }
    with atomic_file(path) as building:
        np.savez(building, **arrays)
    return count


def _claim_folder(folder: Path, config: FlightsConfig, count: int) -> None:
    """Write what the run is beside its shards, or refuse a folder that holds another."""
    # Through JSON, so that tuples compare equal to what the file holds.
    settings = json.loads(json.dumps({"format": _FORMAT, "count": count, **asdict(config)}))
    file = folder / SETTINGS_FILE
    if not file.exists():
        if present_shards(folder):
            raise FlightDataError(f"{folder} holds shards but no {SETTINGS_FILE} that says of which run; use another")
        with atomic_file(file) as building:
            building.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FlightDataError(f"{file}: not JSON ({error}); use another folder") from error
    if found != settings:
        raise FlightDataError(
            f"{folder} holds flights of another run ({_difference(found, settings)}); "
            "use another folder, or the same options"
        )


def _difference(found: Any, settings: dict[str, Any]) -> str:
    """What two runs differ in, for a person."""
    if not isinstance(found, dict):
        return f"{SETTINGS_FILE} holds no settings"
    keys = [key for key in {**settings, **found} if found.get(key) != settings.get(key)]
    shown = [f"{key} is {json.dumps(found.get(key))} there and {json.dumps(settings.get(key))} here" for key in keys]
    return "; ".join(shown)
