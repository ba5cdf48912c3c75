"""What is evaluated, and what it is compared with: a bundle, a checkpoint, a server, or a finished evaluation.

A checkpoint is exported to a bundle beside the results, once; see `bundle_source.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from worldvln_edge.bundle import MANIFEST_FILE
from worldvln_edge.generation_profile import EXACT, GenerationProfile
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.bundle_source import ensure_bundle
from worldvln_edge.training.evaluation.flight_statistics import EvalFlight
from worldvln_edge.training.evaluation.pilot_sources import BundlePilot, RemotePilot, check_bundle
from worldvln_edge.training.evaluation.row_flights import POLICY

RECORD_FILE = "eval.json"
_CHECKPOINT_FILE = "config.json"


class PolicyChoiceError(ValueError):
    """Something that cannot be evaluated or compared with. The message says what was found and what to give."""


@dataclass(frozen=True, kw_only=True)
class PolicyChoice:
    """A policy that can be flown."""

    name: str
    """As the user gave it."""
    source: BundlePilot | RemotePilot
    bundle: Path | None
    """None for a server."""


class _Record(msgspec.Struct, frozen=True):
    """What is read back of `eval.json`."""

    seed: int
    policy: str
    flights: tuple[EvalFlight, ...]


def choose_bundle(
    folder: Path,
    *,
    name: str | None = None,
    profile: str = EXACT,
    profiles: Mapping[str, GenerationProfile] | None = None,
    also: Sequence[Path] = (),
) -> PolicyChoice:
    """A bundle, checked. Raises BundleError, ConfigError: see `check_bundle`."""
    own = dict(profiles or {})
    check_bundle(folder, profile, own)
    source = BundlePilot(folder=folder, profile=profile, profiles=own, also=tuple(also))
    return PolicyChoice(name=name or str(folder), source=source, bundle=folder)


def choose_checkpoint(
    checkpoint: Path,
    bundle: Path,
    *,
    profile: str = EXACT,
    profiles: Mapping[str, GenerationProfile] | None = None,
    also: Sequence[Path] = (),
) -> PolicyChoice:
    """A checkpoint folder, exported to `bundle` unless its bundle lies there already.

    Raises:
        PolicyChoiceError: no checkpoint folder.
        ExportFailedError: the export failed.
        BundleError, ConfigError: see `check_bundle`.
    """
    if not (checkpoint / _CHECKPOINT_FILE).is_file():
        raise PolicyChoiceError(
            f"{checkpoint} is no checkpoint folder: {_CHECKPOINT_FILE} is missing; give one that `worldvln-edge train` "
            "wrote"
        )
    ensure_bundle(checkpoint, bundle)
    return choose_bundle(bundle, name=str(checkpoint), profile=profile, profiles=profiles, also=also)


def choose_server(server: str, key: str | None = None, ca_file: Path | None = None) -> PolicyChoice:
    """A server that answers. Raises as `RemotePilot.check`."""
    source = RemotePilot(server=server, key=key, ca_file=ca_file)
    source.check()
    return PolicyChoice(name=server, source=source, bundle=None)


def is_finished(other: str) -> bool:
    """Whether a comparison is with the folder of a finished evaluation."""
    return "://" not in other and (Path(other) / RECORD_FILE).is_file()


def choose_other(
    other: str, bundle: Path, *, key: str | None = None, ca_file: Path | None = None, profile: str = EXACT
) -> PolicyChoice:
    """The policy behind `--against`, unless it is a finished evaluation.

    Args:
        other: a server's address, a bundle, or a checkpoint folder.
        bundle: where a checkpoint is exported to.
        key, ca_file: of a server.
        profile: of a bundle or checkpoint.

    Raises:
        PolicyChoiceError: it is none of these.
        And what the other choices raise.
    """
    if "://" in other:
        return choose_server(other, key, ca_file)
    folder = Path(other)
    if (folder / MANIFEST_FILE).is_file():
        return choose_bundle(folder, profile=profile)
    if (folder / _CHECKPOINT_FILE).is_file():
        return choose_checkpoint(folder, bundle, profile=profile)
    raise PolicyChoiceError(
        f"{other} is nothing to compare with: give a bundle ({MANIFEST_FILE}), a checkpoint ({_CHECKPOINT_FILE}), the "
        f"--out folder of a finished evaluation ({RECORD_FILE}), or a server's address"
    )


def finished_flights(folder: Path, tasks: Sequence[Task], seed: int) -> tuple[EvalFlight, ...]:
    """The policy's flights of a finished evaluation, in the order of `tasks`.

    Raises:
        PolicyChoiceError: unreadable, another seed, or other tasks.
    """
    path = folder / RECORD_FILE
    try:
        record = msgspec.json.decode(path.read_bytes(), type=_Record)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise PolicyChoiceError(
            f"{path}: not the record of an evaluation ({error}); run `worldvln-edge eval --out {folder}` again"
        ) from error
    if record.seed != seed:
        raise PolicyChoiceError(
            f"{path} was flown with seed {record.seed}, this with {seed}; give --seed {record.seed}"
        )
    flown = {flight.task: flight for flight in record.flights if flight.row == POLICY}
    missing = [task.task_id for task in tasks if task.task_id not in flown]
    if missing:
        raise PolicyChoiceError(
            f"{path} has no flight of task {missing[0]} ({len(missing)} such); compare evaluations of the same "
            "--split, --first and --count"
        )
    changed = [task.task_id for task in tasks if flown[task.task_id].instruction != task.instruction]
    if changed:
        raise PolicyChoiceError(
            f"{path}: task {changed[0]} had another instruction then ({len(changed)} such), so the tasks are others; "
            "fly that policy again"
        )
    return tuple(flown[task.task_id] for task in tasks)
