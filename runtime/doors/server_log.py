"""What a server writes to stderr: lines for people, or one JSON object a line for programs. Never keys, never images.

Keys that the server knows, and whatever follows an authorization scheme, are replaced before a line is written. Bytes
given to a log call are written as their length. Libraries that print messages as they pass stay at warnings.
Source: spec/session_protocol.md 7.6; docs/operations.md lists the fields.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]
_LONGEST_MESSAGE, _LONGEST_TRACEBACK = 4_000, 20_000
_CREDENTIALS = re.compile(r"((?:api-key|bearer|basic)\s+)[^\s'\",;]+", re.IGNORECASE)
_HIDDEN = "***"
_TALKATIVE = ("websockets", "uvicorn", "asyncio", "PIL")


def configure_log(
    format: LogFormat, level: str, *, secrets: Sequence[str] = (), stream: TextIO | None = None
) -> logging.Handler:
    """Send the log of this process to stderr.

    Args:
        format: `text` or `json`.
        level: a level of `logging`, in any case.
        secrets: texts that must never be written, such as API keys.
        stream: instead of stderr.

    Returns:
        The handler, now the only one of the root logger.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    hide = Redaction(secrets)
    handler.setFormatter(JsonFormatter(hide) if format == "json" else TextFormatter(hide))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    return handler


class Redaction:
    """Takes what must not be written out of a text."""

    def __init__(self, secrets: Sequence[str] = ()):
        self._secrets = sorted(filter(None, secrets), key=len, reverse=True)  # one may be part of another

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, _HIDDEN)
        return _CREDENTIALS.sub(rf"\1{_HIDDEN}", text)


class TextFormatter(logging.Formatter):
    """`time level logger: message field=value ...`."""

    def __init__(self, hide: Redaction):
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._hide = hide

    def format(self, record: logging.LogRecord) -> str:
        record = _plain(record)
        text = super().format(record)
        values = {n: _in_words(v) if isinstance(v, _BYTES) else v for n, v in _fields(record).items()}
        fields = " ".join(f"{name}={value}" for name, value in values.items())
        return self._hide(f"{text} {fields}" if fields else text)


class JsonFormatter(logging.Formatter):
    """One object a line: `time` (UTC), `level`, `logger`, `message`, the fields of an event, `exception`."""

    def __init__(self, hide: Redaction):
        super().__init__()
        self._hide = hide

    def format(self, record: logging.LogRecord) -> str:
        record = _plain(record)
        time = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self._hide(record.getMessage())[:_LONGEST_MESSAGE],
        }
        for name, value in _fields(record).items():
            line.setdefault(name, self._hide(value) if isinstance(value, str) else value)
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = self._hide(self.formatException(record.exc_info))[-_LONGEST_TRACEBACK:]
        return json.dumps(line, default=_in_words, ensure_ascii=False, allow_nan=False)


def _plain(record: logging.LogRecord) -> logging.LogRecord:
    """The record without the content of bytes among its arguments."""
    record = logging.makeLogRecord(record.__dict__)
    if isinstance(record.args, tuple):
        record.args = tuple(_in_words(value) if isinstance(value, _BYTES) else value for value in record.args)
    return record


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    """Of an event: `_log.info("...", extra={"fields": {...}})`."""
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, Mapping) else {}


def _in_words(value: Any) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, _BYTES) else f"<{type(value).__name__}>"


_BYTES = (bytes, bytearray, memoryview)
