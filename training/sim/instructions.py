"""Kinds of tasks and the words for them: paraphrase templates, magnitudes, vocabulary.

Every kind has a few templates; `{d}` is a distance in m, `{a}` an angle in deg, `{l}` a landmark. Numbers are whole
words ("6", "2.5"). Magnitudes are small discrete sets, and large enough that standing still is never a success
(spec/training.md 8.6: at least about 0.1 m or 1 deg a step in the middle of a flight; success is 1.5 m and 15 deg).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from worldvln_edge.training.sim.scene import LANDMARK_COLOURS, LANDMARK_SHAPES

_TRAVEL_M = tuple(float(d) for d in range(4, 11))
_STRAFE_M = tuple(float(d) for d in range(3, 9))
_LEVEL_M = (2.0, 2.5, 3.0, 3.5, 4.0)
_TURN_DEG = tuple(float(a) for a in range(30, 121, 15))
_TURN_WHILE_DEG = (30.0, 45.0, 60.0, 75.0, 90.0)
_TRAVEL_WHILE_M = (4.0, 5.0, 6.0, 7.0, 8.0)
_CLIMB_WHILE_M = (1.5, 2.0, 2.5, 3.0)
_ARC_DEG = (45.0, 60.0, 75.0, 90.0, 105.0, 120.0)


@dataclass(frozen=True)
class TaskKind:
    """One kind of motion. `distances_m` and `angles_deg` are what `{d}` and `{a}` may be; empty: not in the text."""

    name: str
    templates: tuple[str, ...]
    distances_m: tuple[float, ...] = ()
    angles_deg: tuple[float, ...] = ()

    @property
    def has_landmark(self) -> bool:
        return "{l}" in self.templates[0]

    def draw_magnitude(self, rng: np.random.Generator) -> tuple[float, ...]:
        """(distance), (angle), (distance, angle) or (): the numbers that the text will hold, m before deg."""
        sets = [values for values in (self.distances_m, self.angles_deg) if values]
        return tuple(float(values[int(rng.integers(len(values)))]) for values in sets)

    def say(self, template: int, magnitude: tuple[float, ...], landmark: str | None = None) -> str:
        """The instruction in the words of one template."""
        numbers = [_number(value) for value in magnitude]
        names = [name for name, values in (("d", self.distances_m), ("a", self.angles_deg)) if values]
        return self.templates[template].format(**dict(zip(names, numbers, strict=True)), l=landmark)


def _turning(direction: str, moving: str, move: str) -> tuple[str, ...]:
    return (
        f"turn {direction} by {{a}} degrees while {moving} {{d}} meters",
        f"{move} {{d}} meters while turning {direction} by {{a}} degrees",
        f"{move} {{d}} meters and turn {{a}} degrees to the {direction} on the way",
    )


def _strafe(direction: str) -> tuple[str, ...]:
    return (
        f"fly {direction} {{d}} meters",
        f"move {{d}} meters to the {direction}",
        f"strafe {direction} for {{d}} meters",
        f"slide {{d}} meters {direction} without turning",
    )


def _turn(direction: str) -> tuple[str, ...]:
    return (
        f"turn {direction} by {{a}} degrees",
        f"rotate {{a}} degrees to the {direction}",
        f"turn {{a}} degrees {direction} on the spot",
        f"yaw {direction} by {{a}} degrees",
    )


def _pass(side: str, other: str) -> tuple[str, ...]:
    return (
        f"pass the {{l}} on its {side} side",
        f"fly past the {{l}} on the {side}",
        f"go past the {{l}} and keep it on your {other}",
    )


def _circle(sense: str) -> tuple[str, ...]:
    return (
        f"circle the {{l}} {sense} by {{a}} degrees",
        f"fly around the {{l}} {sense} for {{a}} degrees",
        f"orbit the {{l}} {sense} by {{a}} degrees",
    )


TASK_KINDS: tuple[TaskKind, ...] = (
    TaskKind(
        "forward",
        (
            "fly forward {d} meters",
            "move forward {d} meters",
            "go straight ahead for {d} meters",
            "advance {d} meters",
        ),
        _TRAVEL_M,
    ),
    TaskKind("turn_left", _turn("left"), angles_deg=_TURN_DEG),
    TaskKind(
        "approach",
        ("approach the {l}", "fly to the {l}", "go towards the {l} and stop in front of it", "move close to the {l}"),
    ),
    TaskKind(
        "climb",
        ("climb {d} meters", "go up {d} meters", "ascend by {d} meters", "rise {d} meters"),
        _LEVEL_M,
    ),
    TaskKind("strafe_right", _strafe("right"), _STRAFE_M),
    TaskKind("pass_left", _pass("left", "right")),
    TaskKind(
        "forward_turn_right", _turning("right", "moving forward", "fly forward"), _TRAVEL_WHILE_M, _TURN_WHILE_DEG
    ),
    TaskKind(
        "backward",
        ("fly backward {d} meters", "move back {d} meters", "go backward for {d} meters", "back up {d} meters"),
        _TRAVEL_M,
    ),
    TaskKind("circle_clockwise", _circle("clockwise"), angles_deg=_ARC_DEG),
    TaskKind("turn_right", _turn("right"), angles_deg=_TURN_DEG),
    TaskKind("climb_turn_left", _turning("left", "climbing", "climb"), _CLIMB_WHILE_M, _TURN_WHILE_DEG),
    TaskKind(
        "descend",
        ("descend {d} meters", "go down {d} meters", "descend by {d} meters", "sink {d} meters"),
        _LEVEL_M[:4],
    ),
    TaskKind("pass_right", _pass("right", "left")),
    TaskKind("strafe_left", _strafe("left"), _STRAFE_M),
    TaskKind("forward_turn_left", _turning("left", "moving forward", "fly forward"), _TRAVEL_WHILE_M, _TURN_WHILE_DEG),
    TaskKind("face", ("turn to face the {l}", "face the {l}", "rotate until the {l} is straight ahead")),
    TaskKind("climb_turn_right", _turning("right", "climbing", "climb"), _CLIMB_WHILE_M, _TURN_WHILE_DEG),
    TaskKind("circle_counterclockwise", _circle("counterclockwise"), angles_deg=_ARC_DEG),
)


def task_kind(name: str) -> TaskKind:
    """The kind called `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    for kind in TASK_KINDS:
        if kind.name == name:
            return kind
    raise ValueError(f"unknown kind of task {name!r}; known: {', '.join(kind.name for kind in TASK_KINDS)}")


def instruction_vocabulary() -> tuple[str, ...]:
    """Every word that an instruction can hold, sorted; numbers are words of their own."""
    words = {*LANDMARK_COLOURS, *LANDMARK_SHAPES}
    for kind in TASK_KINDS:
        sets = [values for values in (kind.distances_m, kind.angles_deg) if values]
        for template, magnitude in product(range(len(kind.templates)), product(*sets)):
            words.update(kind.say(template, magnitude, "").split())
    return tuple(sorted(words))


def _number(value: float) -> str:
    return f"{value:g}"
