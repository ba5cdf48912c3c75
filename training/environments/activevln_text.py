"""ActiveVLN's words: the text actions of a policy, and the text that shows it an observation.

Source: spec/seed_systems.md 2.3; golden activevln_env.json (`parse_action`, `prompts`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

ActionSpace: TypeAlias = Literal["r2r", "rxr"]
FORWARD_CM, TURN_DEG = 25, 15
"""What one primitive of the simulator moves."""
_TURNS_DEG: dict[ActionSpace, tuple[int, ...]] = {"r2r": (15, 30, 45), "rxr": (30, 60, 90)}
_FORWARDS_CM = (25, 50, 75)
_ACTION = re.compile(r"(?P<forward>move forward) (?P<cm>\d+)cm|(?P<turn>turn left|turn right) (?P<deg>\d+) degrees")


@dataclass(frozen=True, kw_only=True)
class TextAction:
    name: Literal["move forward", "turn left", "turn right", "stop"]
    amount: int | None = None  # cm or deg

    @property
    def primitives_N6(self) -> np.ndarray:
        """The moves that make it up, as actions of the drone: float64 [N, 6], cm and deg; stop has none.

        A primitive goes 25 cm forward or turns by 15 deg; yaw grows to the right.
        """
        if self.amount is None:
            return np.zeros((0, 6))
        move = np.zeros(6)
        if self.name == "move forward":
            move[0] = FORWARD_CM
            return np.tile(move, (self.amount // FORWARD_CM, 1))
        move[4] = -TURN_DEG if self.name == "turn left" else TURN_DEG
        return np.tile(move, (self.amount // TURN_DEG, 1))


def parse_action(text: str, action_space: ActionSpace) -> TextAction | None:
    """One text action; None when it is none of the action space. Case counts, outer white space does not."""
    text = text.strip()
    if text == "stop":
        return TextAction(name="stop")
    match = _ACTION.fullmatch(text)
    if match is None:
        return None
    if match["forward"]:
        amount = int(match["cm"])
        return TextAction(name="move forward", amount=amount) if amount in _FORWARDS_CM else None
    amount = int(match["deg"])
    if amount not in _TURNS_DEG[action_space]:
        return None
    return TextAction(name="turn left" if match["turn"] == "turn left" else "turn right", amount=amount)


@dataclass(frozen=True, kw_only=True)
class ParsedResponse:
    """What a policy's answer says."""

    content: str  # without the special tokens
    actions: tuple[str, ...]  # at most `max_actions` of them, trimmed
    parsed: tuple[TextAction, ...]  # empty unless the format is correct

    @property
    def is_correct(self) -> bool:
        return bool(self.parsed)


def parse_response(
    text: str, *, action_space: ActionSpace, separator: str, max_actions: int, special_tokens: tuple[str, ...] = ()
) -> ParsedResponse:
    """Text actions of an answer; none, too many, or one that is unknown make the whole answer wrong."""
    for token in special_tokens:
        text = text.replace(token, "")
    content = text.strip()
    actions = [part.strip() for part in content.split(separator) if part.strip()]
    parsed = [parse_action(action, action_space) for action in actions]
    known = tuple(action for action in parsed if action is not None)
    if len(actions) > max_actions or len(known) < len(actions):
        known = ()
    return ParsedResponse(content=content, actions=tuple(actions[:max_actions]), parsed=known)


def observation_text(
    instruction: str, *, is_first: bool, image_placeholder: str, max_actions: int, separator: str
) -> str:
    """What a policy is told with an image; the trailing blank belongs to it."""
    opening = "[Initial Observation]:" if is_first else "After that, the observation is:"
    freedom = (
        "You can only take one action at a time. "
        if max_actions == 1
        else f"You can take up to {max_actions} actions at a time, separated by '{separator}'. "
    )
    return f"{opening}\n{image_placeholder}\nInstruction: {instruction}\nDecide your next action. \n{freedom}"
