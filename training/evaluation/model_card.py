"""The numbers of a model card: sections that commands print into Markdown files, between markers.

    <!-- card: flights -->
    ... replaced ...
    <!-- /card: flights -->

| section | from | holds |
|---|---|---|
| flights | eval.json | success and errors of the policy and of what it has to beat |
| groups | eval.json | the same, motion and landmark tasks apart |
| kinds | eval.json | success by kind of instruction |
| acceptance | acceptance.json | the acceptance list |
| stages | acceptance.json | which stage limits, of the first checkpoint |
| grpo | comparison.json | rewards and success before GRPO and after it |
| training | the checkpoint's run.json and loss_curve.jsonl | steps, rows, minutes and losses of every stage |

A section depends on its file alone, so that the same evaluation gives the same text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from worldvln_edge.atomic import atomic_file
from worldvln_edge.generation_profile import EXACT
from worldvln_edge.runtime.bench.report_table import Part, Table, render
from worldvln_edge.tasks import SuccessRule
from worldvln_edge.training.evaluation.flight_statistics import EvalFlight, Outcome, outcome_tree, pairing
from worldvln_edge.training.evaluation.row_flights import EXPERT, POLICY

SECTIONS: Mapping[str, str] = {
    "flights": "--eval",
    "groups": "--eval",
    "kinds": "--eval",
    "acceptance": "--acceptance",
    "stages": "--acceptance",
    "grpo": "--comparison",
    "training": "--checkpoint",
}
"""Name of a section -> the option that names its source."""
_EVAL_FILE, _RUN_FILE, _CURVE_FILE = "eval.json", "run.json", "loss_curve.jsonl"
_MARKER = re.compile(r"^<!-- (?P<end>/?)card: (?P<name>[^ ]+) -->$", re.MULTILINE)


class CardError(ValueError):
    """A card that cannot be written: the message names the file and what to do."""


class _Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What a card needs of `eval.json`."""

    split: str
    first: int
    seed: int
    profiles: tuple[str, ...]
    success: SuccessRule
    flights: tuple[EvalFlight, ...]

    def rows(self) -> dict[str, list[EvalFlight]]:
        rows: dict[str, list[EvalFlight]] = {}
        for flight in self.flights:
            rows.setdefault(flight.row, []).append(flight)
        return rows


def evaluation_sections(folder: Path) -> dict[str, str]:
    """Markdown of the sections that a finished evaluation gives.

    Raises:
        CardError: there is none in the folder, or it flew nothing.
    """
    record = _decoded(folder / _EVAL_FILE, _Evaluation, "run `worldvln-edge eval` again")
    rows = record.rows()
    if POLICY not in rows:
        raise CardError(f"{folder / _EVAL_FILE}: no flights of a policy; run `worldvln-edge eval` with --count above 0")
    trees = {name: outcome_tree(flights) for name, flights in rows.items()}
    sections: dict[str, list[Part]] = {
        "flights": [_flown(record, rows), _results(rows, trees)],
        "groups": ["All tasks are motion tasks, or all are landmark tasks: see the table of all."],
        "kinds": [_kinds(trees)],
    }
    if all("motion" in tree and "landmark" in tree for tree in trees.values()):
        sections["groups"] = [
            "Motion tasks (the text says it all) and landmark tasks (the goal must be seen):",
            _groups(trees),
        ]
    return _markdown(sections)


def acceptance_sections(folder: Path) -> dict[str, str]:
    """Markdown of the sections that an acceptance run gives. Raises AcceptanceError: there is none in the folder."""
    # Imported here: the stages' metrics come with the networks, which the other sections do not need.
    from worldvln_edge.training.evaluation.acceptance_run import read_acceptance
    from worldvln_edge.training.evaluation.open_loop_tables import chain_table

    record = read_acceptance(folder)
    report = record.checkpoints[0].open_loop
    seen = f"{report.flights} flights of the split {report.split}"
    count = len(record.checkpoints)
    of = "This checkpoint" if count == 1 else f"{count} checkpoints that differ by their seed"
    return _markdown(
        {
            "acceptance": [f"{of}, limits of `{record.limits_of}`, on {seen}:", *record.list_parts()],
            "stages": [
                f"Motion of every segment, with true frames before it, on {seen} (NMSE: 1 is the training mean):",
                chain_table(report.action, report.teacher_forced, report.rgb_head),
            ],
        }
    )


