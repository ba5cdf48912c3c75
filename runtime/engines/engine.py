"""Engines: one exported graph, ready to run. The session code knows this interface only.

Whatever runs a graph is done with it when `run` returns, on a device too. So values may pass from one engine to any
other, and be dropped, without a thought of streams.

Source: ONNX Runtime's I/O binding and its CUDA execution provider.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnxruntime as ort

from worldvln_edge.runtime.engines.device_kv_memory import DeviceCache

OnnxDevice = Literal["cpu", "cuda"]


class EngineError(RuntimeError):
    """A graph that cannot be loaded. The message says which file, why, and what to do."""


Tensor = Any
"""An array on the host, or an output that was not fetched: engines of the same backend read it where it is, others
bring it to the host."""


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


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where ONNX Runtime computes, and where values lie that are not fetched."""

    provider: str
    memory: str
    options: Mapping[str, str] = field(default_factory=dict)


PLACEMENTS: dict[OnnxDevice, Placement] = {
    "cpu": Placement(provider="CPUExecutionProvider", memory="cpu"),
    "cuda": Placement(
        provider="CUDAExecutionProvider",
        memory="cuda",
        # fp32 means fp32, not TF32. Arenas that double would hold memory that other graphs need.
        options={"device_id": "0", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"},
    ),
}


class OnnxEngine:
    """ONNX Runtime on the CPU or on the first CUDA device."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 0,
        optimise: bool = True,
        settings: Mapping[str, str] | None = None,
        device: OnnxDevice = "cpu",
    ):
        """Load a graph.

        Args:
            path: ONNX file; its weights lie beside it.
            threads: CPU threads of one run; 0 lets ONNX Runtime choose.
            optimise: let ONNX Runtime fuse operators; without, every one rounds for itself (slower; for parity).
            settings: entries of ONNX Runtime's session configuration.
            device: where it runs.

        Raises:
            EngineError: the file does not load, or ONNX Runtime does not run on the device.
        """
        self._placement = PLACEMENTS[device]
        if device == "cuda":
            _load_cuda_libraries()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Without VNNI, ONNX Runtime's int8 kernels saturate sums of pairs unless told not to.
        options.add_session_config_entry("session.x64quantprecision", "1")
        for name, value in (settings or {}).items():
            options.add_session_config_entry(name, value)
        provider = (self._placement.provider, dict(self._placement.options))
        try:
            self._session = ort.InferenceSession(path, options, providers=[provider])
        except Exception as error:  # ONNX Runtime's error classes share no other base
            raise EngineError(
                f"{path}: ONNX Runtime {ort.__version__} cannot load it ({error}); export the bundle again, or install "
                "the version named in the README"
            ) from error
        found = self._session.get_providers()
        if found[0] != self._placement.provider:  # ONNX Runtime says so in its log only, and goes on with the CPU
            raise EngineError(
                f"{path}: ONNX Runtime {ort.__version__} runs it on {found[0]}, {self._placement.provider} does not "
                "start here; install the CUDA and cuDNN that this version was built for"
            )
        self._results = [o.name for o in self._session.get_outputs() if not o.name.startswith("present_")]

    @property
    def runner(self) -> str:
        """What runs the graph: `onnxruntime 1.31.0 CPUExecutionProvider`."""
        return f"onnxruntime {ort.__version__} {' '.join(self._session.get_providers())}"

    def run(
        self,
        inputs: Mapping[str, Tensor],
        in_place: Mapping[str, np.ndarray | DeviceCache] | None = None,
        *,
        fetch: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """See `Engine.run`; what is not fetched is an `onnxruntime.OrtValue` in the engine's memory.

        Args:
            in_place: a `DeviceCache` lies in that memory and is written where it is. A host array is, on a device,
                copied there and back as a whole.
        """
        binding = self._session.io_binding()
        # The binding reads these arrays in place: they must be contiguous, keep their rank, and outlive the run.
        alive = []
        for name, value in inputs.items():
            if isinstance(value, ort.OrtValue) and value.device_name() in ("cpu", self._placement.memory):
                binding.bind_ortvalue_input(name, value)
            else:
                array = np.asarray(to_host(value), order="C")
                alive.append(array)
                binding.bind_cpu_input(name, array)
        for name in self._results:
            # Outputs that stay have memory of their own, because others may hold them for as long as they like; the
            # arena of ONNX Runtime hands out again what they let go of.
            is_fetched = fetch is None or name in fetch
            binding.bind_output(name, "cpu" if is_fetched else self._placement.memory)
        for stem, buffer in (in_place or {}).items():
            self._bind_cache(binding, stem, buffer)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        outputs = zip(self._results, binding.get_outputs()[: len(self._results)], strict=True)
        return {name: value.numpy() if fetch is None or name in fetch else value for name, value in outputs}

    def _bind_cache(self, binding: ort.IOBinding, stem: str, buffer: np.ndarray | DeviceCache) -> None:
        """One memory as input and output: the write happens in the buffer itself, nothing is copied."""
        past, present = f"past_{stem}", f"present_{stem}"
        if isinstance(buffer, DeviceCache):
            place = (self._placement.memory, 0, buffer.dtype, buffer.shape, buffer.address)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)
            return
        value = ort.OrtValue.ortvalue_from_numpy(buffer)
        binding.bind_ortvalue_input(past, value)
        binding.bind_ortvalue_output(present, value)


@functools.cache
def _load_cuda_libraries() -> None:
    """Those of NVIDIA's Python packages, where they are installed; the system's are found without help."""
    with redirect_stdout(sys.stderr):  # it prints what it does not find
        ort.preload_dlls()
