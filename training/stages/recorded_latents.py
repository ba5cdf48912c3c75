"""Flights whose latents were recorded with them, so that the decoder starts from those instead of from the frames.

Source: spec/training.md 1.6 (latent files of the action decoder's manifest).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from worldvln_edge.training.data.flight_source import FlightSource


@runtime_checkable
class RecordsLatents(Protocol):
    """A FlightSource that may have latents beside the frames."""

    def latents(self, row: int) -> Tensor | None:
        """What the VAE's decoder reads, float32 [1, C, T, h, w]; None where nothing was recorded."""


def recorded_latents(flights: FlightSource, row: int) -> Tensor | None:
    """Latents of a row, None where it has none."""
    return flights.latents(row) if isinstance(flights, RecordsLatents) else None
