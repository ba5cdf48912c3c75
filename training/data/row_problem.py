"""What is wrong with one row of a dataset."""

from __future__ import annotations

import msgspec


class RowProblem(msgspec.Struct, frozen=True):
    """A row that is left out, or that a check complains about."""

    where: str
    """File and row."""
    reason: str
    kind: str = "row"
    """`row`, `caption`, `length`, `video`, `image`, `motion`, `units`, `stamps`, `folder`."""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"
