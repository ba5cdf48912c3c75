"""Engines: one exported graph, ready to run. The session code knows this interface only.

Source: ONNX Runtime's I/O binding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort


class EngineError(RuntimeError):
    """A graph that cannot be loaded. The message says which file, why, and what to do."""


class Engine(Protocol):
    def run(
        self, inputs: Mapping[str, np.ndarray], in_place: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            inputs: input name -> array of the graph's dtype.
            in_place: stem -> buffer that the graph reads as `past_<stem>` and writes as `present_<stem>`.

        Returns:
            Output name -> array, without the in-place ones.
        """
        ...


class OnnxEngine:
    """ONNX Runtime on the CPU."""

    def __init__(self, path: Path, *, threads: int = 0):
        """Load a graph.

        Args:
            path: ONNX file; its weights lie beside it.
            threads: CPU threads of one run; 0 lets ONNX Runtime choose.

        Raises:
            EngineError: the file does not load.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Without VNNI, ONNX Runtime's int8 kernels saturate sums of pairs unless told not to.
        options.add_session_config_entry("session.x64quantprecision", "1")
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
        self, inputs: Mapping[str, np.ndarray], in_place: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        binding = self._session.io_binding()
        # The binding reads these arrays in place: they must be contiguous, keep their rank, and outlive the run.
        bound = {name: np.asarray(array, order="C") for name, array in inputs.items()}
        for name, array in bound.items():
            binding.bind_cpu_input(name, array)
        for name in self._results:
            binding.bind_output(name)
        for stem, buffer in (in_place or {}).items():
            # One value as input and output: the write happens in the buffer itself, nothing is copied.
            value = ort.OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(f"past_{stem}", value)
            binding.bind_ortvalue_output(f"present_{stem}", value)
        self._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()[: len(self._results)]
        return {name: value.numpy() for name, value in zip(self._results, outputs, strict=True)}
