"""Engines: one exported graph, ready to run. The session code knows this interface only.

Source: ONNX Runtime's I/O binding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort


class EngineError(RuntimeError):
    """A graph that cannot be loaded. The message says which file, why, and what to do."""


Tensor = Any
"""An array on the host, or an output that was not fetched, which only engines of the same backend can read."""


def to_host(value: Tensor) -> np.ndarray:
    """An array, whatever an engine returned: what was not fetched is fetched now."""
    return np.asarray(value if isinstance(value, np.ndarray | np.generic) else value.numpy())


class Engine(Protocol):
    def run(
        self,
        inputs: Mapping[str, Tensor],
        in_place: Mapping[str, Any] | None = None,
        *,
        fetch: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """Run once.

        Args:
            inputs: input name -> array of the graph's dtype, or what another call kept.
            in_place: stem -> buffer that the graph reads as `past_<stem>` and writes as `present_<stem>`.
            fetch: outputs that are wanted on the host; None: all. The others stay where they were computed.

        Returns:
            Output name -> array, or an opaque value for what was not fetched; without the in-place ones.
        """
        ...


class OnnxEngine:
    """ONNX Runtime on the CPU."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 0,
        optimise: bool = True,
        settings: Mapping[str, str] | None = None,
    ):
        """Load a graph.

        Args:
            path: ONNX file; its weights lie beside it.
            threads: CPU threads of one run; 0 lets ONNX Runtime choose.
            optimise: let ONNX Runtime fuse operators; without, every one rounds for itself (slower; for parity).
            settings: entries of ONNX Runtime's session configuration.

        Raises:
            EngineError: the file does not load.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Without VNNI, ONNX Runtime's int8 kernels saturate sums of pairs unless told not to.
        options.add_session_config_entry("session.x64quantprecision", "1")
        for name, value in (settings or {}).items():
            options.add_session_config_entry(name, value)
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's error classes share no other base
            raise EngineError(
                f"{path}: ONNX Runtime {ort.__version__} cannot load it ({error}); export the bundle again, or install "
                "the version named in the README"
            ) from error
        self._results = [o.name for o in self._session.get_outputs() if not o.name.startswith("present_")]

    @property
    def runner(self) -> str:
        """What runs the graph: `onnxruntime 1.31.0 CPUExecutionProvider`."""
        return f"onnxruntime {ort.__version__} {' '.join(self._session.get_providers())}"

    def run(
        self,
        inputs: Mapping[str, Tensor],
        in_place: Mapping[str, np.ndarray] | None = None,
        *,
        fetch: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """See `Engine.run`; what is not fetched is an `onnxruntime.OrtValue`."""
        binding = self._session.io_binding()
        # The binding reads these arrays in place: they must be contiguous, keep their rank, and outlive the run.
        alive = []
        for name, value in inputs.items():
            if isinstance(value, ort.OrtValue):
                binding.bind_ortvalue_input(name, value)
            else:
                array = np.asarray(value, order="C")
                alive.append(array)
                binding.bind_cpu_input(name, array)
        for name in self._results:
            binding.bind_output(name)
        for stem, buffer in (in_place or {}).items():
            # One value as input and output: the write happens in the buffer itself, nothing is copied.
            value = ort.OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(f"past_{stem}", value)
            binding.bind_ortvalue_output(f"present_{stem}", value)
        self._session.run_with_iobinding(binding)
        outputs = zip(self._results, binding.get_outputs()[: len(self._results)], strict=True)
        return {name: value.numpy() if fetch is None or name in fetch else value for name, value in outputs}