def comparison_sections(folder: Path) -> dict[str, str]:
    """Markdown of the section that a comparison gives. Raises GrpoError: there is none in the folder."""
    # Imported here: see above.
    from worldvln_edge.training.grpo.comparison import comparison_parts, read_comparison

    return _markdown({"grpo": comparison_parts(read_comparison(folder))})


def training_sections(checkpoint: Path) -> dict[str, str]:
    """Markdown of the section that a checkpoint folder gives.

    Raises:
        CardError: it does not say how it was trained.
    """
    runs = _decoded(checkpoint / _RUN_FILE, dict[str, Any], "give a folder that `worldvln-edge train` wrote")
    stages = {name: run for name, run in runs.items() if isinstance(run, dict) and "optimiser" in run}
    if not stages:
        raise CardError(f"{checkpoint / _RUN_FILE}: names no stages; give a folder that `worldvln-edge train` wrote")
    curve = _curve(checkpoint / _CURVE_FILE)
    rows, minutes = [], 0.0
    for name, run in stages.items():
        losses = [row for row in curve if row.get("stage") == name and "loss" in row]
        if not losses:
            raise CardError(f"{checkpoint / _CURVE_FILE}: no losses of the stage {name}")
        spent = float(losses[-1]["seconds"]) / 60
        minutes += spent
        step_rows = run.get("config", {}).get("step_rows", "")
        cells = (str(losses[-1]["step"]), str(step_rows), f"{spent:.0f}")
        rows.append((name, *cells, f"{losses[0]['loss']:.3g}", f"{losses[-1]['loss']:.3g}"))
    first = next(iter(stages.values()))
    said = f"{first.get('flights')} flights, seed {first.get('seed')}, {minutes:.0f} minutes of training:"
    header = ("stage", "steps", "rows a step", "minutes", "first loss", "last loss")
    return _markdown({"training": [said, Table(header, tuple(rows))]})


def fill_cards(paths: Sequence[Path], sections: Mapping[str, str]) -> list[bool]:
    """Replace the marked sections of Markdown files; nothing is written unless all of them can be filled.

    Args:
        paths: the files.
        sections: Markdown by section.

    Returns:
        Of every file, whether anything in it changed.

    Raises:
        CardError: no such file, no markers, markers that do not fit each other, or a section that is not given.
    """
    texts = [_filled(path, sections) for path in paths]
    for path, (before, after) in zip(paths, texts, strict=True):
        if after == before:
            continue
        try:
            with atomic_file(path) as building:
                building.write_text(after, encoding="utf-8")
        except OSError as error:
            raise CardError(f"{path}: cannot be written ({error.strerror}); it is as it was") from error
    return [after != before for before, after in texts]


