"""Meters around a policy's engines and KV memory: seconds inside, bytes over the border, rate of every scale.

What is counted as moved: arrays of the host that go into an engine, outputs that are brought to the host, and keys and
values that are copied into or out of the cache's buffers. Outputs that stay where they were computed and caches that
are written in place are not moved. On a CPU an array that goes in is read where it lies; a device copies it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from worldvln_edge.runtime.engines.engine import Engine, Tensor
from worldvln_edge.runtime.worldvln.graphs import WORLD_MODEL_STEP
from worldvln_edge.runtime.worldvln.kv_cache import KVMemory
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy
from worldvln_edge.world_model_flops import step_macs

THW = tuple[int, int, int]


@dataclass
class Readings:
    """What was counted since the last `EngineMeter.take`."""

    engine_ms: float = 0.0
    io_bytes: int = 0
    kv_bytes: int = 0
    steps: list[StepReading] = field(default_factory=list)


@dataclass(frozen=True)
class StepReading:
    """One call of `world_model_step`."""

    thw: THW
    rows: int
    flops: int
    ms: float


class EngineMeter:
    """Counts what all metered engines of one policy do. One call at a time."""

    def __init__(self) -> None:
        self._readings = Readings()

    @classmethod
    def around(cls, policy: WorldVLNPolicy) -> EngineMeter:
        """Put meters around the engines and the KV memory of a policy; sessions opened from now on are metered."""
        meter = cls()
        policy.engines = {name: _MeteredEngine(policy, name, engine, meter) for name, engine in policy.engines.items()}
        policy.step_engines = {
            precision: _MeteredEngine(policy, WORLD_MODEL_STEP, engine, meter)
            for precision, engine in policy.step_engines.items()
        }
        policy.workspace.memory = _MeteredKVMemory(policy.workspace.memory, meter)
        return meter

    def take(self) -> Readings:
        """Readings so far; counting starts over."""
        readings, self._readings = self._readings, Readings()
        return readings

    def add_call(self, seconds: float, io_bytes: int) -> None:
        self._readings.engine_ms += seconds * 1e3
        self._readings.io_bytes += io_bytes

    def add_step(self, step: StepReading) -> None:
        self._readings.steps.append(step)

    def add_kv(self, copied_bytes: int) -> None:
        self._readings.kv_bytes += copied_bytes


class _MeteredEngine:
    def __init__(self, policy: WorldVLNPolicy, graph: str, engine: Engine, meter: EngineMeter):
        self._config, self._graph, self._engine, self._meter = policy.config, graph, engine, meter

    def run(
        self,
        inputs: Mapping[str, Tensor],
        in_place: Mapping[str, Any] | None = None,
        *,
        fetch: Collection[str] | None = None,
    ) -> dict[str, Any]:
        start = time.perf_counter()
        outputs = self._engine.run(inputs, in_place, fetch=fetch)
        seconds = time.perf_counter() - start
        self._meter.add_call(seconds, _host_bytes(inputs) + _host_bytes(outputs))
        if self._graph == WORLD_MODEL_STEP:
            t, h, w, _ = inputs["uniforms"].shape
            rows, visible = len(inputs["kv_length"]), int(inputs["kv_length"].max())
            flops = step_macs(self._config, rows=rows, thw=(t, h, w), visible=visible).flops
            self._meter.add_step(StepReading((t, h, w), rows, flops, seconds * 1e3))
        return outputs


class _MeteredKVMemory:
    """Passes everything on, and counts copies."""

    def __init__(self, memory: KVMemory, meter: EngineMeter):
        self._memory, self._meter = memory, meter
        self.capacity, self.rows = memory.capacity, memory.rows

    def buffers(self, rows: int) -> list[Any]:
        return self._memory.buffers(rows)

    def read(self, start: int, entries: int, rows: int) -> Any:
        data = self._memory.read(start, entries, rows)
        self._meter.add_kv(int(data.nbytes))
        return data

    def write(self, start: int, entries: int, rows: int, data: Any) -> None:
        self._meter.add_kv(int(data.nbytes))
        self._memory.write(start, entries, rows, data)


def _host_bytes(values: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in values.values() if isinstance(value, np.ndarray | np.generic))
