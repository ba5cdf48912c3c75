"""Execution contexts by shape, each with its CUDA graph once its shape came back.

With one context a shape, a captured graph is never invalidated by another shape. What is evicted gives its graph and
its context back. A shape whose capture failed runs without a graph from then on, also after it was evicted.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from worldvln_edge.runtime.engines.device_memory import DeviceGraph, DeviceMemoryError, DeviceStream
from worldvln_edge.runtime.engines.engine import EngineError

MOST_SHAPES = 64
"""Shapes that keep an execution context; text lengths alone would make hundreds."""

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class BoundShape:
    """One combination of shapes: an execution context with all addresses set."""

    context: Any
    outputs: dict[str, tuple[int, ...]]
    """Shapes of the outputs other than caches."""
    shapes: Hashable
    """Of the inputs: what a failed capture is remembered by."""
    moving: frozenset[str] = frozenset()
    """Tensors whose address is set anew for every run. A graph would keep the old one, so there is none then."""
    runs: int = 0
    graph: DeviceGraph | None = field(default=None, repr=False)

    def free(self) -> None:
        """Give graph and context back; nothing of them may run any more."""
        graph, self.graph = self.graph, None
        try:
            if graph is not None:
                graph.free()
        finally:
            self.context = None  # TensorRT's binding ends it with its last reference


class CudaGraphCache:
    """The bound shapes of one engine, least recently used first.

    Args:
        stream: that all of them run in.
        graph: name of the bundle's graph, for messages.
        captures: replay shapes that come back; without effect where the stream cannot capture.
        most: shapes to keep.
    """

    def __init__(self, stream: DeviceStream, *, graph: str, captures: bool, most: int = MOST_SHAPES):
        self._stream, self._graph, self._most = stream, graph, most
        self._captures = captures and stream.can_capture
        self._bound: OrderedDict[Hashable, BoundShape] = OrderedDict()
        self._uncapturable: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._bound)

    def find(self, key: Hashable) -> BoundShape | None:
        """A shape that was bound before; it becomes the most recently used one."""
        if key in self._bound:
            self._bound.move_to_end(key)
        return self._bound.get(key)

    def add(self, key: Hashable, bound: BoundShape) -> None:
        """Keep a shape, and free the oldest one when there are too many."""
        self._bound[key] = bound
        while len(self._bound) > self._most:
            self._stream.wait()
            self._bound.popitem(last=False)[1].free()

    def clear(self) -> None:
        """Free all: an address that they use is going to change. All are freed even when one refuses.

        Raises:
            DeviceMemoryError: the device failed. Everything that could be freed was.
        """
        with ExitStack() as frees:
            while self._bound:
                frees.callback(self._bound.popitem()[1].free)
            frees.callback(self._stream.wait)  # called first

    def run(self, bound: BoundShape, refused: Callable[[str], EngineError]) -> None:
        """Enqueue a shape, as a graph where there is one.

        Args:
            bound: the shape.
            refused: makes the error of a phrase.

        Raises:
            EngineError: TensorRT does not run it.
            DeviceMemoryError: the device does not.
        """
        # The first run of a shape is not captured: TensorRT finishes setting up the shape in it.
        is_candidate = self._captures and not bound.moving and bound.shapes not in self._uncapturable
        if is_candidate and bound.graph is None and bound.runs > 0:
            bound.graph = self._capture(bound)
        bound.runs += 1
        if bound.graph is not None:
            bound.graph.launch(self._stream)
        elif not bound.context.execute_async_v3(self._stream.handle):
            raise refused("the run failed")

    def _capture(self, bound: BoundShape) -> DeviceGraph | None:
        """The shape's graph; None, said once and never tried again, where it cannot be captured."""
        can_capture = getattr(bound.context, "is_stream_capturable", None)  # TensorRT-RTX; TensorRT just fails
        if can_capture is not None and not can_capture(self._stream.handle):
            self._give_up(bound, "TensorRT says that it cannot be captured")
            return None
        try:
            self._stream.begin_capture()
        except DeviceMemoryError as error:
            self._give_up(bound, str(error))
            return None
        is_enqueued = False
        try:
            is_enqueued = bool(bound.context.execute_async_v3(self._stream.handle))
        finally:
            # A stream that stays in capture mode would run nothing any more, so the capture ends in any case.
            graph, reason = self._end_capture()
            if graph is not None and not is_enqueued:
                graph.free()
                graph = None
        if graph is None:
            self._give_up(bound, reason)
        return graph

    def _end_capture(self) -> tuple[DeviceGraph | None, str]:
        try:
            return self._stream.end_capture(), "TensorRT refused to enqueue it"
        except DeviceMemoryError as error:
            return None, str(error)

    def _give_up(self, bound: BoundShape, reason: str) -> None:
        self._uncapturable.add(bound.shapes)
        _log.warning(
            "engine of %s: no CUDA graph for %s (%s); this shape runs without one", self._graph, bound.shapes, reason
        )
