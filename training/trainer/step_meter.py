"""How fast a run is: a progress bar with loss, rows, tokens, MFU and time left, and the same numbers for the log."""

from __future__ import annotations

import time
from collections.abc import Mapping

from tqdm import tqdm


class StepMeter:
    """Counts what steps do; rates are those since the last `rates`.

    Args:
        stage: on the bar.
        done, total: steps; total None: unknown.
        peak_flops: of all devices together, None: unknown.
        show: draw the bar (on stderr).
    """

    def __init__(self, stage: str, *, done: int, total: int | None, peak_flops: float | None, show: bool):
        self._bar = tqdm(desc=stage, initial=done, total=total, unit="step", disable=not show, mininterval=1.0)
        self._peak_flops = peak_flops
        self._begin = self._since = time.perf_counter()
        self._rows = self._tokens = self._flops = 0

    @property
    def seconds(self) -> float:
        """Since the meter was made."""
        return time.perf_counter() - self._begin

    def add(self, *, rows: int, tokens: int, flops: int) -> None:
        """Count one step, of all ranks."""
        self._rows, self._tokens, self._flops = self._rows + rows, self._tokens + tokens, self._flops + flops
        self._bar.update()

    def rates(self) -> dict[str, float]:
        """Rows and tokens a second and MFU since the last call; what is unknown is left out."""
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        rates = {"rows_per_s": self._rows / seconds}
        if self._tokens:
            rates["tokens_per_s"] = self._tokens / seconds
        if self._flops and self._peak_flops:
            rates["mfu"] = self._flops / seconds / self._peak_flops
        self._rows = self._tokens = self._flops = 0
        return {name: float(f"{value:.4g}") for name, value in rates.items()}

    def show(self, values: Mapping[str, float]) -> None:
        """Put numbers behind the bar."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})

    def close(self) -> None:
        self._bar.close()
