"""What a bundle's manifest says about the parity of an engine."""

from __future__ import annotations

import msgspec


class OutputParity(msgspec.Struct, frozen=True, kw_only=True):
    """One measure of one output of an engine, at the shape where it is worst."""

    output: str
    measure: str
    """As in the manifest's `parity`: `relative_max`, `relative_rms`, `mean_abs`, ..."""
    error: float | None
    """None: not finite."""
    bound: float
    within: bool
    shape: str
    """The worst one: `tokens 64, cache 96`."""


class EngineParity(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine compared with the graph it was built from, run by ONNX Runtime on the same inputs."""

    within: bool
    """All of its bounds, at every shape."""
    reference: str
    """What ran the graph: `onnxruntime 1.31.0 CPUExecutionProvider`."""
    shapes: int
    """Shapes that were compared."""
    outputs: tuple[OutputParity, ...] = ()
    failure: str = ""
    """Why the engine did not run to the end."""

    @property
    def reason(self) -> str:
        """Why it is not within its bounds, as a phrase; empty when it is."""
        if self.failure or self.within:
            return self.failure
        return "; ".join(
            f"{o.output} {o.measure} {'not finite' if o.error is None else format(o.error, '.2g')} > {o.bound:.2g} "
            f"at {o.shape}"
            for o in self.outputs
            if not o.within
        )
