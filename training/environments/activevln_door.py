"""`/environments` and `/batch/...`: ActiveVLN's clients drive our world by these, unmodified.

An episode is a task file of the server, or a task of the generator (`TaskFiles.episode`). A forward primitive is 25 cm
along the drone's heading, a turn primitive 15 degrees. What differs from the published server: a failing environment
has `{"error": {code, message}}` in place of its result; a call larger than the pool is 409; success is nearer than 3 m.
Source: spec/seed_systems.md 2.2-2.5.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from worldvln_edge.tasks import Task
from worldvln_edge.training.environments.activevln_episode import ActiveVLNConfig, ActiveVLNEpisode, HistoryError
from worldvln_edge.training.environments.activevln_text import FORWARD_CM, observation_text
from worldvln_edge.training.environments.env_messages import Encoding, fault_body
from worldvln_edge.training.environments.environment import (
    EnvironmentAnswer,
    EnvironmentFault,
    EnvironmentResult,
    Environments,
)
from worldvln_edge.training.environments.http_calls import RefusedRequestError
from worldvln_edge.training.environments.task_files import TaskFiles

_PREFIX = "activevln/"
_MAX_FRAMES = 10**6  # budgets end an episode, not the horizon


@dataclass(frozen=True)
class _Running:
    episode: ActiveVLNEpisode
    task: Task


class ActiveVLNDoor:
    """Handlers of the routes.

    Args:
        environments: where episodes are flown.
        tasks: what an episode's number means.
        image_hw: rows and columns of the frames; the published simulator has 480x640.
    """

    def __init__(self, environments: Environments, tasks: TaskFiles, *, image_hw: tuple[int, int]):
        self._environments, self._tasks, self._image_hw = environments, tasks, image_hw
        self._running: dict[str, _Running] = {}

    def create(self, payload: dict[str, Any], encoding: Encoding) -> dict[str, object]:
        """POST /environments: `{"success": true}`; with `errors` when some environments failed."""
        made: dict[str, _Running] = {}
        failed: dict[str, EnvironmentFault] = {}
        wishes = _map(payload, "ids2configs")
        self._check_count(len(wishes))
        for id, wish in wishes.items():
            if not isinstance(wish, dict) or wish.get("env_name", "vlnce") != "vlnce":
                failed[id] = EnvironmentFault(code="bad_task", message='env_name must be "vlnce"')
                continue
            running = self._make(wish.get("env_config", {}))
            if isinstance(running, EnvironmentFault):
                failed[id] = running
            else:
                made[id] = running
        new = {_PREFIX + id: running.task for id, running in made.items() if not self._stands(id, running)}
        if new:
            refused = self._environments.create(new, image_hw=self._image_hw, max_frames=_MAX_FRAMES)
            failed |= {id.removeprefix(_PREFIX): fault for id, fault in refused.items()}
        self._running |= {id: running for id, running in made.items() if id not in failed}
        if not failed:
            return {"success": True}
        return {"success": False, "errors": {id: fault_body(fault) for id, fault in failed.items()}}

    def reset(self, payload: dict[str, Any], encoding: Encoding) -> dict[str, object]:
        """POST /batch/reset: the drone at its start, then after every turn of its history."""
        ids = list(_map(payload, "ids2seeds"))
        results, known = self._split(ids)
        observations: dict[str, list[dict[str, object]]] = {}
        seen = self._environments.reset([_PREFIX + id for id in known])
        for id in known:
            answer = seen[_PREFIX + id]
            if isinstance(answer, EnvironmentFault):
                results[id] = self._gone(id, answer)
            else:
                known[id].episode.begin(_positions_m(answer)[0])
                observations[id] = [self._observation(known[id].episode, answer, is_first=True)]
        turns = {id: known[id].episode.history_turns for id in observations}
        for turn in range(max(map(len, turns.values()), default=0)):
            moves = {id: turns[id][turn][1] for id in observations if turn < len(turns[id])}
            for id, answer in self._fly(moves).items():
                if isinstance(answer, EnvironmentFault):
                    results[id] = self._gone(id, answer)
                    del observations[id]
                    continue
                episode = known[id].episode
                episode.fly_history(moves[id], _positions_m(answer))
                shown = self._observation(episode, answer, is_first=False)
                observations[id].append({**shown, "response": turns[id][turn][0]})
        results |= {id: [shown, {}] for id, shown in observations.items()}
        return {"results": {id: results[id] for id in ids}}

    def step(self, payload: dict[str, Any], encoding: Encoding) -> dict[str, object]:
        """POST /batch/step: one turn each; `[observation, reward, done, info]`."""
        responses = _map(payload, "ids2actions")
        results, known = self._split(responses)
        moves: dict[str, np.ndarray] = {}
        for id in known:
            response = responses[id]
            if not isinstance(response, str):
                results[id] = fault_body(EnvironmentFault(code="bad_action", message="an action must be text"))
            else:
                moves[id] = known[id].episode.plan(response)
        for id, answer in self._fly(moves).items():
            if isinstance(answer, EnvironmentFault):
                results[id] = self._gone(id, answer)
                continue
            episode = known[id].episode
            outcome = episode.finish(moves[id], _positions_m(answer)[: len(moves[id])])
            info = {**outcome.info, "collided": bool(answer.collided.any())}
            shown = self._observation(episode, answer, is_first=False)
            results[id] = [shown, outcome.reward, outcome.done, info]
        return {"results": {id: results[id] for id in responses}}

    def close(self, payload: dict[str, Any], encoding: Encoding) -> dict[str, object]:
        """POST /batch/close."""
        ids = _parameter(payload, "env_ids")
        if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
            raise RefusedRequestError("env_ids must be a list of texts")
        self._environments.close([_PREFIX + id for id in ids])
        self.forget([_PREFIX + id for id in ids])
        return {"status": "success"}

    def warm_up(self, payload: dict[str, Any], encoding: Encoding) -> dict[str, object]:
        """POST /batch/warmup: scenes of the next batch are loaded; answers at once."""
        configs = _parameter(payload, "cfgs")
        if not isinstance(configs, list):
            raise RefusedRequestError("cfgs must be a list")
        self._check_count(len(configs))
        made = [self._make(config) for config in configs]
        tasks = [running.task for running in made if isinstance(running, _Running)]
        self._environments.warm_up(tasks, image_hw=self._image_hw)
        return {"success": True}

    def forget(self, ids: Iterable[str]) -> None:
        """These environments of the pool are gone."""
        for id in ids:
            self._running.pop(id.removeprefix(_PREFIX), None)

    def _check_count(self, count: int) -> None:
        """Before tasks are looked up, which takes a generated one as long as its flight."""
        capacity = self._environments.capacity
        if count > capacity:
            raise RefusedRequestError(
                f"{count} environments were asked for and there are {capacity}; nothing was done. Ask for fewer at "
                "once, or serve more (--processes, --per-process)",
                409,
            )

    def _make(self, wish: Any) -> _Running | EnvironmentFault:
        try:
            config = msgspec.convert(wish, ActiveVLNConfig)
            task = self._tasks.episode(config.data_source, config.episode_id)
            if task.end_pos is None:
                raise RefusedRequestError(f'episode {config.episode_id} has no "end_pos", so it has no goal')
            return _Running(
                ActiveVLNEpisode(
                    config,
                    instruction=task.instruction,
                    goal_m=np.array(task.end_pos[:3]) / 100.0,
                    reference_G3=_by_primitive(np.array(task.reference_path_raw).reshape(-1, 6)[:, :3] / 100.0),
                ),
                task,
            )
        except (msgspec.ValidationError, RefusedRequestError, HistoryError) as error:
            return EnvironmentFault(code="bad_task", message=str(error))

    def _stands(self, id: str, running: _Running) -> bool:
        """Whether this environment exists and starts as the wanted one; then it is reset instead of made again."""
        now = self._running.get(id)
        return now is not None and now.episode.config.episode_key == running.episode.config.episode_key

    def _split(self, ids: Iterable[str]) -> tuple[dict[str, object], dict[str, _Running]]:
        """Errors of those that do not exist, and the others."""
        results: dict[str, object] = {}
        known: dict[str, _Running] = {}
        for id in ids:
            if id in self._running:
                known[id] = self._running[id]
            else:
                message = f"there is no environment {id!r}: it was never created, was closed, or was left idle too long"
                results[id] = fault_body(EnvironmentFault(code="unknown_environment", message=message))
        return results, known

    def _fly(self, moves: Mapping[str, np.ndarray]) -> dict[str, EnvironmentAnswer]:
        """One frame each, after the last move; who does not move only looks."""
        hover = np.zeros((1, 6))
        flown = self._environments.step(
            {_PREFIX + id: rows if len(rows) else hover for id, rows in moves.items()}, frames="last"
        )
        return {id: flown[_PREFIX + id] for id in moves}

    def _gone(self, id: str, fault: EnvironmentFault) -> dict[str, object]:
        if fault.code not in ("bad_action", "not_reset"):
            self._running.pop(id, None)
        return fault_body(fault)

    @staticmethod
    def _observation(episode: ActiveVLNEpisode, seen: EnvironmentResult, *, is_first: bool) -> dict[str, object]:
        config, buffer = episode.config, io.BytesIO()
        Image.fromarray(seen.frames[-1]).save(buffer, "PNG", compress_level=1)
        text = observation_text(
            episode.instruction,
            is_first=is_first,
            image_placeholder=config.image_placeholder,
            max_actions=config.max_actions_per_step,
            separator=config.action_sep,
        )
        picture = {"__pil_image__": base64.b64encode(buffer.getvalue()).decode()}
        return {"obs_str": text, "multi_modal_data": {config.image_placeholder: [picture]}}


def _parameter(payload: Mapping[str, Any], name: str) -> Any:
    if name not in payload:
        raise RefusedRequestError(f"Missing required parameter: {name}")
    return payload[name]


def _map(payload: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = _parameter(payload, name)
    if not isinstance(value, dict):
        raise RefusedRequestError(f"{name} must be an object")
    return value


def _positions_m(answer: EnvironmentResult) -> np.ndarray:
    return answer.poses[:, :3] / 100.0


def _by_primitive(path_T3: np.ndarray) -> np.ndarray:
    """Points every 25 cm along a path, its start included: [G, 3]; so a history of moves cuts it where it ended."""
    if not len(path_T3):
        return np.zeros((0, 3))
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(path_T3, axis=0), axis=1))])
    marks = np.arange(0.0, along[-1] + 1e-9, FORWARD_CM / 100.0)
    return np.stack([np.interp(marks, along, axis) for axis in path_T3.T], axis=1)
