"""One episode as ActiveVLN's environment plays it: turns of text actions, budgets, and a reward at the end.

The world is left out: `plan` says which moves a turn makes, the caller flies them, `finish` is told where they led.
Positions are metres; distances Euclidean, since nothing blocks the air.
Source: spec/seed_systems.md 2.2 (fields), 2.4 (order of a step), 2.5 (reward); golden activevln_env.json.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np

from worldvln_edge.training.environments.activevln_text import (
    ActionSpace,
    ParsedResponse,
    TextAction,
    parse_action,
    parse_response,
)
from worldvln_edge.training.evaluation.navigation_metrics import ndtw

SUCCESS_M = 3.0
REACHED, NOT_REACHED = "successfully reached the goal.", "stopped but goal not reached."
TURNS_EXCEEDED, STEPS_EXCEEDED = "number of turns exceeded.", "number of steps exceeded."
BAD_FORMAT = "unexpected format."
RewardType = Literal["success", "weighted_success", "success_ndtw", "weighted_success_ndtw"]
_Budget = Annotated[int, msgspec.Meta(ge=0, le=10**6)]


class ActiveVLNConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`env_config` of a client; fields that only the published simulator has are ignored."""

    prompt_format: Literal["no_think_no_tag"] = "no_think_no_tag"
    max_actions_per_step: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3
    action_sep: Annotated[str, msgspec.Meta(min_length=1)] = ","
    image_placeholder: str = "<image>"
    special_token_list: tuple[str, ...] | None = None
    episode_id: int = 1
    history_actions: tuple[str, ...] = ()
    data_source: Literal["r2r", "rxr"] = "r2r"
    action_space: ActionSpace = "r2r"
    step_budget: _Budget = 0
    turn_budget: _Budget = 0
    reward_type: RewardType = "success"
    success_reward_base: float = 10.0
    ndtw_reward_base: float = 5.0

    @property
    def episode_key(self) -> tuple[object, ...]:
        """Equal for environments that start alike."""
        return self.episode_id, self.history_actions, self.data_source


class HistoryError(ValueError):
    """An action before the start that is none, or a stop."""


@dataclass(frozen=True, kw_only=True)
class TurnOutcome:
    reward: float
    done: bool
    info: dict[str, object]


