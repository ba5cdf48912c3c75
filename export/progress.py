"""How long work tells of itself: the callback that it takes, and the bar that the commands show."""

from __future__ import annotations

import sys
from collections.abc import Callable

import click

Progress = Callable[[str, int, int], None]
"""(what is being done, how much of the work is done, how much there is in all); 0 in all: not known yet."""

Note = Callable[[str], None]
"""Takes a sentence that the user should read."""


class ProgressBar:
    """A bar on stderr whose length is known only while the work runs. Its `update` is a `Progress`."""

    def __init__(self, label: str):
        self._bar = click.progressbar(length=1000, label=label, file=sys.stderr, item_show_func=lambda name: name)

    def __enter__(self) -> ProgressBar:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(None, None, None)

    def update(self, what: str, done: int, total: int) -> None:
        at = 1000 * done // total if total else 0
        self._bar.update(max(0, at - self._bar.pos), what)
