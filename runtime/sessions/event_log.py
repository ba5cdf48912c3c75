"""A `Meter` that writes to the log what happened to requests, one line an event, for `--log-level info`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from worldvln_edge.protocol import StageTimes
from worldvln_edge.runtime.sessions.meter import Meter
from worldvln_edge.runtime.sessions.policy import ActionChunk

_log = logging.getLogger(__name__)


class EventLog:
    """Names no session, because its name is enough to resume it where no keys are used."""

    def segment(self, chunk: ActionChunk, seconds: float) -> None:
        fields = {
            "segment": chunk.segment,
            "profile": chunk.profile,
            "head": chunk.head,
            "device_ms": round(seconds * 1e3, 3),
            **{f"{stage}_ms": round(spent_ms, 3) for stage, spent_ms in chunk.timings_ms.items()},
        }
        _log.info("segment emitted", extra={"fields": fields})

    def answered(self, times: StageTimes, *, is_late: bool = False, hold: str | None = None) -> None:
        if is_late or hold is not None:
            fields = {"total_ms": times.total, "late": is_late, "hold": hold}
            _log.info("answer late or replaced", extra={"fields": fields})

    def refused(self, code: str) -> None:
        _log.info("request refused", extra={"fields": {"code": code}})

    def cut_off(self, door: str) -> None:
        _log.info("client cut off", extra={"fields": {"door": door}})


class Meters:
    """Several meters as one."""

    def __init__(self, meters: Sequence[Meter]):
        self._meters = tuple(meters)

    def segment(self, chunk: ActionChunk, seconds: float) -> None:
        for meter in self._meters:
            meter.segment(chunk, seconds)

    def answered(self, times: StageTimes, *, is_late: bool = False, hold: str | None = None) -> None:
        for meter in self._meters:
            meter.answered(times, is_late=is_late, hold=hold)

    def refused(self, code: str) -> None:
        for meter in self._meters:
            meter.refused(code)

    def cut_off(self, door: str) -> None:
        for meter in self._meters:
            meter.cut_off(door)