class ActiveVLNEpisode:
    """State of an episode.

    Args:
        config: the client's.
        instruction: of the task.
        goal_m: [3].
        reference_G3: positions of the expert, one per forward primitive, start included.

    Raises:
        HistoryError: `history_actions` cannot be flown.
    """

    def __init__(self, config: ActiveVLNConfig, *, instruction: str, goal_m: np.ndarray, reference_G3: np.ndarray):
        self.config, self.instruction = config, instruction
        self._goal_m, self._reference_G3 = np.asarray(goal_m, np.float64), np.asarray(reference_G3, np.float64)
        self._history = tuple(_history_action(text, config.action_space) for text in config.history_actions)
        self.begin(np.zeros(3))

    def begin(self, start_m: np.ndarray) -> None:
        """The drone stands at its start, [3]."""
        self._locations = [np.asarray(start_m, np.float64)]
        self._position_m = self._locations[0]
        self._before_rollout = 1
        self._turn = self._step = 0
        self._was_near = self.distance_m < SUCCESS_M
        self._total_reward = 0.0
        self._turns: list[dict[str, object]] = []
        self._response, self._pending, self._said = "", "", self._parse("")
        self.end_reason = ""
        self._began_s = time.monotonic()

    @property
    def history_turns(self) -> list[tuple[str, np.ndarray]]:
        """What is flown before the policy begins: text of a turn, and its moves [n, 6]."""
        size = self.config.max_actions_per_step
        return [
            (
                f"{self.config.action_sep} ".join(self.config.history_actions[first : first + size]),
                _moves(self._history[first : first + size]),
            )
            for first in range(0, len(self._history), size)
        ]

    @property
    def distance_m(self) -> float:
        return float(np.linalg.norm(self._position_m - self._goal_m))

    @property
    def is_done(self) -> bool:
        return bool(self.end_reason)

    def fly_history(self, moves_N6: np.ndarray, positions_N3: np.ndarray) -> None:
        """Moves of `history_turns` were flown and led there."""
        self._go(moves_N6, positions_N3)
        self._before_rollout = len(self._locations)

    def plan(self, response: str) -> np.ndarray:
        """Take a policy's answer: the moves to fly now, float64 [n, 6]. `finish` has to follow."""
        self._response, self._said, self._pending = response, self._parse(response), self.end_reason
        flown: list[TextAction] = []
        if self.is_done:
            return _moves(flown)
        self._turn += 1
        if self._turn > self.config.turn_budget:
            self._pending = TURNS_EXCEEDED
        elif not self._said.is_correct:
            self._pending = BAD_FORMAT
        else:
            for action in self._said.parsed:
                self._step += 1
                if action.name == "stop":
                    self._pending = REACHED  # or not: that is known when the moves before it were flown
                    break
                flown.append(action)
                if self._step > self.config.step_budget:
                    self._pending = STEPS_EXCEEDED
                    break
        return _moves(flown)

    def finish(self, moves_N6: np.ndarray, positions_N3: np.ndarray) -> TurnOutcome:
        """The moves of `plan` were flown and led there."""
        was_done = self.is_done
        self._go(moves_N6, positions_N3)
        if self._pending == REACHED and not was_done and not self.distance_m < SUCCESS_M:
            self._pending = NOT_REACHED
        self.end_reason = self._pending
        parts = {"success_reward": 0.0, "ndtw_reward": 0.0}
        if self.is_done and not was_done:
            parts = self._reward()
        reward = sum(parts.values())
        self._total_reward += reward
        self._turns.append(
            {"response": self._said.content, "extracted_actions": list(self._said.actions), "reward": reward}
        )
        return TurnOutcome(reward=reward, done=self.is_done, info=self._info(parts))

    def _parse(self, response: str) -> ParsedResponse:
        return parse_response(
            response,
            action_space=self.config.action_space,
            separator=self.config.action_sep,
            max_actions=self.config.max_actions_per_step,
            special_tokens=self.config.special_token_list or (),
        )

    def _go(self, moves_N6: np.ndarray, positions_N3: np.ndarray) -> None:
        for move, position in zip(moves_N6, positions_N3, strict=True):
            self._position_m = np.asarray(position, np.float64)
            self._was_near |= self.distance_m < SUCCESS_M
            if move[0]:  # a turn leads nowhere
                self._locations.append(self._position_m)

    def _reward(self) -> dict[str, float]:
        config, has_stopped = self.config, self.end_reason in (REACHED, NOT_REACHED)
        success = config.success_reward_base if self.end_reason == REACHED else 0.0
        if config.reward_type.startswith("weighted"):
            success *= 1.0 - min(self.distance_m / SUCCESS_M, 1.0)
        path = 0.0
        if config.reward_type.endswith("ndtw") and has_stopped:
            path = config.ndtw_reward_base * self._path_likeness()
        return {"success_reward": success, "ndtw_reward": path}

    def _path_likeness(self) -> float:
        """nDTW of what was flown after the history against what the expert flew after it."""
        flown, reference = self._locations[self._before_rollout :], self._reference_G3[self._before_rollout :]
        if not flown or not len(reference):
            return float(not flown and not len(reference))
        return ndtw(np.stack(flown), reference, radius_m=SUCCESS_M)

    def _info(self, parts: dict[str, float]) -> dict[str, object]:
        said, config = self._said, self.config
        return {
            "llm_raw_response": self._response,
            "llm_response": said.content,
            "think_content": "",
            "action_content": said.content,
            "actions": list(said.actions),
            "format_correct": said.is_correct,
            "done": self.is_done,
            "task_success": self.end_reason == REACHED,
            "end_reason": self.end_reason,
            "distance_to_goal": self.distance_m,
            "orcale_success": self._was_near,  # the published spelling
            "episode_id": config.episode_id,
            "data_source": config.data_source,
            "action_space": config.action_space,
            "instruction": self.instruction,
            "env_local_step": self._step,
            "env_global_step": self._step + len(self._history),
            "global_start_step": len(self._history),
            "episode_elapsed_seconds": time.monotonic() - self._began_s,
            "step_budget": config.step_budget,
            "turn_budget": config.turn_budget,
            "total_reward": self._total_reward,
            "reward_components": parts,
            "gen_traj": list(self._turns),
        }


def _history_action(text: str, action_space: ActionSpace) -> TextAction:
    action = parse_action(text, action_space)
    if action is None or action.name == "stop":
        raise HistoryError(f"history_actions must be moves of the {action_space} action space, found {text[:80]!r}")
    return action


def _moves(actions: list[TextAction] | tuple[TextAction, ...]) -> np.ndarray:
    return np.concatenate([np.zeros((0, 6)), *(action.primitives_N6 for action in actions)])
