"""Sentences and tables of a report, for a terminal and as Markdown, from the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A header and rows of texts; the first column is set left, the others right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def text(self) -> str:
        lines = (self.header, *self.rows)
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        rule = ("---", *("---:" for _ in self.header[1:]))
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.header, rule, *self.rows))


Part = str | Table


def render(parts: Sequence[Part], *, markdown: bool = False) -> str:
    """Sentences and tables, an empty line between them."""
    texts = [
        part if isinstance(part, str) else f"{part.markdown() if markdown else part.text()}" for part in parts if part
    ]
    if markdown:
        texts = [text if text.startswith("|") else text.replace("\n", "  \n") for text in texts]
    return "\n\n".join(texts)