def _filled(path: Path, sections: Mapping[str, str]) -> tuple[str, str]:
    """The text of a file, and the same with its sections replaced."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CardError(f"{path}: cannot be read ({error})") from error
    parts, place = [], 0
    for name, start, stop in _marked(path, text):
        if name not in sections:
            option = SECTIONS.get(name)
            reason = f"give {option} DIR" if option else f"known are {', '.join(SECTIONS)}"
            raise CardError(f"{path}: the section {name} is marked and not given; {reason}")
        parts += [text[place:start], f"\n\n{sections[name]}\n\n"]
        place = stop
    return text, "".join(parts) + text[place:]


def _marked(path: Path, text: str) -> list[tuple[str, int, int]]:
    """Name, start and end of what stands between markers."""
    markers = list(_MARKER.finditer(text))
    if not markers:
        raise CardError(f"{path}: no sections are marked; write <!-- card: flights --> and <!-- /card: flights -->")
    found = []
    for first, last in zip(markers[::2], [*markers[1::2], None], strict=False):
        if first["end"] or last is None or not last["end"] or last["name"] != first["name"]:
            line = text.count("\n", 0, first.start()) + 1
            raise CardError(
                f"{path}:{line}: every <!-- card: NAME --> needs its <!-- /card: NAME --> behind it, and none between"
            )
        found.append((first["name"], first.end(), last.start()))
    return found


def _flown(record: _Evaluation, rows: Mapping[str, Sequence[EvalFlight]]) -> str:
    count, rule = len(rows[POLICY]), record.success
    options = [("--split", record.split, "test"), ("--first", record.first, 0), ("--seed", record.seed, 0)]
    options += [("--profile", profile, EXACT) for profile in record.profiles[:1]]
    changed = "".join(f" {name} {value}" for name, value, default in options if value != default)
    bare = "" if len(rows) > 1 else " --no-baselines"
    return (
        f"{count} held-out tasks in held-out scenes. A flight succeeds when it ends within {rule.position_m:g} m and "
        f"{rule.yaw_deg:g} degrees of the expert's end without a collision. "
        f"`worldvln-edge eval --checkpoint CHECKPOINT --count {count}{changed}{bare}` prints:"
    )


def _results(rows: Mapping[str, Sequence[EvalFlight]], trees: Mapping[str, Mapping[str, Any]]) -> Table:
    header = ("row", "flights", "success", "95 %", "SPL", "nDTW", "distance m", "yaw deg", "collided", "policy nearer")
    cells = []
    for name, tree in trees.items():
        result: Outcome = tree["all"]
        cells.append(
            (
                name,
                str(result.flights),
                *_success(result),
                f"{result.spl:.2f}",
                f"{result.ndtw:.2f}",
                f"{result.mean_distance_m:.2f}",
                f"{result.mean_yaw_error_deg:.1f}",
                str(result.collisions),
                "" if name == POLICY else f"{pairing(rows[POLICY], rows[name]).policy_nearer:.0%}",
            )
        )
    return Table(header, tuple(cells))


def _groups(trees: Mapping[str, Mapping[str, Any]]) -> Table:
    header = ("row", *(f"{group} {what}" for group in ("motion", "landmark") for what in ("success", "95 %")))
    cells = []
    for name, tree in trees.items():
        cells.append((name, *_success(tree["motion"], with_count=True), *_success(tree["landmark"], with_count=True)))
    return Table(header, tuple(cells))


def _kinds(trees: Mapping[str, Mapping[str, Any]]) -> Table:
    shown = [name for name in trees if name != EXPERT]
    cells = []
    for kind, result in trees[POLICY]["by_kind"].items():
        shares = (f"{trees[name]['by_kind'][kind].success_rate:.0%}" for name in shown)
        cells.append((kind, str(result.flights), *shares))
    return Table(("kind", "flights", *shown), tuple(cells))


def _success(result: Outcome, *, with_count: bool = False) -> tuple[str, str]:
    low, high = result.success_interval
    count = f" of {result.flights}" if with_count else ""
    return f"{result.success_rate:.1%}{count}", f"{low:.0%} to {high:.0%}"


def _markdown(sections: Mapping[str, Sequence[Part]]) -> dict[str, str]:
    return {name: render(parts, markdown=True) for name, parts in sections.items()}


def _decoded(path: Path, kind: Any, what_to_do: str) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise CardError(f"{path}: {error.strerror}; {what_to_do}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CardError(f"{path}: does not hold what a card needs ({error}); {what_to_do}") from error


def _curve(path: Path) -> list[dict[str, Any]]:
    try:
        return [msgspec.json.decode(line, type=dict[str, Any]) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise CardError(f"{path}: {error.strerror}; give a folder that `worldvln-edge train` wrote") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CardError(f"{path}: a line that is no loss ({error}); give a folder as `train` wrote it") from error
